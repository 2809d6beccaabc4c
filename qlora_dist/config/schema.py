"""The configuration of a run: one pydantic model a section, in the words of transformers and PEFT."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from qlora_dist.config.aggregate_section import AggregateConfig
from qlora_dist.config.contradictions import contradictions
from qlora_dist.config.section import Fraction, NonNegativeInt, PositiveInt, Section

ScheduleName = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
StrategyName = Literal["none", "ddp", "fsdp", "hybrid", "zero2", "zero3"]
VocabularyStorage = Literal["bf16", "8bit", "nf4", "host"]
OptimName = Literal[
    "paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit", "lion_8bit", "adamw_torch", "sgd"
]


class ModelConfig(Section):
    """The frozen base model."""

    name: str = Field(
        description="A local folder, a hub id, a .gguf file, `package:NAME` for a GGUF file inside an installed Python "
        "package, or `synthetic:NAME` for random weights of a known shape."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    trust_remote_code: bool = Field(False, description="Run Python code that the model repository brings.")
    quantization: Literal["nf4", "fp4", "none"] = Field(
        "nf4", description="`none` keeps the base in the compute dtype."
    )
    double_quant: bool = Field(True, description="Quantise the quantisation constants too.")
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="`auto` is bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."
    )
    compute: Literal["bf16", "fp8"] = Field(
        "bf16",
        description="How fused layers multiply the frozen base: `fp8` is faster, on GPUs from compute capability 8.9 "
        "on, and rounds what it multiplies to 8 bits (see docs/models.md). Adapters stay in the compute dtype.",
    )
    embedding: VocabularyStorage = Field(
        "bf16",
        description="How the embedding is kept: `bf16` is the compute dtype, `host` the same in pinned host memory, "
        "of which the GPU reads the rows of a micro-batch. Frozen, as the rest of the base.",
    )
    head: VocabularyStorage = Field(
        "bf16", description="How the head is kept; as `embedding` where the model has one weight for both."
    )
    cache_quantized: Path | None = Field(
        None, description="Folder to keep the quantised base in; stock transformers loads it. Reused when present."
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    fused: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Decoder layers and loss as fused kernels: `auto` on a GPU; off is transformers' and PEFT's.",
    )


def _init_name(name: str) -> str:
    if name not in ("gaussian", "orthogonal", "pissa", "loftq") and not re.fullmatch(r"pissa_niter_[1-9]\d*", name):
        raise ValueError("'gaussian', 'orthogonal', 'pissa', 'pissa_niter_N' (N: rounds) or 'loftq'")
    return name


InitName = Annotated[str, AfterValidator(_init_name)]


class LoftQConfig(Section):
    """LoftQ, by PEFT's field names."""

    loftq_bits: Literal[4] = 4
    loftq_iter: PositiveInt = Field(1, description="Rounds of quantising and fitting the adapter to the rest.")


