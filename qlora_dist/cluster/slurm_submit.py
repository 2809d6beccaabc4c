"""`qlora-dist submit slurm`: nodes, GPUs and time of a configuration as a batch script, and its submission."""

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import qlora_dist
from qlora_dist.config.errors import UserError
from qlora_dist.config.redact import redact
from qlora_dist.config.schema import RunConfig

GPUS_PER_NODE = 8
# Seconds before the time limit at which Slurm sends SIGUSR1, as in slurm/*.sh.
NOTICE_S = 120


@dataclass(frozen=True)
class Allocation:
    """What a job asks Slurm for; a worker for each GPU, or for each `cpus_per_worker` where there are none."""

    nodes: int
    workers_per_node: int
    gpus: bool


def allocation(config: RunConfig, nodes: int | None = None, gpus_per_node: int | None = None) -> Allocation:
    """Nodes and workers on each: what is given, and the rest from `launch.num_workers`.

    Where both are given they decide. Nodes of 8 GPUs are assumed where neither is.

    Raises:
        UserError: the workers cannot be spread evenly over the nodes.
    """
    workers, gpus = config.launch.max_workers, config.launch.device != "cpu"
    if nodes is not None and gpus_per_node is not None:
        return Allocation(nodes, gpus_per_node, gpus)
    if nodes is None:
        gpus_per_node = gpus_per_node or min(GPUS_PER_NODE, workers)
        nodes = -(-workers // gpus_per_node)
    per_node = gpus_per_node or -(-workers // nodes)
    if nodes * per_node != workers and not config.launch.elastic:
        raise UserError("slurm-uneven", workers=workers, nodes=nodes, per_node=per_node)
    return Allocation(nodes, per_node, gpus)


def render(
    path: Path, config: RunConfig, overrides: Sequence[str], asked: Allocation, time_limit: str | None = None
) -> str:
    """The batch script of a run: slurm/common.sh does the work.

    Args:
        path: of the configuration, on storage that the nodes share.
        overrides: what `qlora-dist train` gets beside it.
        time_limit: as `sbatch --time` takes it; the partition's own where None.

    Raises:
        UserError: an override holds a secret, which would lie in the script for others to read.
    """
    for override in overrides:
        if redact(override) != override:
            raise UserError("slurm-secret", field=override.partition("=")[0])
    home = scripts_home()
    options = {
        "job-name": config.name, "nodes": asked.nodes, "ntasks-per-node": 1,
        **({"gpus-per-node": asked.workers_per_node} if asked.gpus else {}),
        "cpus-per-task": asked.workers_per_node * config.launch.cpus_per_worker,
        **({"time": time_limit} if time_limit else {}),
        "signal": f"B:USR1@{NOTICE_S}", "requeue": None, "open-mode": "append", "output": "slurm-%x-%j.out",
    }  # fmt: skip
    lines = [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in options.items()]
    # The scripts set the number of workers to that of the allocation; a range is the person's own.
    kept = [f"launch.num_workers={config.launch.num_workers}".replace(" ", "")] if config.launch.elastic else []
    words = [str(path.absolute()), *kept, *overrides]
    launcher = "torchrun" if config.launch.backend == "torchrun" else "ray"
    return "\n".join(
        [
            "#!/bin/bash", *lines, "",
            f"QLORA_DIST_HOME={shlex.quote(str(home))}",
            f"LAUNCHER=${{LAUNCHER:-{launcher}}}",
            f"WORKERS_PER_NODE={asked.workers_per_node}",
            'source "$QLORA_DIST_HOME/slurm/common.sh"', "",
            f"run_train {shlex.join(words)}", "",
        ]
    )  # fmt: skip


def scripts_home() -> Path:
    """The folder that slurm/common.sh lies below: the repository that this package is installed from.

    Raises:
        UserError: it is installed without the repository.
    """
    home = Path(qlora_dist.__file__).resolve().parents[1]
    if not (home / "slurm" / "common.sh").is_file():
        raise UserError("slurm-no-scripts", folder=home)
    return home


def submit(script: str) -> str:
    """Hand a batch script to sbatch; the job's number.

    Partition, account and the like are sbatch's own: its SBATCH_* variables.

    Raises:
        UserError: there is no sbatch here, or it refuses the job.
    """
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("sbatch-not-found") from error
    if done.returncode != 0:
        raise UserError("sbatch-refused", error=" ".join(done.stderr.split()))
    return done.stdout.strip().partition(";")[0]
