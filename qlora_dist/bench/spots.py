"""Points of the plane of memory and speed."""

from collections.abc import Sequence
from dataclasses import dataclass

OURS = "qlora-dist"


@dataclass(frozen=True)
class Spot:
    """One point of the plane: who it is, what tells it from its series' others, memory and speed."""

    series: str
    label: str
    gib: float
    tokens_per_second: float


def frontier(spots: Sequence[Spot]) -> list[Spot]:
    """The spots that no other one beats or equals with no more memory, by memory."""
    best: list[Spot] = []
    for spot in sorted(spots, key=lambda spot: (spot.gib, -spot.tokens_per_second)):
        if not best or spot.tokens_per_second > best[-1].tokens_per_second:
            best.append(spot)
    return best
