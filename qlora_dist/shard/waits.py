"""How much of a rank's steps passes in collectives: what is left is its own, and tells who keeps the others waiting.

On a CPU a rank waits where the host does, in a call that blocks. On a GPU the host runs ahead and it is the stream that
stands still: a CUDA event before and one after each place where it waits for a collective, and the time between the
two, read when both have passed anyway, so that the host waits for nothing. That is an approximation: what such a place
does beside waiting (copies of what was gathered, and the transfer itself where no computation hides it) counts as
waiting, on all ranks alike. Under ZeRO, a bucket of gradients that is full before the end of the backward is summed at
once by DeepSpeed, and waiting for that counts as computation.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import torch

# On a GPU a step is measured if the last one was so long ago: events cost the host about a microsecond each.
EVERY_S = 2.0


class Busy(NamedTuple):
    """What the measured steps of an attempt came to so far: seconds outside collectives, steps, positions computed."""

    seconds: float = 0.0
    steps: int = 0
    positions: int = 0

    def plus(self, seconds: float, positions: int) -> "Busy":
        """With one more step."""
        return Busy(self.seconds + max(0.0, seconds), self.steps + 1, self.positions + positions)


@dataclass
class TimedStep:
    """A step on the GPU's stream: where it begins and ends, and each stretch of waiting in it."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    stretches: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    positions: int = 0

    def busy_s(self) -> float:
        """Seconds outside collectives of a step that is over."""
        waited = sum(before.elapsed_time(after) for before, after in self.stretches)
        return (self.begin.elapsed_time(self.end) - waited) / 1000


class Waits:
    """A context manager around whatever waits for other ranks, within steps that it is told the borders of.

    Attributes:
        busy: of all measured steps that are over, for this rank alone.
    """

    def __init__(self, device: torch.device, every_s: float = EVERY_S):
        self.on_cuda, self.every_s = device.type == "cuda", every_s
        self.busy = Busy()
        self._depth = 0
        self._began = self._waiting_since = self._waited_s = 0.0
        self._step: TimedStep | None = None
        self._under_way: deque[TimedStep] = deque()
        self._last = -1e9
        self._before: torch.cuda.Event | None = None

    def begin_step(self) -> None:
        """A step begins; one that was not ended is forgotten."""
        self._began, self._waited_s = time.perf_counter(), 0.0
        self._step = None
        if self.on_cuda and self._began - self._last >= self.every_s:
            self._last = self._began
            self._step = TimedStep(_event(), torch.cuda.Event(enable_timing=True))

    def end_step(self, positions: int) -> None:
        """The step is over for this rank, which computed so many positions of its micro-batches, padding included."""
        if not self.on_cuda:
            self.busy = self.busy.plus(time.perf_counter() - self._began - self._waited_s, positions)
            return
        if self._step is not None:
            self._step.end.record()
            self._step.positions = positions
            self._under_way.append(self._step)
            self._step = None
        while self._under_way and self._under_way[0].end.query():
            step = self._under_way.popleft()
            # What was recorded on a stream that is behind has no time yet; then this step is not measured.
            if all(after.query() for _, after in step.stretches):
                self.busy = self.busy.plus(step.busy_s(), step.positions)

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        if not self.on_cuda:
            self._waiting_since = time.perf_counter()
        elif self._step is not None:
            self._before = _event()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth:
            return
        if not self.on_cuda:
            self._waited_s += time.perf_counter() - self._waiting_since
        elif self._step is not None and self._before is not None and kind is None:
            self._step.stretches.append((self._before, _event()))
        self._before = None

    def around(self, owner: Any, *names: str) -> None:
        """Make methods of `owner`, a library's, count as waiting; those that another version lacks do not."""
        for name in names:
            method = getattr(owner, name, None)
            if callable(method):
                setattr(owner, name, self.counted(method))

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, each call of which counts as waiting."""

        def counted(*arguments: Any, **options: Any) -> Any:
            with self:
                return function(*arguments, **options)

        return counted


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
