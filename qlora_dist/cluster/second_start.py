"""Two starts of one run: the second is refused while the first lives, and the first is told where one gets through."""

import os
import time
from pathlib import Path
from typing import Any

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.heard import HEARTBEAT_S
from qlora_dist.coordinate.host import this_host
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.rundir import EVENTS_FILE, RUN_FILE

# A few heartbeats, each of which may show in the status file a second later.
WATCH_S = 4 * HEARTBEAT_S


def refuse_second_start(run_dir: Path) -> None:
    """Refuse to start a run whose ranks are heard of.

    Returns at once where the run has ended, was silent for longer, or its ranks are dead processes of this host;
    else it watches for a heartbeat, since a run that was killed a moment ago looks alive.

    Raises:
        UserError: a rank lives, or the run.json is damaged.
    """
    if not all((run_dir / name).is_file() for name in (RUN_FILE, EVENTS_FILE)):
        return  # a new run, or one that `open_run` says what is wrong with
    first = read_status(run_dir)
    if first["state"] != "running" or first["age_s"] > WATCH_S or not any(map(_may_live, _processes(first))):
        return
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = read_status(run_dir)
        if now["state"] != "running":
            return
        if now["time"] > first["time"]:
            raise UserError("run-already-alive", run_dir=run_dir, who=starter(run_dir))


def starter(run_dir: Path) -> str:
    """Host and process of rank 0 of the run's current attempt, as HOST:PID."""
    processes = _processes(read_status(run_dir))
    return ", ".join(f"{rank['host']}:{rank['pid']}" for rank in processes if rank["rank"] == 0)


def _processes(status: dict[str, Any]) -> list[dict[str, Any]]:
    """The ranks; of a run of islands its coordinator."""
    return status["ranks"] or [status[name] for name in ("coordinator",) if name in status]


def _may_live(rank: dict[str, Any]) -> bool:
    if rank["host"] != this_host():
        return True
    try:
        os.kill(rank["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