class AdapterConfig(Section):
    """LoRA, by PEFT's field names."""

    path: Path | None = Field(
        None, description="Start from this PEFT adapter folder; its own adapter_config.json then decides the shape."
    )
    r: PositiveInt = 16
    lora_alpha: PositiveInt = 32
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Above 0, decoder layers run unfused on a GPU, and slower."
    )
    target_modules: str | list[str] = Field("all-linear", description="`all-linear`, a regular expression, or names.")
    modules_to_save: list[str] | None = Field(None, description="Modules trained in full beside the adapter.")
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | InitName = Field(
        True, description="true, false, gaussian, orthogonal, pissa, pissa_niter_N or loftq (see docs/models.md)."
    )
    loftq_config: LoftQConfig | None = Field(None, description="For init_lora_weights=loftq.")
    layers_to_transform: NonNegativeInt | list[NonNegativeInt] | None = Field(
        None, description="Adapt these decoder layers only, counted from 0."
    )
    layers_pattern: str | list[str] | None = Field(
        None, description="What the list of layers is called, where the model calls it neither layers nor h nor blocks."
    )
    rank_pattern: dict[str, PositiveInt] = Field(
        default_factory=dict, description="Module name or regular expression -> r for the modules it matches."
    )
    alpha_pattern: dict[str, PositiveInt] = Field(
        default_factory=dict, description="Module name or regular expression -> lora_alpha for the modules it matches."
    )

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation moves a part of the base weights into the adapter."""
        return str(self.init_lora_weights).startswith(("pissa", "loftq"))


FieldName = Literal[
    "messages", "conversations", "text", "prompt", "completion", "instruction", "input", "output", "question", "answer",
    "response", "system",
]  # fmt: skip


class FilterConfig(Section):
    """Which rows are left out before training; every kind is counted and shown."""

    min_chars: PositiveInt | None = Field(None, description="Characters of all messages of a row together.")
    max_chars: PositiveInt | None = None
    min_tokens: PositiveInt | None = Field(None, description="Tokens of a row with its chat template.")
    max_tokens: PositiveInt | None = Field(None, description="Beside max_length, which is the size of a pack.")
    drop_empty_answers: bool = Field(False, description="An empty answer is left out instead of an error.")
    drop_duplicates: bool = Field(False, description="Keep the first of rows that differ in white space only.")
    drop_leaked: bool = Field(False, description="Leave out held-out rows that are training rows too.")


class DataConfig(Section):
    """Rows in, packs out."""

    train: str = Field(
        description="A .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, a folder that `datasets` saved, "
        "s3://BUCKET/KEY, a hub id `owner/name[:subset][@revision]`, or `bundled:NAME`; `#SPLIT` picks a split."
    )
    eval: str | None = Field(None, description="Held-out rows: a source as `train` takes it.")
    eval_split: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Hold out this share (below 1) or number of training rows; excludes `eval`."
    )
    format: Literal["auto", "messages", "alpaca", "prompt_completion", "question_answer", "sharegpt", "text"] = "auto"
    fields: dict[FieldName, str] | None = Field(
        None, description="For other rows: our key -> their column, a path `a.b`, or a text with `{column}` in it."
    )
    chat_template: str | None = Field(
        None, description="In place of the tokenizer's: a name (chatml, llama-3, mistral, ...) or a .jinja file."
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="`skip` leaves malformed rows out, counted.")
    filter: FilterConfig = Field(default_factory=FilterConfig)
    max_length: PositiveInt = Field(2048, description="Tokens a pack holds at most.")
    too_long: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="What becomes of a row of more than `max_length` tokens."
    )
    packing: bool = Field(
        False, description="Put several training documents into one pack, kept apart in attention and positions."
    )
    assistant_only_loss: bool = Field(True, description="Loss on the assistant's tokens only.")
    shuffle: bool = True
    max_rows: PositiveInt | None = Field(None, description="Use only the first rows of the training source.")
    max_eval_rows: PositiveInt | None = None
    num_proc: PositiveInt | None = Field(
        None, description="Processes that tokenise; one for every 50,000 rows, up to the CPU cores, where unset."
    )
    cache_dir: Path | None = Field(
        None, description="Folder of tokenised data; `tokens` in $QLORA_DIST_CACHE or ~/.cache/qlora-dist where unset."
    )


class TrainConfig(Section):
    """The optimisation, by transformers' names."""

    max_steps: PositiveInt | None = Field(None, description="Optimizer steps; takes the place of num_train_epochs.")
    num_train_epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="1 where max_steps is unset too.")
    per_device_train_batch_size: PositiveInt = Field(1, description="Packs a micro-batch.")
    gradient_accumulation_steps: PositiveInt | None = Field(
        None, description="Micro-batches a worker and step; follows from global_batch_size where that is set."
    )
    global_batch_size: PositiveInt | None = Field(
        None, description="Packs an optimizer step, over all workers; stays as it is when workers come and go."
    )
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    lr_scheduler_type: ScheduleName = "cosine"
    warmup_steps: NonNegativeInt = 0
    warmup_ratio: Fraction = Field(0.0, description="Share of all steps; excludes warmup_steps.")
    optim: OptimName = Field("paged_adamw_8bit", description="The paged ones run unpaged on a CPU.")
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] | None = Field(
        None, description="LoRA+: learning rate of the B matrices over that of everything else."
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="0 turns clipping off.")
    gradient_checkpointing: bool = Field(False, description="Recompute every decoder layer in the backward.")
    activations: Literal["auto", "keep", "recompute", "offload"] = Field(
        "auto",
        description="What fused layers keep for the backward. `auto`: what fits, on the GPU or, where copies hide "
        "behind the computation, in pinned host memory, planned before the first step. "
        "`offload`: each layer's input and what its attention needs, in pinned host memory.",
    )
    memory_budget_gib: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="GPU memory a worker may use in all, CUDA's own and NCCL's included; the whole GPU where unset.",
    )
    host_memory_budget_gib: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Pinned host memory a worker may use for activations under `auto`; 0 leaves them on the GPU. Where "
        "unset, half of what is free, shared by the workers of the host.",
    )
    max_bad_steps: PositiveInt = Field(10, description="Stop after so many non-finite steps in a row.")
    logging_steps: PositiveInt = 1


