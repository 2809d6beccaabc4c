"""Starts the ranks of an examination on one machine, and ends those that hang."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from qlora_dist.cluster.doctor.machine import gpu_count
from qlora_dist.cluster.doctor.wanted import Wanted
from qlora_dist.cluster.network import free_port
from qlora_dist.coordinate.host import this_host

Facts = dict[str, Any]
# What one rank waits for another, times this, is more than all its stages may take where something hangs.
STAGES = 5
# Imports from a busy network filesystem.
LEAST_S = 45.0


def examine_machine(wanted: Wanted, limit_s: float) -> list[Facts]:
    """The facts of this machine alone: a rank for each GPU, two where there is none and the run has several workers."""
    ranks = ranks_here(wanted) or min(2, wanted.workers or 2)
    host, port = "127.0.0.1", free_port()
    return run_ranks(
        [
            settings_of(wanted, limit_s, rank, ranks, rank, this_host(), (host, port), spread=False)
            for rank in range(ranks)
        ]
    )


def ranks_here(wanted: Wanted) -> int:
    """How many GPUs of this machine are examined."""
    return 0 if wanted.device == "cpu" else gpu_count()


def total_s(limit_s: float) -> float:
    """Seconds after which a rank is ended."""
    return max(LEAST_S, STAGES * limit_s)


def settings_of(
    wanted: Wanted, limit_s: float, rank: int, world_size: int, local_rank: int, node: str, meeting: tuple[str, int],
    spread: bool,
) -> Facts:  # fmt: skip
    """What `doctor.rank` reads.

    Args:
        node: names the machine in the table.
        meeting: host and port where rank 0 serves the store.
        spread: whether the ranks are on several machines.
    """
    return {
        "wanted": asdict(wanted), "limit_s": limit_s, "total_s": total_s(limit_s), "rank": rank,
        "world_size": world_size, "local_rank": local_rank, "node": node, "host": meeting[0], "port": meeting[1],
        "spread": spread,
    }  # fmt: skip


def run_ranks(settings: Sequence[Facts]) -> list[Facts]:
    """Run ranks of this machine to their end, or to that of their time.

    Returns:
        Of each rank: rank, local_rank, node, what it told, and `stuck` (the stage that it did not get out of) with
        `why` where it did not come to its end.
    """
    with ThreadPoolExecutor(len(settings)) as pool:
        return list(pool.map(_run_rank, settings))


def _run_rank(settings: Facts) -> Facts:
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_dist.cluster.doctor.rank"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    why = None
    try:
        out, errors = process.communicate(json.dumps(settings), timeout=settings["total_s"])
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        why = f"it was ended after {settings['total_s']:.0f} s"
    except BaseException:
        process.kill()
        raise
    facts: Facts = {name: settings[name] for name in ("rank", "local_rank", "node")}
    for line in out.splitlines():
        facts |= json.loads(line)
    begun, probe = facts.pop("begun", "start"), facts.pop("probe", None)
    if why is None and process.returncode != 0:
        why = _death(process.returncode, errors)
    if why is not None and begun == "folder" and probe is not None:
        why = f"{why}; it leaves {probe} there, to be removed"
    return facts if why is None else {**facts, "stuck": begun, "why": why}


def _death(code: int, errors: str) -> str:
    last = errors.strip().splitlines()[-1:] or [""]
    if code < 0:
        return f"it died of {signal.Signals(-code).name}"
    return f"it ended with exit code {code}: {last[0][:160]}"
