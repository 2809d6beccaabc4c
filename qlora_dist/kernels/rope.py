"""Rotary position embedding in place, in Llama's rotate-half convention.

M: tokens  H: heads  D: head dimension  T: rows of the table of angles
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
