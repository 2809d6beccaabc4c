"""The ranks of an examination that torchrun, srun or whoever sets RANK and WORLD_SIZE has started."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_dist.cluster.doctor.start import run_ranks, settings_of, total_s
from qlora_dist.cluster.doctor.wanted import Wanted, slurm_port
from qlora_dist.cluster.launched import MOST_PORT, given, number
from qlora_dist.cluster.network import free_port
from qlora_dist.coordinate.host import this_host

Facts = dict[str, Any]
# For what a rank has found to reach rank 0, after the rank is through.
LATE_S = 5.0


@dataclass(frozen=True)
class Place:
    """Where a launcher has put this process.

    Attributes:
        node: names the machine; two launchers' nodes may be one host.
        host, port: where rank 0's store is; `agent`: torchrun's agent serves it.
        attempt: tells apart the starts of one torchrun, which share a store.
    """

    rank: int
    world_size: int
    local_rank: int
    node: str
    host: str
    port: int
    agent: bool = False
    attempt: str = "0"


def place_of(environ: Mapping[str, str]) -> Place | None:
    """This process's place among those that a launcher has started; None where there is none, or it is alone.

    Raises:
        UserError: what a launcher sets is there by halves.
    """
    if "RANK" in environ and (world_size := number(environ, "WORLD_SIZE", 1)) > 1:
        rank, local, host = number(environ, "RANK", most=world_size - 1), number(environ, "LOCAL_RANK", 0), this_host()
        group = environ.get("GROUP_RANK")
        if group is None and "LOCAL_WORLD_SIZE" in environ:
            group = str(rank // max(1, number(environ, "LOCAL_WORLD_SIZE")))
        return Place(
            rank, world_size, local, host if group is None else f"{host}/{group}",
            given(environ, "MASTER_ADDR"), number(environ, "MASTER_PORT", most=MOST_PORT),
            environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True", environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )  # fmt: skip
    # Only a step has tasks: a batch script has a number of them, and is one process.
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1)) if "SLURM_STEP_ID" in environ else 1
    if tasks > 1:
        # The hundred ports of the job; its own runs begin at the other end.
        port = slurm_port(environ) + 90 + int(environ["SLURM_STEP_ID"]) % 10
        rank, local = int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"])
        return Place(rank, tasks, local, environ["SLURMD_NODENAME"], _slurm_head(environ), port)
    return None


def _slurm_head(environ: Mapping[str, str]) -> str:
    """The address by which Slurm reaches the step's first node, as in slurm/job.sh."""
    if "QLORA_DIST_HEAD_ADDRESS" in environ:
        return environ["QLORA_DIST_HEAD_ADDRESS"]
    names = _scontrol("show", "hostnames", environ["SLURM_STEP_NODELIST"])
    told = _scontrol("show", "node", "-o", names.split()[0])
    return next(field.partition("=")[2] for field in told.split() if field.startswith("NodeAddr="))


def _scontrol(*words: str) -> str:
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True, timeout=30).stdout


def examine_group(wanted: Wanted, place: Place, ports: list[Facts], limit_s: float) -> list[Facts] | None:
    """The facts of all ranks on rank 0, which also hears which of them are missing; None on the others.

    Args:
        ports: what this process's node says of them, from before the store took one.
    """
    # Here and not above: it imports torch.
    from torch.distributed import PrefixStore

    from qlora_dist.cluster.doctor.meeting import Meeting, connect

    deadline = time.monotonic() + total_s(limit_s) + LATE_S
    serves = place.rank == 0 and not place.agent
    try:
        store = connect(place.host, place.port, place.rank, 2 * limit_s, serves)
    except RuntimeError as error:
        why = str(error).splitlines()[0][:160]
        if place.rank != 0:
            print(f"rank {place.rank} does not reach rank 0 at {place.host}:{place.port}: {why}", file=sys.stderr)
            return None
        alone = settings_of(
            wanted, limit_s, 0, 1, place.local_rank, place.node, (place.host, free_port()), spread=False
        )
        reason = f"rank 0 could not listen on {place.host}:{place.port} to hear of it"
        return [run_ranks([alone])[0] | {"ports": ports}] + [
            {"rank": rank, "node": None, "absent": reason} for rank in range(1, place.world_size)
        ]
    # The starts of one torchrun share a store.
    everyone = Meeting(PrefixStore(f"doctor/{place.attempt}", store), place.rank, range(place.world_size), 2 * limit_s)
    if place.rank == 0:
        everyone.tell("meeting", [place.host, free_port()])
    meeting = everyone.hear("meeting")
    spread = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) != place.world_size
    settings = settings_of(
        wanted, limit_s, place.rank, place.world_size, place.local_rank, place.node, (meeting[0], meeting[1]), spread
    )
    facts = run_ranks([settings])[0]
    if place.local_rank == 0:
        facts["ports"] = ports
    if place.rank != 0:
        everyone.tell(f"facts/{place.rank}", facts)
        return None
    everyone.tell("facts/0", facts)
    names = {rank: f"facts/{rank}" for rank in range(place.world_size)}
    came = set(facts.get("meeting", {}).get("members", ()))
    everyone.limit_s = max(LATE_S, deadline - time.monotonic())
    everyone.wait([names[rank] for rank in came])
    # Whoever did not come to the meeting has had its time.
    everyone.limit_s = LATE_S
    everyone.wait(list(names.values()))
    there = [rank for rank, name in names.items() if everyone.store.check([name])]
    return [everyone.hear(names[r]) if r in there else _absent(r, r in came) for r in names]


def _absent(rank: int, came: bool) -> Facts:
    why = "it began and was not heard of again" if came else "it did not come; is it started, and can it reach rank 0?"
    return {"rank": rank, "node": None, "absent": why}
