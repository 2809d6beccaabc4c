"""The exact mean of the islands' products B A, in factors that an island's optimizer can go on with.

`mean_of_products` gives the mean's best approximation of rank r with factors of its own choice; any invertible r x r
matrix between them gives the same product. Adam's moments belong to the factors' coordinates, and there is no exact way
to carry its second moment over to others. So the factors here are those of the islands' own coordinates: A is the mean
of the islands' A, projected on the rows of the product; B is what then gives the product exactly. Where all islands
agree they get their own factors back, and where they nearly do, their moments fit as they are.

Shape suffixes: N outputs of the adapted linear layer, K its inputs, r the adapter's rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_dist.aggregate.products import Factors, mean_of_products

# Beyond this relative distance from the mean of the islands' factors, coordinates are not taken for the same.
NEAR = 0.5


class Mean(NamedTuple):
    """Factors of the mean product, float32.

    near: they are in the islands' coordinates, so optimizer moments stay; else these must be reset.
    lost: ||M - M_r|| / ||M|| of the mean M and its approximation of rank r.
    """

    a_rK: Tensor
    b_Nr: Tensor
    near: bool
    lost: float


def mean_product(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> Mean:
    """The rank-r approximation of sum_i weights[i] B_i A_i, computed in float64.

    Let V be an orthonormal basis of the rows of the product, completed to r by the rows of the mean A where the product
    has a lower rank, and M = A V^T. Then A' = M V and B' = (product) V^T M^-1: B' A' is the product, and A' is A where
    the islands' A span one space. Where A' or B' is further than `NEAR` from the mean factor (M is nearly singular, or
    the islands have gone apart), the result is the balanced one of `mean_of_products`, and not `near`.

    Args:
        factors: (A [r, K], B [N, r]) of each island.
        weights: theirs, which sum to 1.
    """
    rank = factors[0][0].shape[0]
    found = mean_of_products([Factors(a_rK, b_Nr, 1.0) for a_rK, b_Nr in factors], weights, rank)
    mean_a_rK = torch.stack([w * a_rK.double() for (a_rK, _), w in zip(factors, weights, strict=True)]).sum(0)
    mean_b_Nr = torch.stack([w * b_Nr.double() for (_, b_Nr), w in zip(factors, weights, strict=True)]).sum(0)
    lengths_r = found.a_qK.norm(dim=1)
    used_r = (found.b_Nq.norm(dim=0) > 0) & (lengths_r > 0)
    rows_qK = found.a_qK[used_r] / lengths_r[used_r, None]
    product_Nr = torch.zeros_like(found.b_Nq)
    product_Nr[:, : len(rows_qK)] = found.b_Nq[:, used_r] * lengths_r[used_r]
    if len(rows_qK) < rank:
        rest_rK = mean_a_rK - (mean_a_rK @ rows_qK.T) @ rows_qK
        completion_rK = torch.linalg.svd(rest_rK, full_matrices=False).Vh
        rows_qK = torch.cat([rows_qK, completion_rK[: rank - len(rows_qK)]])
    mixing_rr = mean_a_rK @ rows_qK.T
    solved = torch.linalg.solve_ex(mixing_rr.T, product_Nr.T)
    a_rK, b_Nr = mixing_rr @ rows_qK, solved.result.T
    if int(solved.info) or not (_near(a_rK, mean_a_rK) and _near(b_Nr, mean_b_Nr)):
        return Mean(found.a_qK.float(), found.b_Nq.float(), False, found.lost)
    return Mean(a_rK.float(), b_Nr.float(), True, found.lost)


def _near(tensor: Tensor, reference: Tensor) -> bool:
    return bool((tensor - reference).norm() <= NEAR * reference.norm())


def factor_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """The names of the LoRA factors that belong together, (A, B) of each module.

    Raises:
        ValueError: a factor is without the other one.
    """
    pairs = [(name, name.replace("lora_A", "lora_B")) for name in sorted(names) if ".lora_A." in name]
    if alone := {name for name in names if ".lora_A." in name or ".lora_B." in name} - {n for p in pairs for n in p}:
        raise ValueError(f"{min(alone)} has no other factor")
    if missing := {b for _, b in pairs} - set(names):
        raise ValueError(f"{min(missing)} is missing")
    return pairs
