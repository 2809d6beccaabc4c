"""What islands send, and the arithmetic on it: means, medians, clipping, noise.

A change is what an island's training did to the adapter of its round: PEFT's names -> float32 tensors.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Contribution:
    """What one island adds to a round.

    Attributes:
        change: since the adapter it started from, trained parameters only.
        tokens: loss-bearing tokens that it was trained on: its weight.
        base: fingerprint of the frozen base model (`model.weights.base_fingerprint`).
        round: whose adapter it started from.
        scale: what its change is multiplied by; below 1 where it is late.
        lease: of its packs (`coordinate.rounds`), which tells two contributions of one island apart.
    """

    island: str
    change: Mapping[str, Tensor]
    tokens: int
    base: str
    round: int
    scale: float = 1.0
    lease: int = 0


def change_of(adapter: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensors:
    """`adapter` minus `start`, in float32, where `adapter` is; the names of `adapter`."""
    return {
        name: tensor.detach().float() - start[name].detach().to(tensor.device).float()
        for name, tensor in adapter.items()
    }


def apply_change(adapter: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> Tensors:
    """`adapter` plus `change`, added in float32, in the adapter's dtypes; names without a change stay as they are."""
    return {
        name: (tensor.float() + change[name].to(tensor.device)).to(tensor.dtype) if name in change else tensor
        for name, tensor in adapter.items()
    }


def rebase(now: Mapping[str, Tensor], sent: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> Tensors:
    """Take up a round's result that arrives while the next round is under way (overlapped exchange).

    An island went on from `sent`, the adapter whose change it contributed, and stands at `now` when `received`, the
    aggregated adapter, comes. What it has trained meanwhile is carried over: received + (now - sent). Its next
    contribution is the change since `received`, so these steps are counted in it, once.
    """
    return apply_change(received, change_of(now, sent))


def frozen_names(names: Iterable[str], factor: Literal["A", "B"]) -> set[str]:
    """The names of one LoRA factor, to be neither trained nor exchanged.

    With A the same everywhere and frozen the mean of the factors is the mean of the products (FFA-LoRA, Sun et al.
    2024, arXiv:2403.12313), and a message has half the size or less.
    """
    return {name for name in names if f".lora_{factor}." in name or f".lora_embedding_{factor}" in name}


def norm_of(change: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all tensors together, in float64; not finite where an element is not."""
    return sum(float(tensor.double().square().sum()) for tensor in change.values()) ** 0.5


def in_order(contributions: Iterable[Contribution]) -> list[Contribution]:
    """In an order that does not depend on who came first, so that sums are the same bit for bit."""
    return sorted(contributions, key=lambda one: (one.island, one.round, one.lease))


def shares(contributions: Sequence[Contribution]) -> list[float]:
    """Each contribution's share of all trained tokens.

    Raises:
        ValueError: there are none, or one has no tokens.
    """
    if not contributions or min(one.tokens for one in contributions) < 1:
        raise ValueError("contributions with at least one token each are needed")
    total = sum(one.tokens for one in contributions)
    return [one.tokens / total for one in contributions]


def weighted_mean(contributions: Sequence[Contribution]) -> Tensors:
    """sum_i (tokens_i / sum_j tokens_j) * scale_i * change_i, summed in float64.

    A late contribution keeps its weight and loses length, so it moves the adapter less also where it is alone.
    """
    parts = list(zip(contributions, shares(contributions), strict=True))
    return {
        name: sum((one.change[name].double() * (share * one.scale) for one, share in parts), torch.tensor(0.0)).float()
        for name in contributions[0].change
    }


def coordinate_median(contributions: Sequence[Contribution]) -> Tensors:
    """The median of the changes, element by element; the mean of the two in the middle of an even number.

    Up to half of the contributions may be anything (Yin et al. 2018, arXiv:1803.01498). Unweighted: the number of
    tokens is what an island says of itself.
    """
    return _of_sorted(contributions, lambda count: (count - 1) // 2)


def trimmed_mean(contributions: Sequence[Contribution], trim: float) -> Tensors:
    """The mean without the floor(trim * N) smallest and as many largest values, element by element, unweighted.

    Tolerates so many contributions that may be anything (Yin et al. 2018, arXiv:1803.01498).

    Raises:
        ValueError: `trim` is not in [0, 0.5).
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"the share left out at each end is at least 0 and below 0.5, not {trim}")
    return _of_sorted(contributions, lambda count: int(trim * count))


def _of_sorted(contributions: Sequence[Contribution], left_out: Callable[[int], int]) -> Tensors:
    shares(contributions)
    cut = left_out(len(contributions))
    result = {}
    for name in contributions[0].change:
        values = torch.stack([one.change[name].double() * one.scale for one in contributions]).sort(0).values
        result[name] = values[cut : len(contributions) - cut].mean(0).float()
    return result


def clipped(contribution: Contribution, most: float) -> Contribution:
    """The contribution with its change's norm brought down to `most` where it is larger."""
    norm = norm_of(contribution.change)
    if norm <= most:
        return contribution
    change = {name: tensor * (most / norm) for name, tensor in contribution.change.items()}
    return Contribution(**{**vars(contribution), "change": change})


def add_noise(change: Mapping[str, Tensor], deviation: float, seed: int, round: int) -> Tensors:
    """The change plus Gaussian noise of that standard deviation in each element.

    It follows from (seed, round), so a round that is done again after a crash comes out the same. Whoever knows the
    seed can take it off again: it regularises, it is no privacy.
    """
    digest = hashlib.sha256(f"noise {seed} {round}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return {
        name: change[name] + deviation * torch.randn(change[name].shape, generator=generator) for name in sorted(change)
    }
