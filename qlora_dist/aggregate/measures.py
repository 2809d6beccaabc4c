"""What the report says of an exchange: bytes against data-parallel training, and how far islands have gone apart."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def ring_all_reduce_bytes(gradient_bytes: int, workers: int) -> float:
    """What one worker sends in a ring all-reduce: 2 (N - 1) / N times the buffer; it receives as much.

    Each of N workers passes N - 1 parts of 1 / N on while sums are formed, and as many while they are spread (Patarasuk
    and Yuan 2009).
    """
    return 2 * (workers - 1) / workers * gradient_bytes


@dataclass(frozen=True)
class Traffic:
    """What an island has moved, against what one of as many DDP workers would have moved for the same steps.

    Attributes:
        sent, received: the island's bytes, headers included.
        parameters: elements that train.
        gradient_dtype: what DDP would sum gradients in.
        workers: islands, that is DDP workers in their place.
        steps: optimizer steps that the island took.
    """

    sent: int
    received: int
    parameters: int
    gradient_dtype: torch.dtype
    workers: int
    steps: int

    @property
    def ddp_sent(self) -> float:
        """Bytes that a DDP worker would have sent, and received once more as many."""
        return self.steps * ring_all_reduce_bytes(self.parameters * self.gradient_dtype.itemsize, self.workers)

    def report(self) -> dict[str, str | int | float]:
        """For metrics and report.

        `times_fewer` compares the island's bytes in both directions with those that DDP sends, which is half of what it
        moves: the stricter count. `times_fewer_both_ways` counts both directions on both sides.
        """
        moved = self.sent + self.received
        return {
            "bytes_sent": self.sent,
            "bytes_received": self.received,
            "ddp_bytes_sent": self.ddp_sent,
            "ddp_gradient_dtype": str(self.gradient_dtype).removeprefix("torch."),
            "times_fewer": self.ddp_sent / moved if moved else math.inf,
            "times_fewer_both_ways": 2 * self.ddp_sent / moved if moved else math.inf,
        }


class Divergence(NamedTuple):
    """How far islands have gone apart in a round, over all pairs of them.

    distance: mean of ||a - b|| / ((||a|| + ||b||) / 2): 0 for the same change, sqrt(2) for orthogonal ones of one
        length, 2 for opposite ones.
    cosine: mean cosine of the angle between two changes; that with a change of 0 is taken as 0.
    """

    distance: float
    cosine: float


def divergence(changes: Sequence[Mapping[str, Tensor]]) -> Divergence | None:
    """The divergence of changes since one adapter, in float64; None for fewer than two."""
    if len(changes) < 2:
        return None
    gram = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for name in changes[0]:
        flat = torch.stack([change[name].double().reshape(-1) for change in changes])
        gram += flat @ flat.T
    pairs = list(itertools.combinations(range(len(changes)), 2))
    return Divergence(_mean(_distance(gram, i, j) for i, j in pairs), _mean(_cosine(gram, i, j) for i, j in pairs))


def _distance(gram: Tensor, i: int, j: int) -> float:
    lengths = float(gram[i, i].sqrt() + gram[j, j].sqrt()) / 2
    apart = float((gram[i, i] + gram[j, j] - 2 * gram[i, j]).clamp(min=0).sqrt())
    return apart / lengths if lengths else 0.0


def _cosine(gram: Tensor, i: int, j: int) -> float:
    product = float((gram[i, i] * gram[j, j]).sqrt())
    return float(gram[i, j]) / product if product else 0.0


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
