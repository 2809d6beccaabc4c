"""Settings that are right one by one and do not go together."""

from qlora_dist.config.catalogue.entry import Mendable

CONTRADICTIONS: dict[str, Mendable] = {
    "steps-and-epochs": Mendable(
        "train.max_steps and train.num_train_epochs are both set",
        "remove one of them",
    ),
    "checkpointing-and-activations": Mendable(
        "train.gradient_checkpointing recomputes every layer, and train.activations is {activations}",
        "leave gradient_checkpointing out",
    ),
    "warmup-twice": Mendable(
        "train.warmup_steps and train.warmup_ratio are both set",
        "remove one of them",
    ),
    "warmup-too-long": Mendable(
        "train.warmup_steps ({warmup_steps}) is more than train.max_steps ({max_steps}), so the learning rate would "
        "never reach its peak",
        "lower train.warmup_steps",
    ),
    "global-batch-factors": Mendable(
        "train.global_batch_size is {global_batch_size}, but train.per_device_train_batch_size x "
        "train.gradient_accumulation_steps x launch.num_workers is {product}",
        "remove train.gradient_accumulation_steps, which follows from the other two",
    ),
    "micro-batch-over-global": Mendable(
        "train.per_device_train_batch_size ({per_device}) is more than train.global_batch_size ({global_batch_size})",
        "lower the first or raise the second",
    ),
    "source-with-credentials": Mendable(
        "data.{field} holds credentials ({source})",
        "take them out and set them in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    "filter-passes-nothing": Mendable(
        "data.filter.min_{unit} ({low}) is more than data.filter.max_{unit} ({high}), so no row could pass",
        "lower the first or raise the second",
    ),
    "nothing-held-out": Mendable(
        "eval.{field} is set but there are no held-out rows",
        "set data.eval or data.eval_split, or remove eval.{field}",
    ),
    "no-evaluations": Mendable(
        "eval.{field} needs evaluations during training",
        "set eval.eval_steps",
    ),
    "best-not-kept": Mendable(
        "eval.load_best_model_at_end needs the best checkpoint",
        "set checkpoint.keep_best to 1 or more",
    ),
    "samples-without-answers": Mendable(
        "eval.sample_prompts needs answers to begin somewhere",
        "set data.assistant_only_loss to true, or eval.sample_prompts to 0",
    ),
    "adapter-shape-ignored": Mendable(
        "adapter.path brings its own shape, so adapter.{field} would be ignored",
        "remove one of them",
    ),
    "loftq-not-chosen": Mendable(
        "adapter.loftq_config is set but adapter.init_lora_weights is not loftq",
        "set adapter.init_lora_weights to loftq or remove adapter.loftq_config",
    ),
    "layers-without-names": Mendable(
        "adapter.layers_to_transform needs names of modules, and adapter.target_modules is {targets}",
        "set adapter.target_modules to a list, such as [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]",
    ),
    "layers-pattern-alone": Mendable(
        "adapter.layers_pattern is set without adapter.layers_to_transform",
        "set that too or remove adapter.layers_pattern",
    ),
    "changed-base-not-kept": Mendable(
        "adapter.init_lora_weights={init} changes the quantised base, which has to be kept for the adapter to be of "
        "use",
        "set model.cache_quantized to a folder and model.quantization to nf4 or fp4",
    ),
    "dora-with-changed-base": Mendable(
        "adapter.use_dora does not go with adapter.init_lora_weights={init}",
        "remove one of them",
    ),
    "run-folder-is-url": Mendable(
        "output_dir is {output_dir}, but a run folder is on a filesystem that all nodes mount",
        "name a folder there",
    ),
    "worker-range-reversed": Mendable(
        "launch.num_workers is [{least}, {most}], whose first number is the larger",
        "write the least number of workers first",
    ),
    "strategy-for-one-worker": Mendable(
        "shard.strategy is none but launch.num_workers is {workers}",
        "set shard.strategy to auto, ddp, fsdp, hybrid, zero2 or zero3, or launch.num_workers to 1",
    ),
    "backend-for-one-worker": Mendable(
        "launch.backend is none but launch.num_workers is {workers}",
        "set launch.backend to ray or torchrun, or launch.num_workers to 1",
    ),
    "address-without-ray": Mendable(
        "launch.address is for Ray but launch.backend is {backend}",
        "remove one of them",
    ),
    "island-by-halves": Mendable(
        "aggregate.{given} is set without aggregate.{missing}",
        "set aggregate.coordinator and aggregate.island for an island of a coordinator, or neither",
    ),
    "svd-with": Mendable(
        "aggregate.method is svd, the exact mean of the products, which does not go with {setting}",
        "leave that out, or set aggregate.method to mean or diloco",
    ),
    "noise-without-clip-norm": Mendable(
        "aggregate.noise is {noise}, which is measured in units of aggregate.clip_norm, and that is 0",
        "set aggregate.clip_norm",
    ),
    "noise-with-robust": Mendable(
        "aggregate.noise is measured by the shares of a mean, and aggregate.robust is {robust}",
        "remove one of them",
    ),
    "overlap-every-step": Mendable(
        "aggregate.overlap hides an exchange behind the steps of the next round, and aggregate.sync_every is 1",
        "raise aggregate.sync_every, or set aggregate.overlap to false",
    ),
    "islands-with-best": Mendable(
        "eval.{field} looks at one run's evaluations, and islands share one adapter between several",
        "remove eval.{field}",
    ),
}