class EvalConfig(Section):
    """Evaluation on held-out rows during training."""

    eval_steps: PositiveInt | None = Field(None, description="Evaluate every so many steps; at the end in any case.")
    eval_on_start: bool = True
    per_device_eval_batch_size: PositiveInt = 4
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Stop after so many evaluations in a row without improvement."
    )
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    load_best_model_at_end: bool = Field(False, description="The final adapter is the one of the best evaluation.")
    sample_prompts: Annotated[int, Field(ge=0, le=32)] = Field(
        0, description="Held-out prompts answered before and after training."
    )
    sample_max_new_tokens: PositiveInt = 64


class CheckpointConfig(Section):
    """When a checkpoint is made and how long it is kept."""

    save_steps: PositiveInt = Field(100, description="A checkpoint every so many steps, and one at the end.")
    keep_last: PositiveInt = 3
    keep_best: NonNegativeInt = Field(1, description="Beside the last ones, keep so many of the lowest eval loss.")


class ShardConfig(Section):
    """How training state is spread over workers."""

    strategy: Literal["auto", "none", "ddp", "fsdp", "hybrid", "zero2", "zero3"] = Field(
        "auto", description="`auto`: none for one worker, else ddp."
    )
    frozen: Literal["auto", "shard", "replicate"] = Field(
        "auto",
        description="The frozen base under fsdp and hybrid: `replicate` where it fits is faster. `auto` does where it "
        "takes at most a third of the memory that is free on each GPU (or of train.memory_budget_gib).",
    )
    hybrid_shard_size: PositiveInt | None = Field(
        None, description="hybrid: workers that hold one copy together; those of a node where unset."
    )
    reshard_after_forward: bool | None = Field(
        None,
        description="fsdp, hybrid: free a layer's gathered weights after its forward and gather them once more. Where "
        "unset: of a sharded base yes, of a replicated one no.",
    )
    prefetch_layers: NonNegativeInt = Field(
        1, description="fsdp, hybrid: gather so many layers ahead of the one that computes."
    )
    offload: list[Literal["optimizer", "shards", "activations"]] = Field(
        default_factory=list, description="What lives in pinned host memory and visits the GPU when needed."
    )
    deepspeed_config: Path | None = Field(
        None, description="zero2, zero3: a DeepSpeed JSON file whose settings are merged into ours."
    )


def _number_or_range(value: Any) -> Any:
    numbers = value if isinstance(value, list) and len(value) == 2 else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in numbers):
        raise ValueError("a whole number above 0, or two of them: [least, most]")
    return value


