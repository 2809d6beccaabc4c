"""How a run ended."""

from dataclasses import dataclass
from typing import Any

from qlora_dist.coordinate.client import CoordinatorClient


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        exit_code: 0 finished, 1 failed, 2 a person must mend something, 128 + N stopped by signal N.
        message: the sentence or reason; None where there is nothing to say.
        traceback: of the rank that failed first, where one was seen.
        summary: what the workers said at the end.
        step: the last one, of a run that ended well.
    """

    exit_code: int
    message: str | None = None
    traceback: str | None = None
    summary: dict[str, Any] | None = None
    step: int | None = None


def read_outcome(client: CoordinatorClient, reason: str | None = None, traceback: str | None = None) -> Outcome:
    """How the run ended, by the coordinator's account.

    Args:
        reason: why the launcher gave up, where it did; goes before a rank's own (collateral) failure.
    """
    told = client.call("outcome")
    if told["exit_code"] == 2:
        return Outcome(2, told["message"])
    if reason is None and told["exit_code"] == 0:
        return Outcome(0, told["message"], summary=told["summary"], step=told["step"])
    nothing_said = "the workers ended without saying that the run is finished"
    return Outcome(1, reason or told["message"] or nothing_said, traceback)
