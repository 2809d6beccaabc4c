"""What the ranks of the current generation last said: the half of the coordinator's state that is not kept."""

from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_dist.coordinate.stragglers import Stragglers

Phase = Literal["compute", "collective", "checkpoint", "setup"]
PHASES = ("compute", "collective", "checkpoint", "setup")
# Workers are to send a heartbeat about this often (seconds).
HEARTBEAT_S = 1.0


@dataclass
class Heard:
    """Last heartbeats of one generation. Times are seconds of the coordinator's monotonic clock.

    Attributes:
        members: one {rank, host, pid} a rank.
        since: when the generation started; a rank not heard of yet counts from here.
        last: rank -> its last heartbeat's fields.
        times: rank -> when that came.
        first_step: (time, step) of the first heartbeat with a step, to tell the pace from.
        stragglers: who keeps the others waiting.
    """

    generation: int | None = None
    members: list[dict[str, Any]] = field(default_factory=list)
    since: float = 0.0
    last: dict[int, dict[str, Any]] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)
    first_step: tuple[float, int] | None = None
    stragglers: Stragglers = field(default_factory=Stragglers)

    def __post_init__(self) -> None:
        self.stragglers.members = self.members

    def take(self, rank: int, now: float, fields: dict[str, Any]) -> list[dict[str, Any]]:
        """Take in one heartbeat; a metric that it does not bring keeps its last value.

        Returns:
            What it changes about stragglers; see `Stragglers.take`.
        """
        counts = fields.pop("busy", None)
        self.last[rank] = {**self.last.get(rank, {}), **fields}
        self.times[rank] = now
        if self.first_step is None and fields["step"] is not None:
            self.first_step = (now, fields["step"])
        return [] if counts is None else self.stragglers.take(rank, now, counts)

    def step(self) -> int | None:
        """The furthest step that a rank told."""
        return max((fields["step"] for fields in self.last.values() if fields["step"] is not None), default=None)

    def seconds_left(self, now: float) -> float | None:
        """Seconds to `max_steps` at the generation's pace so far; a rank's own `seconds_left` goes first."""
        for rank in sorted(self.last):
            if self.last[rank].get("seconds_left") is not None:
                return float(self.last[rank]["seconds_left"])
        max_steps = next((f["max_steps"] for f in self.last.values() if f.get("max_steps") is not None), None)
        step = self.step()
        if max_steps is None or step is None or self.first_step is None or step <= self.first_step[1]:
            return None
        return (max_steps - step) * (now - self.first_step[0]) / (step - self.first_step[1])

    def all_silent(self, now: float, timeout_s: float) -> bool:
        """Whether not one rank was heard of: then it is the coordinator that was away."""
        return bool(self.members) and all(
            now - self.times.get(member["rank"], self.since) >= _silence_s(timeout_s) for member in self.members
        )

    def missing(self, now: float, timeout_s: float) -> list[dict[str, Any]]:
        """The ranks that keep the others waiting; see `Coordinator.who_is_missing`."""
        ages = {member["rank"]: now - self.times.get(member["rank"], self.since) for member in self.members}
        silent = {rank for rank, age in ages.items() if age >= _silence_s(timeout_s)}
        if silent and len(silent) < len(self.members):
            return [self._name(m, "silent", ages[m["rank"]]) for m in self.members if m["rank"] in silent]
        waiting = {rank for rank, fields in self.last.items() if fields["phase"] == "collective"}
        late = [member for member in self.members if member["rank"] not in waiting]
        if waiting and not silent:
            if late:
                return [self._name(m, "late", ages[m["rank"]]) for m in late]
            furthest = self.step()
            behind = [m for m in self.members if self.last[m["rank"]]["step"] != furthest]
            return [self._name(m, "behind", ages[m["rank"]]) for m in behind]
        return []

    def _name(self, member: dict[str, Any], reason: str, age_s: float) -> dict[str, Any]:
        fields = self.last.get(member["rank"], {})
        step, phase = fields.get("step"), fields.get("phase", "setup")
        who = f"rank {member['rank']} (host {member['host']}, pid {member['pid']})"
        last_step = f"its last step was {step}" if step is not None else "it has not told of a step yet"
        if reason == "silent":
            sentence = f"{who} has not been heard of for {age_s:.0f} s, {last_step}"
        elif reason == "late":
            seconds = fields.get("seconds_in_phase", 0.0) + age_s
            sentence = f"{who} has been in {phase} for {seconds:.0f} s while others wait for it, {last_step}"
        else:
            sentence = f"{who} waits at another step than the others, {last_step}"
        return {**member, "step": step, "phase": phase, "reason": reason, "sentence": sentence}


def _silence_s(timeout_s: float) -> float:
    # A rank that stopped just after the others began to wait was silent for a little less than they waited.
    return max(1.5 * HEARTBEAT_S, timeout_s / 2)


def describe(missing: list[dict[str, Any]]) -> str:
    """One sentence that names the ranks of `Coordinator.who_is_missing`."""
    if not missing:
        return "every rank is heard of and none is late: look at the network between them"
    return "; ".join(entry["sentence"] for entry in missing)
