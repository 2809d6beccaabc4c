"""What a run needs of the machines it is to run on, from its configuration and the launcher's environment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora_dist.cluster.launched import MOST_PORT, number
from qlora_dist.config.load import with_absolute_paths
from qlora_dist.config.schema import RunConfig

DATA_SUFFIXES = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"}
# Where people start things by hand: `ray start --head`, its dashboard, launchers/torchrun.sh.
USUAL_PORTS = {6379: "ray start --head", 8265: "Ray's dashboard", 29400: "launchers/torchrun.sh"}


@dataclass(frozen=True)
class Port:
    """A TCP port that a run listens on.

    Attributes:
        why: who listens there.
        needed: the run cannot start without it; else it is only usual.
    """

    number: int
    why: str
    needed: bool = True


@dataclass(frozen=True)
class Wanted:
    """What a run needs; plain values, since it crosses to every node as JSON.

    Attributes:
        run_dir: the run folder, absolute.
        named: whether somebody named that folder.
        workers: the least number of workers; None without a configuration.
        hub: the base model's hub id, where it is one.
        paths: setting -> file or folder that every node must have.
        package: the Python distribution that brings the base model, where one does.
    """

    run_dir: str
    named: bool = False
    workers: int | None = None
    backend: str | None = None
    address: str | None = None
    device: str = "auto"
    memory_budget_gib: float | None = None
    wandb: str = "auto"
    hub: str | None = None
    revision: str | None = None
    package: str | None = None
    paths: dict[str, str] = field(default_factory=dict)


def wanted_of(config: RunConfig | None, address: str | None = None, folder: Path | None = None) -> Wanted:
    """What a configuration needs, or what any run needs where there is none.

    Args:
        address: of a Ray cluster, in the place of `launch.address`.
        folder: the run folder, in the place of `output_dir`.
    """
    if config is None:
        return Wanted(str((folder or Path("runs")).absolute()), folder is not None, address=address)
    # Here and not above: it imports torch, which whoever only starts the ranks has no use for.
    from qlora_dist.model.resolve import PACKAGE_PREFIX, SYNTHETIC_PREFIX, is_hub_id

    config = with_absolute_paths(config)
    name = config.model.name
    paths = {"data.train": config.data.train, "data.eval": config.data.eval, "adapter.path": config.adapter.path}
    named = {setting: str(value) for setting, value in paths.items() if value is not None and _is_path(str(value))}
    hub = package = None
    if name.startswith(PACKAGE_PREFIX):
        package = name.removeprefix(PACKAGE_PREFIX)
    elif is_hub_id(name) and not name.endswith(".gguf"):
        hub = name
    elif not name.startswith(SYNTHETIC_PREFIX):
        named["model.name"] = name
    return Wanted(
        run_dir=str((folder or config.run_dir).absolute()), named=True, workers=config.launch.min_workers,
        backend=config.launch.backend, address=address or config.launch.address, device=config.launch.device,
        memory_budget_gib=config.train.memory_budget_gib, wandb=config.track.wandb, hub=hub,
        revision=config.model.revision, package=package, paths=named,
    )  # fmt: skip


def _is_path(text: str) -> bool:
    if "://" in text or any(sign in text for sign in "*?["):
        return False
    return text.startswith(("/", "~", ".")) or Path(text).suffix in DATA_SUFFIXES


def wanted_ports(wanted: Wanted, environ: Mapping[str, str], others: Sequence[int] = ()) -> list[Port]:
    """The ports that a run started from here would listen on, on this node.

    Args:
        environ: RANK, MASTER_PORT and SLURM_* where a launcher has set them.
        others: ports that the person asks about.

    Raises:
        UserError: MASTER_PORT is no port.
    """
    ports = [Port(number, "--port") for number in others]
    first = environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"
    # A cluster that is up has its own; torchrun's agent listens on MASTER_PORT by itself.
    if wanted.address is not None or environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return ports
    if "MASTER_PORT" in environ:
        return [*ports, Port(number(environ, "MASTER_PORT", most=MOST_PORT), "MASTER_PORT")] if first else ports
    if "SLURM_JOB_ID" in environ:
        base, node = slurm_port(environ), int(environ.get("SLURM_NODEID", 0))
        launcher = "torchrun" if wanted.backend == "torchrun" else "Ray"
        if node == 0:
            ports.append(Port(base, f"{launcher} in slurm/*.sh"))
        if launcher == "Ray":
            ports.append(Port(base + 10 + node, "Ray's agent in slurm/*.sh"))
        return ports
    if wanted.backend is None:
        ports += [Port(number, why, needed=False) for number, why in USUAL_PORTS.items()]
    elif wanted.backend == "torchrun":
        ports.append(Port(29400, USUAL_PORTS[29400], needed=False))
    return ports


def slurm_port(environ: Mapping[str, str]) -> int:
    """The first of a Slurm job's ports, as in slurm/job.sh."""
    return 10000 + int(environ["SLURM_JOB_ID"]) % 220 * 100
