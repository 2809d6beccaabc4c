"""SwiGLU, h = silu(gate) * up, and its backward, which makes h anew instead of having kept it.

M: tokens  F: features of the MLP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_dist.kernels.launch import Kernel, compute_dtype, runs_on_triton

if TYPE_CHECKING:
    import triton.language as tl

# 8 values a thread: 16-byte accesses in bf16.
WARPS = 4
BLOCK = 8 * 32 * WARPS


def swiglu(gate_MF: Tensor, up_MF: Tensor, out_MF: Tensor) -> None:
    """out = gate * sigmoid(gate) * up, rounded once; views with any row stride (gate and up of one buffer)."""
    if not runs_on_triton(gate_MF):
        _reference(gate_MF, up_MF, out_MF)
        return
    tokens, features = gate_MF.shape
    _forward[(tokens * -(-features // BLOCK),)](
        gate_MF, up_MF, out_MF, features, gate_MF.stride(0), up_MF.stride(0), out_MF.stride(0),
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def swiglu_backward(
    dh_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, dgate_MF: Tensor, dup_MF: Tensor, h_MF: Tensor | None = None
) -> None:
    """d loss / d gate and d loss / d up from dh = d loss / d h, and h itself into `h_MF` where given.

    With s = sigmoid(gate): dgate = dh * up * s * (1 + gate * (1 - s)), dup = dh * gate * s. Views as in `swiglu`; an
    output may be one of the inputs.
    """
    if not runs_on_triton(gate_MF):
        _backward_reference(dh_MF, gate_MF, up_MF, dgate_MF, dup_MF, h_MF)
        return
    tokens, features = gate_MF.shape
    h = dh_MF if h_MF is None else h_MF
    _backward[(tokens * -(-features // BLOCK),)](
        dh_MF, gate_MF, up_MF, dgate_MF, dup_MF, h, features,
        dh_MF.stride(0), gate_MF.stride(0), up_MF.stride(0), dgate_MF.stride(0), dup_MF.stride(0), h.stride(0),
        BLOCK=BLOCK, KEEP=h_MF is not None, num_warps=WARPS,
    )  # fmt: skip


def _reference(gate_MF: Tensor, up_MF: Tensor, out_MF: Tensor) -> None:
    dtype = compute_dtype(gate_MF)
    g, u = gate_MF.to(dtype), up_MF.to(dtype)
    out_MF.copy_(g * torch.sigmoid(g) * u)


def _backward_reference(
    dh_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, dgate_MF: Tensor, dup_MF: Tensor, h_MF: Tensor | None
) -> None:
    dtype = compute_dtype(gate_MF)
    dh, g, u = dh_MF.to(dtype), gate_MF.to(dtype), up_MF.to(dtype)
    s = torch.sigmoid(g)
    dgate, dup, h = dh * u * s * (1 + g * (1 - s)), dh * g * s, g * s * u
    dgate_MF.copy_(dgate)
    dup_MF.copy_(dup)
    if h_MF is not None:
        h_MF.copy_(h)


@Kernel
def _forward(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    features: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    out_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    # One grid dimension: the second holds 65,535 programs at most, fewer than a batch may have tokens.
    blocks = tl.cdiv(features, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < features
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    h = g * tl.sigmoid(g) * u
    tl.store(out + row * out_stride + column, h.to(out.dtype.element_ty), mask=mask)


@Kernel
def _backward(
    dh: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    dgate: tl.tensor,
    dup: tl.tensor,
    h: tl.tensor,
    features: tl.tensor,
    dh_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    dgate_stride: tl.tensor,
    dup_stride: tl.tensor,
    h_stride: tl.tensor,
    BLOCK: tl.constexpr,
    KEEP: tl.constexpr,
) -> None:
    blocks = tl.cdiv(features, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < features
    d = tl.load(dh + row * dh_stride + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    dg = d * u * (s * (1.0 + g * (1.0 - s)))
    tl.store(dgate + row * dgate_stride + column, dg.to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + row * dup_stride + column, (d * silu).to(dup.dtype.element_ty), mask=mask)
    if KEEP:
        tl.store(h + row * h_stride + column, (silu * u).to(h.dtype.element_ty), mask=mask)
