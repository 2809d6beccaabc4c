"""RMSNorm with the residual add before it, and its backward; the arithmetic of transformers' LlamaRMSNorm.

M: rows (tokens)  H: features normalised over; the per-head variants have [M, heads, H].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_dist.kernels.launch import Kernel, compute_dtype, power_of_two_from, runs_on_triton

if TYPE_CHECKING:
    import triton.language as tl


def rms_norm(
    x_MH: Tensor,
    weight_H: Tensor,
    eps: float,
    out_MH: Tensor,
    rstd_M: Tensor,
    residual_MH: Tensor | None = None,
    sum_MH: Tensor | None = None,
) -> None:
    """out = weight * round(h * rstd), rstd = 1 / sqrt(mean(h^2) + eps), h = x, or round(x + residual) kept in `sum_MH`.

    All but `weight_H` and `rstd_M` (float32, contiguous, one a row) are views [M, H], or [M, heads, H] for a norm a
    head, each with strides of its own and the last dimension contiguous. `sum_MH` may be `x_MH` or `residual_MH`, and
    `out_MH` may be `x_MH` where nothing needs x later. round() is to h's dtype. float64 in, float64 out.
    """
    if (residual_MH is None) != (sum_MH is None):
        raise ValueError("a residual comes with the buffer that the sum goes to, and the buffer with a residual")
    if not runs_on_triton(x_MH):
        _reference(x_MH, weight_H, eps, out_MH, rstd_M, residual_MH, sum_MH)
        return
    features = x_MH.shape[-1]
    rows, block, warps = _shape(features)
    residual = x_MH if residual_MH is None else residual_MH
    total = x_MH if sum_MH is None else sum_MH
    _forward[(-(-rstd_M.numel() // rows),)](
        x_MH, residual, weight_H, out_MH, total, rstd_M, eps, rstd_M.numel(),
        *_strides(x_MH), *_strides(residual), *_strides(out_MH), *_strides(total),
        H=features, HEADS=_heads(x_MH), ROWS=rows, BLOCK=block, RESIDUAL=residual_MH is not None, num_warps=warps,
    )  # fmt: skip


def rms_norm_backward(
    dout_MH: Tensor,
    x_MH: Tensor,
    weight_H: Tensor,
    rstd_M: Tensor,
    dresidual_MH: Tensor | None,
    out_MH: Tensor,
) -> None:
    """out = d loss / d h (+ dresidual) from dout = d loss / d (weight * h * rstd), for a frozen weight.

    `x_MH` is what was normalised: with a residual the kept sum. g = dout * weight, n = h * rstd:
    out = rstd * (g - n * mean(g * n)) + dresidual. Views as in `rms_norm`; `out_MH` may be `dout_MH` or `dresidual_MH`.
    """
    if not runs_on_triton(x_MH):
        _backward_reference(dout_MH, x_MH, weight_H, rstd_M, dresidual_MH, out_MH)
        return
    features = x_MH.shape[-1]
    rows, block, warps = _shape(features)
    dresidual = dout_MH if dresidual_MH is None else dresidual_MH
    _backward[(-(-rstd_M.numel() // rows),)](
        dout_MH, x_MH, weight_H, rstd_M, dresidual, out_MH, rstd_M.numel(),
        *_strides(dout_MH), *_strides(x_MH), *_strides(dresidual), *_strides(out_MH),
        H=features, HEADS=_heads(x_MH), ROWS=rows, BLOCK=block, RESIDUAL=dresidual_MH is not None, num_warps=warps,
    )  # fmt: skip


def _reference(
    x_MH: Tensor,
    weight_H: Tensor,
    eps: float,
    out_MH: Tensor,
    rstd_M: Tensor,
    residual_MH: Tensor | None,
    sum_MH: Tensor | None,
) -> None:
    dtype = compute_dtype(x_MH)
    if residual_MH is not None and sum_MH is not None:
        sum_MH.copy_(x_MH.to(dtype) + residual_MH.to(dtype))
        x_MH = sum_MH
    h = x_MH.to(dtype)
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    rstd_M.copy_(rstd.view_as(rstd_M))
    out_MH.copy_((h * rstd).to(x_MH.dtype).to(dtype) * weight_H.to(dtype))


def _backward_reference(
    dout_MH: Tensor, x_MH: Tensor, weight_H: Tensor, rstd_M: Tensor, dresidual_MH: Tensor | None, out_MH: Tensor
) -> None:
    dtype = compute_dtype(x_MH)
    rstd = rstd_M.to(dtype).view(*x_MH.shape[:-1], 1)
    g = dout_MH.to(dtype) * weight_H.to(dtype)
    n = x_MH.to(dtype) * rstd
    dx = (g - n * (g * n).mean(-1, keepdim=True)) * rstd
    out_MH.copy_(dx if dresidual_MH is None else dx + dresidual_MH.to(dtype))


def _shape(features: int) -> tuple[int, int, int]:
    """Rows a program, their padded length, warps: a row a program from 2,048 features on, 16 values a thread."""
    block = power_of_two_from(features)
    rows = max(2048 // block, 1)
    return rows, block, min(max(rows * block // 512, 4), 16)


def _heads(x_MH: Tensor) -> int:
    return x_MH.shape[1] if x_MH.dim() == 3 else 1


def _strides(x_MH: Tensor) -> tuple[int, int]:
    """Elements from token to token and from head to head."""
    return x_MH.stride(0), x_MH.stride(1) if x_MH.dim() == 3 else 0


@Kernel
def _forward(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    rstd: tl.tensor,
    eps: tl.tensor,
    rows_total: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    residual_token: tl.tensor,
    residual_head: tl.tensor,
    out_token: tl.tensor,
    out_head: tl.tensor,
    total_token: tl.tensor,
    total_head: tl.tensor,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // HEADS).to(tl.int64)[:, None], (row % HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows_total)[:, None] & (column < H)
    h = tl.load(x + token * x_token + head * x_head + column, mask=mask, other=0.0)
    if RESIDUAL:
        added = tl.load(residual + token * residual_token + head * residual_head + column, mask=mask, other=0.0)
        h = (h.to(tl.float32) + added.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + token * total_token + head * total_head + column, h, mask=mask)
    h32 = h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(h32 * h32, axis=1) / H + eps)
    tl.store(rstd + row, scale, mask=row < rows_total)
    normalised = (h32 * scale[:, None]).to(h.dtype).to(tl.float32)
    w = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
    y = (normalised * w).to(out.dtype.element_ty)
    tl.store(out + token * out_token + head * out_head + column, y, mask=mask)


@Kernel
def _backward(
    dout: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    rstd: tl.tensor,
    dresidual: tl.tensor,
    out: tl.tensor,
    rows_total: tl.tensor,
    dout_token: tl.tensor,
    dout_head: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    dresidual_token: tl.tensor,
    dresidual_head: tl.tensor,
    out_token: tl.tensor,
    out_head: tl.tensor,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = (row // HEADS).to(tl.int64)[:, None], (row % HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows_total)[:, None] & (column < H)
    dy = tl.load(dout + token * dout_token + head * dout_head + column, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(x + token * x_token + head * x_head + column, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        added = tl.load(dresidual + token * dresidual_token + head * dresidual_head + column, mask=mask, other=0.0)
    scale = tl.load(rstd + row, mask=row < rows_total, other=0.0)[:, None]
    g = dy * tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
    n = h * scale
    dx = (g - n * (tl.sum(g * n, axis=1) / H)[:, None]) * scale
    if RESIDUAL:
        dx += added.to(tl.float32)
    tl.store(out + token * out_token + head * out_head + column, dx.to(out.dtype.element_ty), mask=mask)
