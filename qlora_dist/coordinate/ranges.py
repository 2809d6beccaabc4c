"""Arithmetic on half-open ranges [start, end) of the global order of packs. Pure, no torch."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Range = tuple[int, int]


class Piece(NamedTuple):
    """Packs [start, end), and how many leases they had so far."""

    start: int
    end: int
    leases: int = 0


def as_pieces(values: Iterable[Sequence[int]]) -> list[Piece]:
    """Pieces from JSON, in order."""
    return sorted(Piece(*value) for value in values)


def as_ranges(values: Iterable[Sequence[int]]) -> list[Range]:
    """Ranges from JSON or pieces, in order, neighbours put together.

    Raises:
        ValueError: a range is empty or negative, or two overlap.
    """
    merged: list[Range] = []
    for start, end in sorted((int(value[0]), int(value[1])) for value in values):
        if not 0 <= start < end or (merged and start < merged[-1][1]):
            raise ValueError(f"[{start}, {end}) is empty or overlaps another range")
        if merged and start == merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def count(ranges: Iterable[Sequence[int]]) -> int:
    """How many packs ranges or pieces hold, none of which overlap."""
    return sum(value[1] - value[0] for value in ranges)


def split(pieces: Iterable[Piece], ranges: Iterable[Sequence[int]]) -> tuple[list[Piece], list[Piece]]:
    """What of `pieces` lies inside `ranges`, and what outside; both in order."""
    inside, outside = [], list(pieces)
    for low, high, *_ in ranges:
        rest: list[Piece] = []
        for piece in outside:
            start, end = max(piece.start, low), min(piece.end, high)
            if start >= end:
                rest.append(piece)
                continue
            inside.append(Piece(start, end, piece.leases))
            rest += [part for part in (piece._replace(end=start), piece._replace(start=end)) if part.start < part.end]
        outside = rest
    return sorted(inside), sorted(outside)


def first(pieces: Iterable[Piece], packs: int) -> list[Piece]:
    """The first `packs` packs of pieces in order, or all where there are fewer."""
    taken: list[Piece] = []
    for piece in pieces:
        if packs <= 0:
            break
        taken.append(piece._replace(end=min(piece.end, piece.start + packs)))
        packs -= taken[-1].end - taken[-1].start
    return taken
