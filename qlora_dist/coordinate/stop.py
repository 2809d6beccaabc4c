"""Asking a run to stop, from anywhere that reaches its run folder.

The request is an event in the log, taken under its lock: the coordinator reads it before it answers the next heartbeat,
wherever it is hosted, so that neither its address nor its token is needed.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.decisions import Decisions
from qlora_dist.coordinate.report import read_status

OVER = ("finished", "stopped", "failed")
LOCK_TIMEOUT_S = 30.0
# A launcher decides within this whether a failed worker group is started again.
RESTART_S = 15.0


def ask_to_stop(run_dir: Path, reason: str) -> dict[str, Any]:
    """Ask for a checkpoint at the next step boundary and the run's end after it; asking twice does no harm.

    A run that is starting, or starting again, stops after its first step.

    Returns:
        The status before.

    Raises:
        UserError: there is no run in this folder, it is over, or nobody is there to hear of it.
    """
    status = read_status(run_dir)
    last = status["last_checkpoint"]
    if status["state"] in OVER:
        raise UserError("run-is-over", run_dir=run_dir, state=status["state"], checkpoint=_named(last))
    if status["silent"] and status["state"] == "running":
        raise UserError("run-not-heard-of", run_dir=run_dir, seconds=status["age_s"], checkpoint=_named(last))
    ask_at_once(run_dir, reason)
    return status


def ask_at_once(run_dir: Path, reason: str) -> None:
    """`ask_to_stop` for whoever knows that the run has started and is there.

    Raises:
        UserError: it is over, or the event log cannot be written.
    """
    decisions = Decisions(run_dir, LOCK_TIMEOUT_S)
    with decisions.deciding() as run:
        # It may have ended while the lock was waited for.
        if run.finished is not None:
            raise UserError("run-is-over", run_dir=run_dir, state=run.state(), checkpoint=_named(run.last_committed()))
        if run.stop is None:
            decisions.decide("stop", reason=reason)


def until_over(run_dir: Path, poll_s: float = 0.5) -> Iterator[dict[str, Any]]:
    """The status again and again until the run is over or silent; the last one tells which."""
    while True:
        status = read_status(run_dir)
        yield status
        if is_over(status):
            return
        time.sleep(poll_s)


def is_over(status: dict[str, Any]) -> bool:
    """Whether nothing more is to come of this job: it ended, failed for good, or was probably killed."""
    if status["state"] == "failed":
        return bool(status["age_s"] > RESTART_S)
    return bool(status["state"] in OVER or (status["silent"] and status["state"] == "running"))


def _named(checkpoint: dict[str, Any] | None) -> str:
    return "none" if checkpoint is None else str(checkpoint["folder"])
