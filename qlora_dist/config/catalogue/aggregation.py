"""Combining adapters after training."""

from qlora_dist.config.catalogue.entry import Mendable

AGGREGATION: dict[str, Mendable] = {
    "aggregate-method-unknown": Mendable("--method {method}: there is no such method", "use one of {known}"),
    "aggregate-value": Mendable("{option} {value} is not possible", "give {wanted}"),
    "aggregate-option-without-use": Mendable("{option} has no meaning for {method}", "leave it out"),
    "aggregate-weights-number": Mendable(
        "--weights has {weights} number(s) for {adapters} adapter(s)", "give one for each, in their order"
    ),
    "aggregate-mean-negative": Mendable(
        "--weights {weights}: {method} is a mean and takes no negative weight", "use --method task-arithmetic"
    ),
    "aggregate-output-exists": Mendable("-o {folder} exists already", "name another folder, or delete it first"),
    "aggregate-output-not-writable": Mendable("-o {folder} cannot be written ({reason})", "name another folder"),
    "aggregate-folder-missing": Mendable("{folder}: there is no such folder", "give PEFT adapter folders"),
    "aggregate-run-folder": Mendable("{folder} is a run folder", "give its adapter, {adapter}"),
    "aggregate-no-adapter": Mendable(
        "{folder} is no PEFT adapter folder: it has no {name}", "give one that has it (safetensors weights)"
    ),
    "aggregate-config-damaged": Mendable("{file} is damaged ({reason})", "fetch it again"),
    "aggregate-not-lora": Mendable("{folder} is an adapter of type {type}", "give LoRA adapters"),
    "aggregate-beyond-lora": Mendable(
        "{folder} uses {setting}, which is no product of two factors and cannot be combined",
        "leave this adapter out, or train it without",
    ),
    "aggregate-changed-its-base": Mendable(
        "{folder} was made by {init}, which changes the base weights too",
        "convert it to plain LoRA first (PEFT: save_pretrained(path_initial_model_for_weight_conversion=...))",
    ),
    "aggregate-weight-unknown": Mendable(
        "{folder} has a weight {name} that is no half of a LoRA pair", "fetch it again, or leave this adapter out"
    ),
    "aggregate-weight-no-matrix": Mendable(
        "{folder}: {name} is {dtype} of shape {shape}, no matrix of 16-bit floats or wider",
        "leave this adapter out, or convert it",
    ),
    "aggregate-factors-differ": Mendable(
        "{folder}: the factors of {module} do not fit together (A has rank {a_rank}, B {b_rank})", "fetch it again"
    ),
    "aggregate-empty": Mendable("{folder} holds no LoRA weights", "fetch it again, or leave this adapter out"),
    "aggregate-not-finite": Mendable(
        "{folder}: {name} has values that are NaN or infinite", "leave this adapter out, or take an earlier checkpoint"
    ),
    "aggregate-result-not-finite": Mendable(
        "{name} of the result is beyond the range of fp32", "give smaller --weights"
    ),
    "aggregate-shapes-differ": Mendable(
        "{module} is {first_shape} in {first} and {second_shape} in {second}, so they are not over the same base",
        "combine adapters of one base",
    ),
    "aggregate-bases-differ": Mendable(
        "{first} is over {first_base} (fingerprint {first_print}) and {second} over {second_base} ({second_print})",
        "combine adapters of one base",
    ),
    "aggregate-base-names-differ": Mendable(
        "{first} is over {first_base} and {second} over {second_base}",
        "combine adapters of one base, or name it with --base where these are the same",
    ),
    "aggregate-ranks-differ": Mendable(
        "{method} on factors needs equal ranks, and {module} has rank {first_rank} in {first} and {second_rank} in "
        "{second}",
        "use {mend}",
    ),
    "island-differs": Mendable(
        "this island has another {setting} than the one that began ({own} and {theirs})",
        "give all islands the same model, data, adapter and seed, or this one a coordinator of its own",
    ),
    "island-taken-over": Mendable(
        "another process speaks for island {island} now", "give every island a name of its own in aggregate.island"
    ),
    "island-address-form": Mendable(
        "aggregate.coordinator is {coordinator}, which is no HOST:PORT and no run folder of a coordinator",
        "write the address that `qlora-dist coordinate` shows, or its run folder",
    ),
    "island-token-missing": Mendable(
        "the token of the coordinator at {coordinator} is not known here",
        "set QLORA_DIST_TOKEN to the token in coordinator.json of the coordinator's run folder",
    ),
    "island-unreachable": Mendable(
        "aggregate.coordinator leads nowhere: {reason}",
        "give the address that `qlora-dist coordinate` shows while it runs (with --host 0.0.0.0 for other machines)",
    ),
    "islands-done": Mendable(
        "the islands of {coordinator} have trained everything, and its coordinator has ended",
        "take the adapter in {adapter}; for more of it give the coordinator a new output_dir",
    ),
    "islands-other-packs": Mendable(
        "{folder} began with {began} packs in all, and they are trained; train.max_steps or num_train_epochs, "
        "global_batch_size and aggregate.islands make {wanted} now",
        "name another output_dir, or the settings it began with",
    ),
    "islands-under-launcher": Mendable(
        "RANK and WORLD_SIZE are set by a launcher, and aggregate.islands is {islands}, all of which would start here",
        "start `qlora-dist coordinate` once and each island with aggregate.coordinator and aggregate.island",
    ),
    "coordinator-port-taken": Mendable(
        "{where} cannot be bound ({error})", "name an address of this host with --host, or another --port"
    ),
    "coordinate-without-islands": Mendable(
        "aggregate.islands is 1, and there is nothing to coordinate", "set aggregate.islands to 2 or more"
    ),
    "islands-all-gone": Mendable(
        "no island is left ({reason})",
        "look at {logs}; the same command goes on from round {round}",
    ),
    "aggregate-layer-missing": Mendable(
        "mean needs the same layers in all adapters, and {module} of {folder} is not in {other}",
        "use --method svd or cat, where a layer that is not there counts as an update of 0",
    ),
}
