"""Rotary position embedding in place, in Llama's rotate-half convention.

M: tokens  H: heads  D: head dimension  T: rows of the table of angles
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_dist.kernels.launch import Kernel, compute_dtype, power_of_two_from, runs_on_triton

if TYPE_CHECKING:
    import triton.language as tl

WARPS = 4
# Pairs a program: 8 a thread, so that 16 bytes in bf16 are read from each half.
PAIRS = 8 * 32 * WARPS


def rotate_(x_MHD: Tensor, cos_TD: Tensor, sin_TD: Tensor, inverse: bool = False) -> Tensor:
    """x * cos + rotate_half(x) * sin, in place; row m takes row m % T of `cos_TD` and `sin_TD`. Returns `x_MHD`.

    `x_MHD` is a view with any stride between tokens and between heads, the last dimension contiguous (queries and keys
    beside each other in one buffer are one view). `cos_TD` and `sin_TD` are contiguous rows as transformers gives
    them, of any floating dtype: their two halves are equal, and only the first is read. `inverse` applies the
    transposed matrix, which is the backward (with a scaled table, as YaRN's, it is no inverse).
    In place: outside of autograd's sight, or inside a `once_differentiable` function.
    """
    tokens, heads, dim = x_MHD.shape
    if tokens % max(cos_TD.shape[0], 1):
        raise ValueError(f"{tokens} tokens are no multiple of the {cos_TD.shape[0]} rows of angles")
    if not runs_on_triton(x_MHD):
        _reference(x_MHD, cos_TD, sin_TD, inverse)
        return x_MHD
    block = power_of_two_from(dim // 2)
    rows = max(PAIRS // block, 1)
    _rotate[(-(-tokens * heads // rows),)](
        x_MHD, cos_TD, sin_TD, tokens * heads, cos_TD.shape[0],
        x_MHD.stride(0), x_MHD.stride(1), cos_TD.stride(0), sin_TD.stride(0),
        HALF=dim // 2, HEADS=heads, ROWS=rows, BLOCK=block, INVERSE=inverse, num_warps=WARPS,
    )  # fmt: skip
    return x_MHD


def join_heads(
    out_MN: Tensor, *parts: Tensor, angles: tuple[Tensor, Tensor] | None = None, rotated: int = 2, inverse: bool = False
) -> Tensor:
    """Writes heads [B, heads, T, D] of up to three tensors beside each other into the rows of `out_MN`; returns it.

    `out_MN`: [B * T, all heads * D], any row stride. The tensors may have any strides with D contiguous. With `angles`
    (cos and sin, as `rotate_` takes them) the heads of the first `rotated` tensors are rotated on their way.
    """
    batch, _, time, dim = parts[0].shape
    counts = [part.shape[1] for part in parts]
    if out_MN.shape != (batch * time, sum(counts) * dim) or len(parts) > 3:
        raise ValueError(f"heads of {[tuple(p.shape) for p in parts]} do not fill {tuple(out_MN.shape)}")
    if not runs_on_triton(out_MN):
        columns = torch.cat([part.transpose(1, 2).reshape(batch * time, -1) for part in parts], dim=1)
        if angles is not None:
            _reference(columns[:, : sum(counts[:rotated]) * dim].unflatten(1, (-1, dim)), *angles, inverse)
        out_MN.copy_(columns)
        return out_MN
    a, b, c = (*parts, parts[0], parts[0])[:3]
    cos, sin = angles or (out_MN, out_MN)
    heads = sum(counts)
    block = power_of_two_from(dim // 2)
    rows = max(PAIRS // block, 1)
    _join[(-(-batch * time * heads // rows),)](
        a, b, c, out_MN, cos, sin, batch * time * heads, time, cos.shape[0],
        *(stride for part in (a, b, c) for stride in part.stride()[:3]), out_MN.stride(0), cos.stride(0), sin.stride(0),
        HALF=dim // 2, HEADS=heads, FIRST=counts[0], SECOND=sum(counts[:2]),
        ROTATED=sum(counts[:rotated]) if angles is not None else 0, ROWS=rows, BLOCK=block, INVERSE=inverse,
        num_warps=WARPS,
    )  # fmt: skip
    return out_MN


def _reference(x_MHD: Tensor, cos_TD: Tensor, sin_TD: Tensor, inverse: bool) -> None:
    tokens, _, dim = x_MHD.shape
    dtype = compute_dtype(x_MHD)
    repeats = tokens // max(cos_TD.shape[0], 1)
    cos = cos_TD[:, : dim // 2].to(dtype).repeat(repeats, 1)[:, None]
    sin = sin_TD[:, : dim // 2].to(dtype).repeat(repeats, 1)[:, None]
    if inverse:
        sin = -sin
    a, b = x_MHD.to(dtype).chunk(2, -1)
    rotated_a, rotated_b = a * cos - b * sin, b * cos + a * sin
    x_MHD[..., : dim // 2].copy_(rotated_a)
    x_MHD[..., dim // 2 :].copy_(rotated_b)


@Kernel
def _rotate(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rows_total: tl.tensor,
    angles: tl.tensor,
    x_token: tl.tensor,
    x_head: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
) -> None:
    """A program rotates ROWS heads, of one token or of several: no lane is idle whatever the number of heads."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // HEADS
    pair = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows_total)[:, None] & (pair < HALF)
    first = x + (token.to(tl.int64) * x_token + (row - token * HEADS) * x_head)[:, None] + pair
    angle = (token % angles).to(tl.int64)[:, None]
    a = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(first + HALF, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + angle * cos_stride + pair, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + angle * sin_stride + pair, mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    tl.store(first, (a * c - b * s).to(x.dtype.element_ty), mask=mask)
    tl.store(first + HALF, (b * c + a * s).to(x.dtype.element_ty), mask=mask)


@Kernel
def _join(
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    rows_total: tl.tensor,
    time: tl.tensor,
    angles: tl.tensor,
    first_batch: tl.tensor,
    first_head: tl.tensor,
    first_time: tl.tensor,
    second_batch: tl.tensor,
    second_head: tl.tensor,
    second_time: tl.tensor,
    third_batch: tl.tensor,
    third_head: tl.tensor,
    third_time: tl.tensor,
    out_token: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (row // HEADS).to(tl.int64)
    head = row % HEADS
    batch, at = token // time, token % time
    pair = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows_total)[:, None] & (pair < HALF)
    # Of the three loads one has its mask set; the others cost no traffic.
    one = (first + (batch * first_batch + head * first_head + at * first_time)[:, None]) + pair
    in_one = mask & (head < FIRST)[:, None]
    a = tl.load(one, mask=in_one, other=0.0).to(tl.float32)
    b = tl.load(one + HALF, mask=in_one, other=0.0).to(tl.float32)
    if HEADS > FIRST:
        two = (second + (batch * second_batch + (head - FIRST) * second_head + at * second_time)[:, None]) + pair
        in_two = mask & ((head >= FIRST) & (head < SECOND))[:, None]
        a += tl.load(two, mask=in_two, other=0.0).to(tl.float32)
        b += tl.load(two + HALF, mask=in_two, other=0.0).to(tl.float32)
    if HEADS > SECOND:
        three = (third + (batch * third_batch + (head - SECOND) * third_head + at * third_time)[:, None]) + pair
        in_three = mask & (head >= SECOND)[:, None]
        a += tl.load(three, mask=in_three, other=0.0).to(tl.float32)
        b += tl.load(three + HALF, mask=in_three, other=0.0).to(tl.float32)
    if ROTATED > 0:
        angle = (token % angles)[:, None]
        turns = mask & (head < ROTATED)[:, None]
        c = tl.load(cos + angle * cos_stride + pair, mask=turns, other=1.0).to(tl.float32)
        s = tl.load(sin + angle * sin_stride + pair, mask=turns, other=0.0).to(tl.float32)
        if INVERSE:
            s = -s
        a, b = a * c - b * s, b * c + a * s
    target = out + (token * out_token + head * (2 * HALF))[:, None] + pair
    tl.store(target, a.to(out.dtype.element_ty), mask=mask)
    tl.store(target + HALF, b.to(out.dtype.element_ty), mask=mask)
