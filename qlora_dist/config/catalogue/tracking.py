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
    "run-is-over": Mendable(
        "the run in {run_dir} is {state} already, its last checkpoint: {checkpoint}",
        "there is nothing to stop; `qlora-dist train` with its config goes on from there",
    ),
    "run-not-heard-of": Mendable(
        "the run in {run_dir} has not been heard of for {seconds:.0f} s, so nobody would act on a stop, its last "
        "checkpoint: {checkpoint}",
        "end what is left of its processes by their launcher (scancel, ray job stop, kill), then run the same command "
        "again to go on",
    ),
    "prometheus-port": Mendable(
        "track.prometheus_port: {port} cannot be served ({error}), so this run has no Prometheus metrics",
        "set a port that is free on the node that hosts the coordinator (two runs on one node need two), then run the "
        "same command again",
    ),
    "report-not-writable": Mendable(
        "the report cannot be written ({error})",
        "give another place with -o",
    ),
}
