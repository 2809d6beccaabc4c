"""What the event log says: the durable half of the coordinator's state. Pure, no files, no clock."""

import re
from dataclasses import dataclass, field
from typing import Any

from qlora_dist.coordinate.log import Event
from qlora_dist.coordinate.rounds import ROUND_DECISIONS, Rounds

# Events that carry decisions; `Coordinator.note` may not write them.
DECISIONS = frozenset(
    {
        "opened",
        "job",
        "joining",
        "generation",
        "committed",
        "removed",
        "refused",
        "failed",
        "restart",
        "resize",
        "held",
        "resize_off",
        "stop",
        "finished",
        "islands_begun",
    }
    | ROUND_DECISIONS
)


@dataclass
class Run:
    """The state after the events applied so far.

    Attributes:
        generation: number of the current attempt; None before the first.
        attempts: attempt id -> generation, of all attempts that became one.
        joining: attempt ids that began to join after the current generation started, in order.
        dead: attempt ids that began to join before another attempt became the current generation.
        members: of the current generation: one {rank, host, pid} a rank.
        committed: folder names of commits that were not removed -> their events.
        commits: how many there were in all.
        failures: of the current generation, in order.
        restarts: decisions on restarting since the job started, in order.
    resize, held: a planned resize that is not done yet, and where all ranks hold still for it; see `resize.py`.
    out_of_memory: generations that ended so since the job started.
    resizes: planned resizes done since the job started, in order: {generation, step, reason, time}.
        started_generation: generation number when the job started, 0 where it is the first.
    session: the launcher of this job, where it starts workers again by itself.
    begun: what islands begin with, of a run that has some; `rounds` is where they stand.
    refusals: contributions that were refused, in order: {island, lease, reason, time}.
    """

    generation: int | None = None
    attempt: str | None = None
    attempts: dict[str, int] = field(default_factory=dict)
    joining: list[str] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    members: list[dict[str, Any]] = field(default_factory=list)
    generation_time: float | None = None
    committed: dict[str, Event] = field(default_factory=dict)
    commits: int = 0
    failures: list[Event] = field(default_factory=list)
    restarts: list[Event] = field(default_factory=list)
    resize: Event | None = None
    held: Event | None = None
    resizes: list[dict[str, Any]] = field(default_factory=list)
    out_of_memory: int = 0
    stop: Event | None = None
    finished: Event | None = None
    started_generation: int = 0
    session: str | None = None
    last_time: float | None = None
    begun: Event | None = None
    rounds: Rounds = field(default_factory=Rounds)
    refusals: list[dict[str, Any]] = field(default_factory=list)

    def apply(self, event: Event) -> None:
        """Take in one event. Kinds that are not known are passed over: they are notes."""
        self.last_time = event.get("time", self.last_time)
        self.rounds.apply(event)
        match event["kind"]:
            case "islands_begun":
                self.begun = event
            case "contribution_refused":
                self.refusals.append({key: event[key] for key in ("island", "lease", "reason", "time")})
            case "round_committed":
                self.refusals += [{**entry, "time": event["time"]} for entry in event["refused"]]
            case "job":
                self.started_generation = event["started_generation"]
                self.session = event.get("session")
                self.restarts = []
                self.resizes = []
                self.out_of_memory = 0
                self.resize = self.held = None
                self.failures = []
                self.stop = None
                self.finished = None
            case "joining":
                self.joining.append(event["attempt"])
            case "generation":
                self.generation = event["generation"]
                self.attempt = event["attempt"]
                self.attempts[event["attempt"]] = event["generation"]
                self.members = event["members"]
                self.generation_time = event["time"]
                self.dead.update(attempt for attempt in self.joining if attempt != event["attempt"])
                self.joining = []
                if self.resize is not None and self.held is not None:
                    done = {"generation": self.held["generation"], "step": self.held["step"], "time": event["time"]}
                    self.resizes.append(done | {"reason": self.resize["reason"]})
                self.resize = self.held = None
                self.failures = []
                # A stop that was asked for while workers started (again) still holds.
                self.finished = None
            case "committed":
                self.commits += event["folder"] not in self.committed
                self.committed[event["folder"]] = event
            case "removed":
                for folder in event["folders"]:
                    self.committed.pop(folder, None)
            case "failed":
                told = any(failure["failure"] == "memory" for failure in self.failures)
                self.out_of_memory += event["failure"] == "memory" and not told
                self.failures.append(event)
            case "restart":
                self.restarts.append(event)
                self.resize = self.held = None
            case "resize":
                self.resize, self.held = event, None
            case "held":
                self.held = event
            case "resize_off":
                self.resize = self.held = None
            case "stop":
                self.stop = event
                self.resize = self.held = None
            case "finished":
                self.finished = event
                self.resize = self.held = None

    def failure(self) -> Event | None:
        """The failure that tells best why the current generation ended: a user error, full memory, else the first."""
        by_kind = {kind: [e for e in self.failures if e["failure"] == kind] for kind in ("user", "memory")}
        return next(iter(by_kind["user"] or by_kind["memory"] or self.failures), None)

    def last_committed(self) -> Event | None:
        """The commit event of the newest (generation, step)."""
        return max(self.committed.values(), key=lambda event: (event["generation"], event["step"]), default=None)

    def state(self) -> str:
        """One of starting, running, finished, failed, stopped."""
        if self.finished is not None:
            # A stop that comes when everything is trained has stopped nothing.
            complete = self.finished["summary"].get("complete", False)
            return "stopped" if self.stop is not None and not complete else "finished"
        restarting = bool(self.restarts) and self.restarts[-1]["generation"] == self.generation
        if restarting:
            return "starting" if self.restarts[-1]["restart"] else "failed"
        if self.failures:
            return "failed"
        if self.held is not None:
            return "starting"
        if self.begun is not None:
            return "running"
        if self.generation is None or self.generation <= self.started_generation:
            return "starting"
        return "running"


def normalise(message: str) -> str:
    """A failure's message without what differs from one occurrence to the next: numbers, addresses, spacing."""
    message = re.sub(r"0x[0-9a-fA-F]+", "#", message[:4000])
    return " ".join(re.sub(r"\d+(\.\d+)?", "#", message).lower().split())
