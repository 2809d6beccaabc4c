"""`qlora-dist bench`: what it is asked for, and the files that it writes."""

from qlora_dist.config.catalogue.entry import Mendable

BENCHMARKS: dict[str, Mendable] = {
    "bench-axis-form": Mendable(
        "--set {axis} is not of the form section.field=value,value",
        "write it as in --set train.per_device_train_batch_size=1,2,4",
    ),
    "bench-axis-repeats": Mendable(
        "--set {axis} has a value twice",
        "give each value once",
    ),
    "bench-axis-twice": Mendable(
        "{setting} has two --set options",
        "put all of its values into one, separated by commas",
    ),
    "bench-points-unreadable": Mendable(
        "--points {file} is no list of points ({error})",
        'make it a JSON list of {{"name": ..., "overrides": ["section.field=value", ...]}}, each with its own name',
    ),
    "bench-too-few-steps": Mendable(
        "point {name} has train.max_steps={max_steps}, and the first {warm_up} steps are not measured",
        "leave train.max_steps to --steps, or lower --warm-up",
    ),
    "bench-needs-gpu": Mendable(
        "bench {what} measures a GPU, and this machine shows none",
        "run it where nvidia-smi lists one; bench throughput runs on a CPU too",
    ),
    "bench-peer-unknown": Mendable(
        "--peer {name} is not among the peers",
        "choose from {peers}",
    ),
    "bench-size-form": Mendable(
        "--size {sizes} is not of the form 8x2048,4x2048",
        "write sequences x tokens, with a comma between two sizes",
    ),
    "bench-base-failed": Mendable(
        "the base could not be quantised for the peers: {outcome} ({error})",
        "try `qlora-dist bench throughput` with the same --model and --set, which shows more",
    ),
    "bench-rows-too-short": Mendable(
        "no batch of {size} tokens can be made of the rows, which are shorter",
        "leave data.train to the benchmark, or choose a smaller --size",
    ),
    "bench-kernel-unknown": Mendable(
        "--only {name} is part of no kernel's name",
        "choose from {kernels}",
    ),
    "bench-out-form": Mendable(
        "--out {out} does not end in .json",
        "name the JSON file; the table and the picture get its name with .md and .png",
    ),
    "bench-not-writable": Mendable(
        "{file} cannot be written ({error})",
        "name another file with --out",
    ),
    "bench-not-resumable": Mendable(
        "--resume cannot add to {file} ({error})",
        "leave --resume out, or name another file with --out",
    ),
    "bench-unreadable": Mendable(
        "{file} is no result of qlora-dist bench ({error})",
        "name a JSON file that bench throughput or bench peers has written",
    ),
}
