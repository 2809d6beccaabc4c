"""Which methods there are after training, what they take, and what they make of one layer.

An adapter's update of a layer is s_i B_i A_i. On `updates` a method combines these and projects the result to one
rank, so ranks and scales may differ; on `factors` it combines the A's and, apart from them, the B's, each with the
square root of its scale, so a layer's ranks have to be equal. With weights w_i and adapters i:

method            on        result                                              PEFT's add_weighted_adapter
mean              factors   (sum w_i sqrt(s_i) B_i) (sum w_i sqrt(s_i) A_i)     none (`linear` takes sqrt(w_i s_i))
svd               updates   sum w_i s_i B_i A_i, projected by a thin SVD        svd
task-arithmetic   updates   the same                                            svd
                  factors   (sum sqrt(w_i s_i) B_i) (sum sqrt(w_i s_i) A_i)     linear
ties              both      trim, elect signs, disjoint merge                   ties_svd, ties; with the majority
                                                                                sign `none` magnitude_prune(_svd)
dare              both      drop at random and rescale, sum                     dare_linear_svd, dare_linear; with a
                                                                                majority sign dare_ties_svd, dare_ties
della             both      drop by magnitude and rescale, elect, merge         none
cat               updates   sum w_i s_i B_i A_i, exactly: rank is the sum       cat

mean and svd are means: their weights are divided by their sum. The others take them as given. Negative weights on
factors put the sign on A, as in PEFT. Sources: Ilharco et al. 2022 (arXiv:2212.04089) for task arithmetic, Yadav et
al. 2023 (2306.01708) for TIES, Yu et al. 2023 (2311.03099) for DARE, Deep et al. 2024 (2406.11617) for DELLA.

Shape suffixes: N outputs of the adapted layer, K its inputs, r the rank of one adapter, q that of the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from qlora_dist.aggregate.products import Factors, Projection, mean_of_products
from qlora_dist.aggregate.sparse import (
    MajoritySign,
    Rows,
    added,
    dropped,
    dropped_by_magnitude,
    generator_of,
    projected,
    trim_threshold,
    trimmed,
)
from qlora_dist.config.errors import UserError

Method = Literal["mean", "svd", "task-arithmetic", "ties", "dare", "della", "cat"]
Space = Literal["updates", "factors"]
MEANS = ("mean", "svd")
# Of a weight's magnitude. Far below where squares of norms leave float64's range.
MOST = 1e9
SPARSE = ("ties", "dare", "della")
SPACES: dict[str, tuple[Space, ...]] = {"mean": ("factors",), "svd": ("updates",), "cat": ("updates",)}
MAJORITY_SIGNS: dict[str, MajoritySign] = {"ties": "total", "dare": "none", "della": "total"}


@dataclass(frozen=True)
class Recipe:
    """A method and all that it needs, from `recipe`.

    weights: as they are used, one for each adapter.
    rank: of the result where the method projects; None is the largest of the adapters'.
    density: share of the entries that stay.
    epsilon: by how much the probabilities of staying differ between a row's smallest and largest entry (della).
    """

    method: Method
    weights: tuple[float, ...]
    on: Space
    rank: int | None
    density: float
    epsilon: float
    majority_sign: MajoritySign
    seed: int


def recipe(
    method: str,
    num_adapters: int,
    weights: Sequence[float] | None = None,
    *,
    on: str | None = None,
    rank: int | None = None,
    density: float | None = None,
    epsilon: float | None = None,
    majority_sign: str | None = None,
    seed: int | None = None,
) -> Recipe:
    """Check what a person chose and fill in the rest.

    Args:
        weights: where None, 1 / num_adapters for mean, svd and cat, else 1.
        on: where None, `updates` but for mean.
        density: where None, 0.5.
        epsilon: where None, 0.1.
        majority_sign: where None, `total` for ties and della, `none` for dare.

    Raises:
        UserError: a value is out of range or has no meaning for this method.
    """
    if method not in get_args(Method):
        raise UserError("aggregate-method-unknown", method=method, known=", ".join(get_args(Method)))
    spaces = SPACES.get(method, ("updates", "factors"))
    space = spaces[0] if on is None else on
    if space not in spaces:
        raise UserError("aggregate-option-without-use", option=f"--on {space}", method=method)
    drawn = method in ("dare", "della")
    for option, value, used in (
        ("--rank", rank, space == "updates" and method != "cat"),
        ("--density", density, method in SPARSE),
        ("--epsilon", epsilon, method == "della"),
        ("--majority-sign", majority_sign, method in SPARSE),
        ("--seed", seed, drawn),
    ):
        if value is not None and not used:
            told = method if method in SPACES else f"{method} on {space}"
            raise UserError("aggregate-option-without-use", option=option, method=told)
    if rank is not None and rank < 1:
        raise UserError("aggregate-value", option="--rank", value=rank, wanted="a rank of at least 1")
    density, epsilon = 0.5 if density is None else density, 0.1 if epsilon is None else epsilon
    if not 0 < density <= 1:
        raise UserError("aggregate-value", option="--density", value=density, wanted="a share above 0 and up to 1")
    if method == "della" and density < 1 and not 0 <= epsilon < 2 * min(density, 1 - density):
        wanted = f"0 or more, and less than {2 * min(density, 1 - density):g} (density +- epsilon / 2 is from 0 to 1)"
        raise UserError("aggregate-value", option="--epsilon", value=epsilon, wanted=wanted)
    sign = MAJORITY_SIGNS.get(method, "none") if majority_sign is None else majority_sign
    if sign not in get_args(MajoritySign):
        raise UserError("aggregate-value", option="--majority-sign", value=sign, wanted="total, frequency or none")
    return Recipe(
        method, _weights(method, num_adapters, weights), space, rank, density, epsilon, sign, seed or 0  # type: ignore[arg-type]
    )  # fmt: skip


def _weights(method: str, num_adapters: int, given: Sequence[float] | None) -> tuple[float, ...]:
    if given is None:
        return ((1 / num_adapters) if method in (*MEANS, "cat") else 1.0,) * num_adapters
    if len(given) != num_adapters:
        raise UserError("aggregate-weights-number", weights=len(given), adapters=num_adapters)
    if not all(abs(weight) <= MOST for weight in given) or not any(given):
        wanted = f"numbers from {-MOST:g} to {MOST:g}, not all of them 0"
        raise UserError("aggregate-value", option="--weights", value=_told(given), wanted=wanted)
    if method not in MEANS:
        return tuple(given)
    if min(given) < 0:
        raise UserError("aggregate-mean-negative", method=method, weights=_told(given))
    return tuple(weight / sum(given) for weight in given)


def _told(weights: Sequence[float]) -> str:
    return ",".join(f"{weight:g}" for weight in weights)


def combine_layer(recipe: Recipe, layer: str, factors: Sequence[Factors | None], rank: int) -> Projection:
    """What the recipe makes of one layer: factors of scale 1 and rank `rank`.

    `lost` is what the projection cut off (0 on factors and for cat), `norm` that of what was projected, of the
    result on factors.

    Args:
        layer: its name; with the seed and the adapter's place it decides what is drawn.
        factors: of all adapters; None where one does not have this layer, which is an update of 0.
        rank: at least the number of rows that the method gives; missing ones are 0.
    """
    present = [(i, f, recipe.weights[i]) for i, f in enumerate(factors) if f is not None]
    some, weights = [f for _, f, _ in present], [weight for *_, weight in present]
    if recipe.on == "factors":
        return _on_factors(recipe, layer, present, rank)
    if recipe.method == "cat":
        a_qK = torch.cat([f.a_rK * (weight * f.scale) for _, f, weight in present])
        b_Nq = torch.cat([f.b_Nr for f in some], dim=1)
        return _padded(a_qK, b_Nq, rank)
    if recipe.method not in SPARSE:
        return mean_of_products(some, weights, rank)
    num_outputs = some[0].b_Nr.shape[0]
    updates = [_sparsely(recipe, (layer, i, "update"), partial(_update, f), num_outputs) for i, f, _ in present]
    combined_NK = added(updates, weights, recipe.majority_sign, num_outputs)
    if not bool(torch.isfinite(combined_NK).all()):
        raise UserError("aggregate-result-not-finite", name=layer)
    return projected(combined_NK, rank, generator_of(recipe.seed, layer, "sketch"))


def _update(factors: Factors, begin: int, end: int) -> Tensor:
    return factors.b_Nr[begin:end] @ factors.a_rK * factors.scale


def _rows(tensor: Tensor, begin: int, end: int) -> Tensor:
    return tensor[begin:end]


def _on_factors(recipe: Recipe, layer: str, present: Sequence[tuple[int, Factors, float]], rank: int) -> Projection:
    if recipe.method == "mean":
        roots = [weight * math.sqrt(abs(f.scale)) for _, f, weight in present]
    else:
        roots = [math.sqrt(abs(weight * f.scale)) for _, f, weight in present]
    signed = [root * (-1 if weight * f.scale < 0 else 1) for root, (_, f, weight) in zip(roots, present, strict=True)]
    factors = []
    for part, multipliers in (("a_rK", signed), ("b_Nr", roots)):
        tensors: list[Tensor] = [getattr(f, part) for _, f, _ in present]
        num_rows = tensors[0].shape[0]
        rows = [
            _sparsely(recipe, (layer, i, part[0]), partial(_rows, tensor), num_rows)
            for (i, *_), tensor in zip(present, tensors, strict=True)
        ]
        factors.append(added(rows, multipliers, recipe.majority_sign, num_rows))
    return _padded(factors[0], factors[1], rank)


def _sparsely(recipe: Recipe, name: tuple[object, ...], rows: Rows, num_rows: int) -> Rows:
    """`rows`, pruned as the recipe says; what is drawn depends on the seed and `name` alone."""
    if recipe.method not in SPARSE or recipe.density == 1:
        return rows
    threshold = trim_threshold(rows(0, num_rows), recipe.density) if recipe.method == "ties" else 0.0

    def pruned(begin: int, end: int) -> Tensor:
        if recipe.method == "ties":
            return trimmed(rows(begin, end), threshold)
        generator = generator_of(recipe.seed, *name, begin)
        if recipe.method == "dare":
            return dropped(rows(begin, end), recipe.density, generator)
        return dropped_by_magnitude(rows(begin, end), recipe.density, recipe.epsilon, generator)

    return pruned


def _padded(a_rK: Tensor, b_Nr: Tensor, rank: int) -> Projection:
    missing = rank - a_rK.shape[0]
    a_qK, b_Nq = torch.nn.functional.pad(a_rK, (0, 0, 0, missing)), torch.nn.functional.pad(b_Nr, (0, missing))
    # ||B A||^2 is the sum of (B^T B) * (A A^T), which needs no N x K matrix.
    b_qq, a_qq = b_Nr.double().T @ b_Nr.double(), a_rK.double() @ a_rK.double().T
    return Projection(a_qK, b_Nq, 0.0, math.sqrt(max(0.0, float((b_qq * a_qq).sum()))))