WorkerCount = Annotated[int | list[int], BeforeValidator(_number_or_range)]


class LaunchConfig(Section):
    """Who starts the workers, and where."""

    backend: Literal["ray", "torchrun", "none"] = "ray"
    num_workers: WorkerCount = Field(
        1, description="A number, or [least, most]: as many as fit, fewer when a node is lost, more when one returns."
    )
    address: str | None = Field(None, description="Ray cluster to join; a local one is started where unset.")
    device: Literal["auto", "cuda", "cpu"] = "auto"
    cpus_per_worker: PositiveInt = 1
    max_restarts: NonNegativeInt = Field(3, description="Restarts of a failed worker group from the last checkpoint.")
    collective_timeout_s: Annotated[float, Field(gt=0)] = Field(
        600.0, description="A worker that keeps the others waiting so long is named and the run restarts."
    )
    start_timeout_s: Annotated[float, Field(gt=0)] = Field(300.0, description="For the worker group to start.")

    @property
    def min_workers(self) -> int:
        """The least number of workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The largest number of workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change during the run."""
        return self.min_workers < self.max_workers


class TrackConfig(Section):
    """Where metrics go beside metrics.jsonl."""

    tensorboard: bool = Field(True, description="Event files in the run folder's `tensorboard`.")
    wandb: Literal["off", "auto", "online", "offline"] = Field(
        "off", description="`auto`: online where a key is found (WANDB_API_KEY, netrc), else offline."
    )
    wandb_project: str = "qlora-dist"
    wandb_entity: str | None = Field(None, description="User or team; W&B's own default where unset.")
    wandb_group: str | None = None
    wandb_tags: list[str] = Field(default_factory=list)
    wandb_name: str | None = Field(None, description="`name` where unset.")
    wandb_log_adapter: bool = Field(True, description="The final adapter as an artifact of the run.")
    report: bool = Field(True, description="Write report.html at the end of the run.")
    prometheus_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None, description="Serve Prometheus metrics at this port of the coordinator's node, to whoever asks."
    )


class RunConfig(Section):
    """Everything a run needs, from one YAML file and dotted overrides.

    Values that contradict each other are refused here, so that nothing starts which cannot end well.
    """

    name: str = Field("qlora", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="The run's name.")
    output_dir: Path | None = Field(None, description="The run folder; `runs/NAME` where unset.")
    seed: NonNegativeInt = 42
    resume: str = Field("auto", description="`auto` (from the last good checkpoint, if any), `none`, or a path.")
    model: ModelConfig
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    shard: ShardConfig = Field(default_factory=ShardConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    aggregate: AggregateConfig = Field(default_factory=AggregateConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "RunConfig":
        for problem in contradictions(self):
            raise ValueError(problem)  # pydantic wants this class; `load.validate` takes the UserError out again
        return self

    @property
    def run_dir(self) -> Path:
        """The run folder: `output_dir`, or `runs/NAME`."""
        return self.output_dir or Path("runs") / self.name

    @property
    def global_batch_size(self) -> int:
        """Packs an optimizer step, over all workers and micro-batches.

        Where `launch.num_workers` is a range it is that of the most workers, however many are there.
        """
        train = self.train
        if train.global_batch_size is not None:
            return train.global_batch_size
        return train.per_device_train_batch_size * (train.gradient_accumulation_steps or 1) * self.launch.max_workers

    @property
    def activations(self) -> Literal["auto", "keep", "recompute", "offload"]:
        """`train.activations`, with what `train.gradient_checkpointing` and `shard.offload` say of it."""
        if "activations" in self.shard.offload:
            return "offload"
        return "recompute" if self.train.gradient_checkpointing else self.train.activations

    @property
    def strategy(self) -> StrategyName:
        """The strategy that `shard.strategy: auto` stands for."""
        if self.shard.strategy != "auto":
            return self.shard.strategy
        return "none" if self.launch.max_workers == 1 else "ddp"
