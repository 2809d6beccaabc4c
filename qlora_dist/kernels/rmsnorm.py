"""RMSNorm with the residual add before it, and its backward; the arithmetic of transformers' LlamaRMSNorm.

M: rows (tokens)  H: features normalised over; the per-head variants have [M, heads, H].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_dist.kernels.launch import compute_dtype

if TYPE_CHECKING:
    pass


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
    _reference(x_MH, weight_H, eps, out_MH, rstd_M, residual_MH, sum_MH)


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
    _backward_reference(dout_MH, x_MH, weight_H, rstd_M, dresidual_MH, out_MH)


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
