"""The weighted sum of adapters' products, brought back to one rank; the full matrix is never formed.

Shape suffixes: N outputs of the adapted linear layer, K its inputs, r the rank of one adapter, R all ranks together,
c the smaller core (at most R), q the rank asked for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Factors(NamedTuple):
    """One adapter's part in one layer: its update of the weight is `scale * b_Nr @ a_rK`, as in PEFT."""

    a_rK: Tensor
    b_Nr: Tensor
    scale: float


class Projection(NamedTuple):
    """What `mean_of_products` gives.

    `lost` is ||M - M_q|| / ||M|| in the Frobenius norm, 0 where M is 0. `norm` is ||M||.
    """

    a_qK: Tensor
    b_Nq: Tensor
    lost: float
    norm: float


def mean_of_products(
    factors: Sequence[Factors],
    weights: Sequence[float],
    rank: int,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Projection:
    """The best approximation of rank `rank` of M = sum_i weights[i] * scale_i * B_i A_i, as factors again.

    With Q_b R_b = [w_1 s_1 B_1, w_2 s_2 B_2, ...] and Q_a R_a = [A_1; A_2; ...]^T, M = Q_b (R_b R_a^T) Q_a^T, so the
    singular values of the small core are those of M (Eckart and Young: cutting them off is the nearest matrix of that
    rank). Costs O((N + K) R^2 + R^3) operations and O((N + K) R) memory, against O(N K min(N, K)) for the dense SVD.

    The singular values are split evenly: with M_q = U S V^T, B = U sqrt(S / |scale|) and A = sqrt(S / |scale|) V^T
    (B negative where `scale` is), so scale * B A = M_q. A direction whose singular value is 0 (below the rounding of
    `dtype`) keeps its unit row in A and has 0 in B: the product is unchanged and it still gets a gradient, as a new
    LoRA does. Where R is less than `rank`, the missing rows and columns are 0. The sign of each direction is the one
    that makes the largest entry of its column of U positive.

    Args:
        factors: at least one, all of the same N and K and on one device; ranks and scales may differ.
        weights: one for each of `factors`; they are taken as given, so for a mean they have to sum to 1.
        rank: q, the rank of the result.
        scale: what the layer that takes the result multiplies B A with (PEFT: lora_alpha / r).
        dtype: what is computed in, and the result's; float32 or float64.

    Raises:
        ValueError: no factors, another number of weights, a rank below 1, a scale of 0, or shapes that do not fit.
    """
    if not factors or len(factors) != len(weights) or rank < 1 or scale == 0:
        raise ValueError(
            "factors, one weight for each of them, a rank of at least 1 and a scale other than 0 are needed"
        )
    num_outputs, num_inputs = factors[0].b_Nr.shape[0], factors[0].a_rK.shape[1]
    for a_rK, b_Nr, _ in factors:
        if a_rK.shape[1] != num_inputs or b_Nr.shape != (num_outputs, a_rK.shape[0]):
            raise ValueError(f"{tuple(b_Nr.shape)} @ {tuple(a_rK.shape)} is not {num_outputs} x {num_inputs}")
    b_NR = torch.cat([b_Nr.to(dtype) * (w * s) for (_, b_Nr, s), w in zip(factors, weights, strict=True)], dim=1)
    a_KR = torch.cat([a_rK.to(dtype) for a_rK, _, _ in factors]).T
    basis_Nc, b_cR = torch.linalg.qr(b_NR)
    basis_Kc, a_cR = torch.linalg.qr(a_KR)
    left_cc, values_c, right_cc = torch.linalg.svd(b_cR @ a_cR.T, full_matrices=False)
    kept = min(rank, len(values_c))
    u_Nq, v_qK, values_q = basis_Nc @ left_cc[:, :kept], right_cc[:kept] @ basis_Kc.T, values_c[:kept]
    norm, cut = float(values_c.norm()), float(values_c[kept:].norm())
    return Projection(*split_evenly(u_Nq, values_q, v_qK, rank, scale), cut / norm if norm else 0.0, norm)


def split_evenly(u_Nq: Tensor, values_q: Tensor, v_qK: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (`rank` x K) and B (N x `rank`) with scale * B A = U diag(values) V, split as `mean_of_products` says.

    Args:
        u_Nq: orthonormal columns; their largest entries give the signs.
        values_q: not negative, the largest first; at most `rank` of them.
        v_qK: orthonormal rows.
        rank: of the result; what is missing is 0.
        scale: not 0.
    """
    signs_q = torch.sign(u_Nq.gather(0, u_Nq.abs().argmax(0, keepdim=True))[0])
    root_q = (values_q / abs(scale)).sqrt()
    nothing_q = values_q <= torch.finfo(values_q.dtype).eps * max(u_Nq.shape[0], v_qK.shape[1]) * values_q[0]
    a_qK = (signs_q * torch.where(nothing_q, 1.0, root_q))[:, None] * v_qK
    b_Nq = u_Nq * (signs_q * torch.where(nothing_q, 0.0, root_q)) * (1.0 if scale > 0 else -1.0)
    missing = rank - len(values_q)
    return nn.functional.pad(a_qK, (0, 0, 0, missing)), nn.functional.pad(b_Nq, (0, missing))
