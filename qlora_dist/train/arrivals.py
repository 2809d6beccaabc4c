"""What the device says of a step, for the host to read when it is there: the host never waits for the step it is in."""

import time
from typing import Generic, TypeVar

import torch
from torch import Tensor

Known = TypeVar("Known")
# A point in time: seconds of the host's clock, or a place in the device's work.
Stamp = float | torch.cuda.Event


class Arrivals(Generic[Known]):
    """Small tensors on their way to the host, each with what the host knows of its step.

    They are taken up one step late, all ranks alike: by then the device has long been busy with the next step. What is
    on a CPU is taken up at once.

    Args:
        late: by how many steps.
    """

    def __init__(self, device: torch.device, late: int | None = None):
        self.on_cuda = device.type == "cuda"
        self.late = int(self.on_cuda) if late is None else late
        self.under_way: list[tuple[Known, Tensor, Stamp]] = []

    def now(self) -> Stamp:
        """This moment; on a GPU the one at which it has done all that it has been given so far."""
        if not self.on_cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def send(self, known: Known, values_N: Tensor) -> None:
        """Start the copy of `values_N`; the copy is from now on, and so may the tensor be."""
        if not self.on_cuda:
            self.under_way.append((known, values_N, self.now()))
            return
        home_N = torch.empty(values_N.shape, dtype=values_N.dtype, pin_memory=True)
        home_N.copy_(values_N, non_blocking=True)
        self.under_way.append((known, home_N, self.now()))

    def take(self, everything: bool = False) -> list[tuple[Known, list[float], Stamp]]:
        """Those that are due, oldest first, or everything, which waits for the device; with when each was known."""
        count = len(self.under_way) if everything else max(0, len(self.under_way) - self.late)
        due, self.under_way = self.under_way[:count], self.under_way[count:]
        taken = []
        for known, values_N, stamp in due:
            if isinstance(stamp, torch.cuda.Event):
                stamp.synchronize()
            taken.append((known, values_N.tolist(), stamp))
        return taken


def seconds_between(start: Stamp, end: Stamp) -> float:
    """Seconds from one stamp to a later one of the same device; of a GPU's, both must have been reached."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1000
    assert isinstance(start, float)
    assert isinstance(end, float)
    return end - start
