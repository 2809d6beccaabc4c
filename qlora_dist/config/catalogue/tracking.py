"""Looking at runs: status, lists, comparisons, reports."""

from qlora_dist.config.catalogue.entry import Mendable

TRACKING: dict[str, Mendable] = {
    "no-run": Mendable(
        "there is no run in {folder}",
        "give the output_dir of a run",
    ),
    "no-runs": Mendable(
        "there is no run in {folder}",
        "give the folder that holds your run folders (runs by default)",
    ),
    "metrics-damaged": Mendable(
        "{file}, line {line} is damaged",
        "remove that line, then run the same command again",
    ),
    "report-not-writable": Mendable(
        "the report cannot be written ({error})",
        "give another place with -o",
    ),
}
