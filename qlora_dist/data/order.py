"""The fixed global order of packs: which packs make up which optimizer step, whatever the number of workers.

An epoch is a permutation of all packs, drawn from (seed, epoch). A global batch is the next `global_batch_size`
packs of it. It never crosses the end of an epoch: the last batch of an epoch is short where the size does not divide
the number of packs, as transformers has it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Where training stands: the next pack of the global order is number `pack` of epoch `epoch`, both from 0."""

    epoch: int = 0
    pack: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Position":
        return cls(epoch=int(data["epoch"]), pack=int(data["pack"]))


@dataclass(frozen=True, slots=True)
class GlobalOrder:
    """The list of global batches, as a pure function of these four values.

    Attributes:
        num_packs: packs of the table, at least 1.
        global_batch_size: packs an optimizer step, over all workers, at least 1.
        shuffle: a new permutation each epoch; else the table's own order.
        seed: the run's seed.
    """

    num_packs: int
    global_batch_size: int
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_packs < 1 or self.global_batch_size < 1:
            raise ValueError(f"num_packs and global_batch_size must be at least 1: {self}")

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_packs / self.global_batch_size)

    def total_steps(self, num_train_epochs: float) -> int:
        """Steps of so many epochs, a part of an epoch rounded up to whole steps (transformers' max_steps)."""
        return math.ceil(num_train_epochs * self.steps_per_epoch)

    def position_at(self, step: int) -> Position:
        """The position before step `step`, counted from 0 at the start of the run."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return Position(epoch, batch * self.global_batch_size)

    def batch_at(self, position: Position) -> tuple[np.ndarray, Position]:
        """The packs (int64 [at most global_batch_size]) of the step at `position`, and the position after it.

        Raises:
            ValueError: there is no such position in this order.
        """
        if position.epoch < 0 or not 0 <= position.pack < self.num_packs:
            raise ValueError(f"{position} is outside an epoch of {self.num_packs} packs")
        end = position.pack + self.global_batch_size
        packs = self._epoch(position.epoch)[position.pack : end]
        following = Position(position.epoch, end) if end < self.num_packs else Position(position.epoch + 1, 0)
        return packs, following

    def packs_at(self, absolute: np.ndarray) -> np.ndarray:
        """The packs (int64) at absolute positions, epoch * num_packs + pack, of the order without end."""
        epochs, places = np.divmod(absolute, self.num_packs)
        packs = np.empty(len(absolute), dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            packs[chosen] = self._epoch(int(epoch))[places[chosen]]
        return packs

    def _epoch(self, epoch: int) -> np.ndarray:
        return _permutation(self.num_packs, self.seed, epoch) if self.shuffle else _identity(self.num_packs)


@dataclass(frozen=True)
class LeasedOrder:
    """Ranges of the global order that one island trains; its batches are cut from them, whatever lies between.

    Attributes:
        order: the order of the whole run; its `global_batch_size` is this island's.
        absolute: positions in it, ascending (int64).
        islands: how many share an epoch.
    """

    order: GlobalOrder
    absolute: np.ndarray
    islands: int = 1

    @classmethod
    def of(cls, order: GlobalOrder, ranges: Sequence[Sequence[int]], islands: int) -> "LeasedOrder":
        """The order of a lease's half-open ranges."""
        parts = [np.arange(start, end) for start, end in ranges]
        return cls(order, np.concatenate(parts) if parts else np.empty(0, dtype=np.int64), islands)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an island for its share of an epoch."""
        return math.ceil(self.order.num_packs / (self.order.global_batch_size * self.islands))

    @property
    def num_steps(self) -> int:
        """Steps of the whole lease."""
        return math.ceil(len(self.absolute) / self.order.global_batch_size)

    @property
    def start(self) -> Position:
        """The first pack's position."""
        return self._position(0)

    def batch_at(self, position: Position) -> tuple[np.ndarray, Position]:
        """The packs of the step at `position`, and the position after it; see `GlobalOrder.batch_at`."""
        begin = int(np.searchsorted(self.absolute, position.epoch * self.order.num_packs + position.pack))
        end = begin + self.order.global_batch_size
        return self.order.packs_at(self.absolute[begin:end]), self._position(end)

    def _position(self, place: int) -> Position:
        absolute = int(self.absolute[place]) if place < len(self.absolute) else int(self.absolute[-1]) + 1
        return Position(*divmod(absolute, self.order.num_packs))


def micro_batches(
    packs: Sequence[int] | np.ndarray, per_device_train_batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """The micro-batches of a global batch that fall to `rank`; an empty list stands for one of zero weight.

    The global batch is cut into runs of `per_device_train_batch_size` packs before ranks come into it, so a
    micro-batch is the same whoever computes it. Number i goes to rank i % world_size. Every rank gets the same
    number; where the world size does not divide it, the last ranks get an empty one.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    size = per_device_train_batch_size
    cut = [[int(pack) for pack in packs[start : start + size]] for start in range(0, len(packs), size)]
    mine = cut[rank::world_size]
    return mine + [[] for _ in range(math.ceil(len(cut) / world_size) - len(mine))]


@lru_cache(maxsize=4)
def _permutation(num_packs: int, seed: int, epoch: int) -> np.ndarray:
    # argsort of raw bits, since numpy keeps a bit generator's stream over versions but not `permutation`.
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_packs)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order


@lru_cache(maxsize=4)
def _identity(num_packs: int) -> np.ndarray:
    order = np.arange(num_packs)
    order.flags.writeable = False
    return order
