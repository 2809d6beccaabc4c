"""A step of the run's largest size before its first: what it takes of the device, and how long; no trace is left."""

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qlora_dist.model.block import Block
from qlora_dist.model.host_store import settle_all
from qlora_dist.shard.strategy import Strategy
from qlora_dist.train.largest import Largest
from qlora_dist.train.leaner_plan import OutOfRoom, keeping, throw_away_gradients


@dataclass(frozen=True)
class Seen:
    """Of one run: the most bytes allocated, and seconds by the GPU's clock."""

    peak: float
    seconds: float


TOO_MUCH = Seen(float("inf"), float("inf"))


@dataclass(frozen=True)
class Rehearsal:
    """A step of the run's largest size, without its update.

    run: forwards and backwards, as many as make a difference to memory. element_size: bytes of an activation.
    alone: whether this is the only worker, whose strategy can go on after an out-of-memory error. local_workers: those
    that share the host's memory.
    """

    run: Callable[[], Tensor]
    strategy: Strategy
    device: torch.device
    largest: Largest
    element_size: int
    alone: bool
    local_workers: int = 1

    def once(self, warm: bool = False) -> Seen:
        """One run, whose gradients are thrown away.

        Args:
            warm: the allocator keeps the blocks of the run before, so that the time is that of a step.
        """
        if not warm:
            gc.collect()
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.run()
        end.record()
        throw_away_gradients(self.strategy)
        torch.cuda.synchronize(self.device)
        return Seen(torch.cuda.max_memory_allocated(self.device), start.elapsed_time(end) / 1e3)

    def once_or_too_much(self, blocks: Sequence[Block], warm: bool = False, leaner: bool = False) -> Seen:
        """As `once`; where a single worker runs out of memory, `TOO_MUCH`.

        Args:
            leaner: there is a leaner plan than one in which layers keep nothing.

        Raises:
            OutOfRoom: among several, where a leaner plan gives something up.
            torch.OutOfMemoryError: where none does.
        """
        try:
            return self.once(warm)
        except torch.OutOfMemoryError as error:
            failure = str(error)
        settle_all()
        # Only here has the error's traceback let go of its tensors. Other ranks stand in a collective by now.
        if not self.alone:
            raise (OutOfRoom if leaner or keeping(blocks) else torch.OutOfMemoryError)(failure)
        throw_away_gradients(self.strategy)
        return TOO_MUCH

    def over(self) -> None:
        """The first step finds the allocator as if there had been none."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)


@contextmanager
def timed_forwards(blocks: Sequence[Block]) -> Iterator[list[tuple[torch.cuda.Event, torch.cuda.Event]]]:
    """The begin and end of each layer's forward, on the device, as far as they come to run."""
    found: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(*_: Any) -> None:
        found.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        found[-1][0].record()

    def end(*_: Any) -> None:
        found[-1][1].record()

    hooks = [block.layer.register_forward_pre_hook(begin) for block in blocks]
    hooks += [block.layer.register_forward_hook(end) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def median_seconds(events: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    """Seconds between two events; what the first layers do once does not count."""
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def bytes_of_state_to_come(strategy: Strategy) -> int:
    """What an optimizer that makes its state at the first step will take of the GPU: two fp32 moments a weight."""
    state = strategy.optimizer.state
    trained = (p for group in strategy.optimizer.param_groups for p in group["params"])
    return sum(8 * p.numel() for p in trained if p.is_cuda and not state.get(p))


def memory_limit(device: torch.device) -> int:
    """Bytes that this process may have allocated: what it has and what is free, or its cap where that is less."""
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    return int(min(torch.cuda.memory_reserved(device) + free, allowed))


def least(number: float, device: torch.device) -> float:
    """The smallest over all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return number
    box = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(box, dist.ReduceOp.MIN)
    return float(box)
