"""What a GEMM without a bias, a residual or a LoRA branch of its own still lacks, in one pass over its output.

M: tokens  N: outputs  P: padded total rank
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_dist.kernels.launch import Kernel, compute_dtype, power_of_two_from, runs_on_triton

if TYPE_CHECKING:
    import triton.language as tl

ROWS, COLUMNS, LARGEST_RANK_BLOCK = 128, 128, 64


def add_low_rank_(
    y_MN: Tensor, p_MP: Tensor, b_NP: Tensor, bias_N: Tensor | None = None, residual_MN: Tensor | None = None
) -> Tensor:
    """y += p b' [+ bias] [+ residual], added up in fp32 and rounded once; any strides of `b_NP`, else any row strides.

    Where `p_MP` has no columns only the others are added.
    """
    if not runs_on_triton(y_MN):
        dtype = compute_dtype(y_MN)
        summed = y_MN.to(dtype) + p_MP.to(dtype) @ b_NP.to(dtype).t()
        for added in (bias_N, residual_MN):
            if added is not None:
                summed += added
        return y_MN.copy_(summed)
    (tokens, outputs), rank = y_MN.shape, p_MP.shape[1]
    bias = y_MN if bias_N is None else bias_N
    residual = y_MN if residual_MN is None else residual_MN
    _add[(-(-tokens // ROWS) * -(-outputs // COLUMNS),)](
        y_MN, p_MP, b_NP, bias, residual, tokens, outputs, y_MN.stride(0), p_MP.stride(0), b_NP.stride(0),
        b_NP.stride(1), residual.stride(0),
        P=rank, BIASED=bias_N is not None, RESIDUAL=residual_MN is not None, ROWS=ROWS, COLUMNS=COLUMNS,
        RANKS=max(16, min(LARGEST_RANK_BLOCK, power_of_two_from(rank))),
        EXACT="ieee" if p_MP.dtype == torch.float32 else "tf32", num_warps=8,
    )  # fmt: skip
    return y_MN


@Kernel
def _add(
    y: tl.tensor,
    p: tl.tensor,
    b: tl.tensor,
    bias: tl.tensor,
    residual: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    y_stride: tl.tensor,
    p_stride: tl.tensor,
    b_stride_n: tl.tensor,
    b_stride_p: tl.tensor,
    residual_stride: tl.tensor,
    P: tl.constexpr,
    BIASED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    tiles = tl.cdiv(outputs, COLUMNS)
    m = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANKS)
    mask = (m < tokens)[:, None] & (n < outputs)[None, :]
    summed = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, P, RANKS):
        at = first + rank
        p_tile = tl.load(
            p + m[:, None] * p_stride + at[None, :], mask=(m < tokens)[:, None] & (at < P)[None, :], other=0.0
        )
        b_at = n.to(tl.int64)[None, :] * b_stride_n + at.to(tl.int64)[:, None] * b_stride_p
        b_tile = tl.load(b + b_at, mask=(at < P)[:, None] & (n < outputs)[None, :], other=0.0)
        summed = tl.dot(p_tile, b_tile, summed, input_precision=EXACT)
    target = y + m[:, None] * y_stride + n[None, :]
    summed += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        summed += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        summed += tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(target, summed.to(y.dtype.element_ty), mask=mask)
