"""One step of the outer loop: an adapter and the islands' contributions in, the next adapter out.

A step changes nothing in place: what a coordinator that was killed before the commit had computed is computed again,
bit for bit, from the committed adapter and state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qlora_dist.aggregate.aligned import factor_pairs, mean_product
from qlora_dist.aggregate.changes import (
    Contribution,
    Tensors,
    add_noise,
    apply_change,
    clipped,
    coordinate_median,
    in_order,
    norm_of,
    shares,
    trimmed_mean,
    weighted_mean,
)

MOMENTUM = "momentum."
# So many rounds' norms are kept, to know an outlier by where a round has too few islands.
ROUNDS_OF_NORMS = 8


@dataclass(frozen=True)
class OuterSettings:
    """How contributions become a step.

    Attributes:
        method: `mean`: the mean change is added. `diloco`: it is the gradient of SGD with Nesterov momentum. `svd`:
            the mean of the islands' products B A, brought back to rank r; other parameters by their mean.
        outer_learning_rate, outer_momentum: of `diloco`.
        robust: what stands for the mean: itself, the median or the trimmed mean of each element.
        trim: share left out at each end by `trimmed`.
        clip_norm: each contribution's norm is brought down to this first; 0 leaves them as they are.
        noise: standard deviation of Gaussian noise, in units of clip_norm * the largest share of a contribution: the
            most that one contribution can move the mean (McMahan et al. 2018, arXiv:1710.06963).
        seed: of the noise.
    """

    method: Literal["mean", "diloco", "svd"] = "diloco"
    outer_learning_rate: float = 0.7
    outer_momentum: float = 0.5
    robust: Literal["none", "median", "trimmed"] = "none"
    trim: float = 0.25
    clip_norm: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method == "svd" and (self.robust != "none" or self.noise):
            raise ValueError("svd is an exact mean: it goes with neither robust nor noise")
        if self.noise and (not self.clip_norm or self.robust != "none"):
            raise ValueError("noise is measured in units of clip_norm and of a mean: it needs clip_norm, and no robust")
        if min(self.outer_learning_rate, self.outer_momentum, self.clip_norm, self.noise) < 0:
            raise ValueError(f"rates, norms and noise are at least 0: {self}")


@dataclass(frozen=True)
class OuterState:
    """What the outer loop keeps between rounds.

    Attributes:
        round: steps done: the version of the adapter.
        momentum: of `diloco`: float32, the adapter's names; empty before the first step.
        norms: of the contributions counted in the last rounds, one list a round.
    """

    round: int = 0
    momentum: Tensors = field(default_factory=dict)
    norms: tuple[tuple[float, ...], ...] = ()

    def state_dict(self) -> Tensors:
        """As tensors that safetensors holds."""
        return {
            "round": torch.tensor(self.round),
            "norms": torch.tensor([norm for norms in self.norms for norm in norms], dtype=torch.float64),
            "norms_a_round": torch.tensor([len(norms) for norms in self.norms], dtype=torch.int64),
            **{MOMENTUM + name: tensor for name, tensor in self.momentum.items()},
        }

    @classmethod
    def load_state_dict(cls, tensors: Mapping[str, Tensor]) -> "OuterState":
        """The state that `state_dict` gave.

        Raises:
            KeyError: it is not whole.
        """
        left, norms = tensors["norms"].tolist(), []
        for count in tensors["norms_a_round"].tolist():
            norms.append(tuple(left[:count]))
            left = left[count:]
        momentum = {name.removeprefix(MOMENTUM): t for name, t in tensors.items() if name.startswith(MOMENTUM)}
        return cls(int(tensors["round"]), momentum, tuple(norms))

    def known_norms(self) -> list[float]:
        """The norms of the contributions of the last rounds, for `safety.refuse`."""
        return [norm for norms in self.norms for norm in norms]


class Outcome(NamedTuple):
    """What a step gives.

    adapter: the next adapter, the names and dtypes of the one before.
    state: the next outer state.
    reset: parameters whose inner optimizer moments islands set to zero; those of all others stay.
    lost: `svd`: module -> ||M - M_r|| / ||M|| of the mean product M and its approximation of rank r.
    """

    adapter: Tensors
    state: OuterState
    reset: list[str]
    lost: dict[str, float]


def outer_step(
    settings: OuterSettings, state: OuterState, adapter: Mapping[str, Tensor], contributions: Sequence[Contribution]
) -> Outcome:
    """The adapter after one more round.

    With D = mean (median, trimmed mean) of the changes and theta the adapter:

    mean:    theta' = theta + D
    diloco:  g = -D;  b' = mu b + g (b = 0 before the first round);  theta' = theta - lr (g + mu b')
             (Douillard et al. 2023, arXiv:2311.08105; the update of torch.optim.SGD(nesterov=True), lr constant)
    svd:     B' A' = the best approximation of rank r of sum_i w_i (B + dB_i)(A + dA_i); see `aligned`

    Inner optimizer moments stay with each island under `mean` and `diloco`, as in DiLoCo. Under `svd` they stay, too:
    the factors are given in the coordinates that the moments belong to; `reset` names those of modules where that was
    not possible, and there momenta and second moments start from zero.

    Args:
        adapter: of version `state.round`; what has no change stays as it is.
        contributions: checked (`safety.refuse`), all with the same names; their order does not matter.

    Raises:
        ValueError: no contributions, one without tokens, or names that differ.
    """
    ordered = in_order(contributions)
    weights = shares(ordered)
    names = set(ordered[0].change)
    if any(set(one.change) != names for one in ordered) or not names <= set(adapter):
        raise ValueError("contributions name the same parameters, all of them the adapter's")
    norms = tuple(norm_of(one.change) for one in ordered)
    if settings.clip_norm:
        ordered = [clipped(one, settings.clip_norm) for one in ordered]
    mean = _mean(settings, ordered)
    if settings.noise:
        mean = add_noise(mean, settings.noise * settings.clip_norm * max(weights), settings.seed, state.round)
    momentum, reset, lost = state.momentum, [], {}
    if settings.method == "diloco":
        mean, momentum = _nesterov(settings, momentum, mean)
    following = apply_change(adapter, mean)
    if settings.method == "svd":
        for name_a, name_b in factor_pairs(sorted(names)):
            islands = [
                tuple(adapter[n].double() + one.scale * one.change[n].double() for n in (name_a, name_b))
                for one in ordered
            ]
            found = mean_product([(a_rK, b_Nr) for a_rK, b_Nr in islands], weights)
            following[name_a] = found.a_rK.to(adapter[name_a].dtype)
            following[name_b] = found.b_Nr.to(adapter[name_b].dtype)
            lost[name_a.split(".lora_A.")[0]] = found.lost
            reset += [] if found.near else [name_a, name_b]
    kept = (*state.norms, norms)[-ROUNDS_OF_NORMS:]
    return Outcome(following, OuterState(state.round + 1, momentum, kept), reset, lost)


def _mean(settings: OuterSettings, contributions: Sequence[Contribution]) -> Tensors:
    match settings.robust:
        case "median":
            return coordinate_median(contributions)
        case "trimmed":
            return trimmed_mean(contributions, settings.trim)
        case _:
            return weighted_mean(contributions)


def _nesterov(settings: OuterSettings, momentum: Tensors, mean: Tensors) -> tuple[Tensors, Tensors]:
    """The change of the adapter, and the next momentum; see `outer_step`."""
    change, buffers = {}, {}
    for name, tensor in mean.items():
        gradient = -tensor
        buffer = gradient if name not in momentum else settings.outer_momentum * momentum[name] + gradient
        change[name] = -settings.outer_learning_rate * (gradient + settings.outer_momentum * buffer)
        buffers[name] = buffer
    return change, buffers
