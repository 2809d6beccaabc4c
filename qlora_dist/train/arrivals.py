"""What the device says of a step, for the host to read when it is there: the host never waits for the step it is in."""

from typing import Generic, TypeVar

import torch
from torch import Tensor

Known = TypeVar("Known")


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
        self.under_way: list[tuple[Known, Tensor, torch.cuda.Event | None]] = []

    def send(self, known: Known, values_N: Tensor) -> None:
        """Start the copy of `values_N`; the copy is from now on, and so may the tensor be."""
        if not self.on_cuda:
            self.under_way.append((known, values_N, None))
            return
        home_N = torch.empty(values_N.shape, dtype=values_N.dtype, pin_memory=True)
        home_N.copy_(values_N, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.under_way.append((known, home_N, event))

    def take(self, everything: bool = False) -> list[tuple[Known, list[float]]]:
        """Those that are due, oldest first, or everything, which waits for the device."""
        count = len(self.under_way) if everything else max(0, len(self.under_way) - self.late)
        due, self.under_way = self.under_way[:count], self.under_way[count:]
        taken = []
        for known, values_N, event in due:
            if event is not None:
                event.synchronize()
            taken.append((known, values_N.tolist()))
        return taken
