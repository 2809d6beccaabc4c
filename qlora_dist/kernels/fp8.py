"""8-bit floats (e4m3) with one scale a row: activations, and frozen weights straight from 4 bits, lying or turned.

An FP8 GEMM takes both operands with their inner dimension contiguous. So the forward needs W [N, K] with a scale for
each output, and the backward W' [K, N] with a scale for each input.

M: tokens  N: outputs of a weight  K: its inputs  R, C: rows and columns of whatever it is
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qlora_dist.kernels.launch import Kernel, compute_dtype, power_of_two_from, runs_on_triton
from qlora_dist.kernels.nf4 import Packed, unpack_into

if TYPE_CHECKING:
    import triton.language as tl

E4M3 = torch.float8_e4m3fn
# The largest number of e4m3, and the least that counts as a row's largest: gradients of many tokens are small.
LARGEST, LEAST = 448.0, 1e-30
# Both sizes of a weight are multiples of it: what the GEMM wants, and a thread's 16-byte store.
MULTIPLE = 16
# A row up to this long stays in registers between its largest value and its rounding.
LONGEST_BLOCK = 32768
# Rows and columns of a program's part of a weight.
TILE, TILE_TURNED = (16, 512), (128, 128)


class Scaled(NamedTuple):
    """values_RC * scale_R[:, None]: e4m3 [R, C], contiguous, and float32 [R]."""

    values_RC: Tensor
    scale_R: Tensor


def quantize_rows(x_RC: Tensor) -> Scaled:
    """e4m3 of each row over its own scale, its largest absolute value / 448; any row stride.

    A NaN stays one, and an infinity becomes one, so that a step which is not finite is seen to be.
    """
    rows, columns = x_RC.shape
    made = Scaled(
        torch.empty(rows, columns, dtype=E4M3, device=x_RC.device),
        torch.empty(rows, dtype=torch.float32, device=x_RC.device),
    )
    if not runs_on_triton(x_RC):
        made.scale_R.copy_(_scale(x_RC.abs().amax(dim=1)))
        made.values_RC.copy_(_rounded(x_RC, made.scale_R[:, None]))
        return made
    block = min(power_of_two_from(columns), LONGEST_BLOCK)
    _rows[(rows,)](
        x_RC, made.values_RC, made.scale_R, x_RC.stride(0),
        C=columns, BLOCK=block, CHUNKS=-(-columns // block), num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    return made


def weight_scales(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The scales of a weight's rows [N] and of its columns [K], float32."""
    found = [torch.aminmax(weight_NK, dim=dim) for dim in (1, 0)]
    rows_N, columns_K = (_scale(torch.maximum(-least, most)) for least, most in found)
    return rows_N, columns_K


def weight_into(out: Tensor, source: Packed | Tensor, scale: Tensor, turned: bool) -> Tensor:
    """Writes a weight [N, K] over given scales as e4m3 into `out`: as it lies, or `turned` into [K, N].

    Args:
        out: any row stride, columns contiguous.
        source: 4-bit, or a matrix of floats whose columns are contiguous.
        scale: float32, one for each row of `out`. A value beyond 448 of them is cut to that.

    Raises:
        ValueError: N or K is no multiple of 16, or the source has another size.
    """
    rows, columns = out.shape[::-1] if turned else out.shape
    if rows % MULTIPLE or columns % MULTIPLE:
        raise ValueError(f"a weight of {rows} x {columns}: both have to be multiples of {MULTIPLE}")
    packed = isinstance(source, Packed)
    size = source.packed_B.numel() * 2 if isinstance(source, Packed) else source.numel()
    if size != rows * columns:
        raise ValueError(f"{size} values do not fill a {rows} x {columns} matrix")
    if not runs_on_triton(out):
        weight_NK = source
        if isinstance(source, Packed):
            weight_NK = unpack_into(torch.empty(rows, columns, device=out.device), source)
        assert isinstance(weight_NK, Tensor)
        out.copy_(_rounded(weight_NK.t() if turned else weight_NK, scale[:, None]))
        return out
    values, absmax, code, blocksize, nested = source if isinstance(source, Packed) else (source, scale, scale, 64, None)
    absmax2, code2, offset, blocksize2 = nested or (absmax, code, code, 1)
    tile_rows, tile_columns = TILE_TURNED if turned else TILE
    _weight[(-(-rows // tile_rows) * -(-columns // tile_columns),)](
        out, values, absmax, code, absmax2, code2, offset, scale, rows, out.stride(0), values.stride(0),
        K=columns, BLOCKSIZE=blocksize, BLOCKSIZE2=blocksize2, NESTED=nested is not None, PACKED=packed, TURNED=turned,
        ROWS=tile_rows, COLUMNS=tile_columns, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def scaled_product(a: Scaled, b: Scaled, out: Tensor) -> Tensor:
    """Writes a b' [rows of a, rows of b] into `out` (bf16 on a GPU; any row stride) and returns it.

    Anywhere else than on a GPU the product is made of the same rounded numbers in fp32, or fp64 for an fp64 `out`.
    """
    if out.is_cuda:
        return torch._scaled_mm(
            a.values_RC, b.values_RC.t(), scale_a=a.scale_R[:, None], scale_b=b.scale_R[None, :],
            out_dtype=out.dtype, use_fast_accum=True, out=out,
        )  # fmt: skip
    dtype = compute_dtype(out)
    left, right = (scaled.values_RC.to(dtype) * scaled.scale_R[:, None].to(dtype) for scaled in (a, b))
    return out.copy_(left @ right.t())


def _scale(largest: Tensor) -> Tensor:
    return largest.float().clamp(min=LEAST) * (1 / LARGEST)


def _rounded(x_RC: Tensor, scale_R1: Tensor) -> Tensor:
    inverse_R1 = torch.reciprocal(scale_R1)
    return (x_RC.to(compute_dtype(x_RC)) * inverse_R1).clamp(-LARGEST, LARGEST).to(E4M3)


@Kernel
def _rows(
    x: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    x_stride: tl.tensor,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """A program makes one row; one too long for the registers is read twice, the second time from the cache."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_stride + column, mask=column < C, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(v), axis=0)
    for chunk in range(1, CHUNKS):
        at = chunk * BLOCK + column
        more = tl.load(x + row * x_stride + at, mask=at < C, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(more), axis=0))
    s = tl.maximum(largest, 1e-30) * (1.0 / 448.0)
    inverse = tl.div_rn(1.0, s)
    tl.store(scale + row, s)
    if CHUNKS == 1:
        tl.store(values + row * C + column, (v * inverse).to(tl.float8e4nv), mask=column < C)
    else:
        for chunk in range(0, CHUNKS):
            at = chunk * BLOCK + column
            again = tl.load(x + row * x_stride + at, mask=at < C, other=0.0).to(tl.float32)
            tl.store(values + row * C + at, (again * inverse).to(tl.float8e4nv), mask=at < C)


@Kernel
def _weight(
    out: tl.tensor,
    source: tl.tensor,
    absmax: tl.tensor,
    code: tl.tensor,
    absmax2: tl.tensor,
    code2: tl.tensor,
    offset: tl.tensor,
    scale: tl.tensor,
    rows: tl.tensor,
    out_stride: tl.tensor,
    source_stride: tl.tensor,
    K: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    NESTED: tl.constexpr,
    PACKED: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """A program makes ROWS x COLUMNS of the weight, in groups of 16 values, each of which lies in one block of it."""
    tiles = tl.cdiv(K, COLUMNS)
    first_row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    first_column = tl.program_id(0) % tiles * COLUMNS
    n = tl.arange(0, ROWS)
    k = first_column + tl.arange(0, COLUMNS)
    n_inside = n < rows - first_row
    mask = n_inside[:, None] & (k < K)[None, :]
    if PACKED:
        group = first_column + tl.arange(0, COLUMNS // 16) * 16
        group_inside = n_inside[:, None] & (group < K)[None, :]
        # Rows are whole bytes: K is a multiple of 16.
        within = n[:, None] * K + group[None, :]
        byte = (within // 2)[:, :, None] + tl.arange(0, 8)[None, None, :]
        start = source + first_row * (K // 2)
        both = tl.load(start + byte, mask=group_inside[:, :, None], other=0, eviction_policy="evict_first")
        block = (first_row * K + within) // BLOCKSIZE
        if NESTED:
            quantised = tl.load(absmax + block, mask=group_inside, other=0).to(tl.int32)
            factor = tl.load(code2 + quantised) * tl.load(absmax2 + block // BLOCKSIZE2, mask=group_inside, other=0.0)
            factor += tl.load(offset)
        else:
            factor = tl.load(absmax + block, mask=group_inside, other=0.0)
        high = tl.load(code + (both >> 4).to(tl.int32)) * factor[:, :, None]
        low = tl.load(code + (both & 15).to(tl.int32)) * factor[:, :, None]
        values = tl.reshape(tl.join(high, low), (ROWS, COLUMNS))
    else:
        at = (first_row + n)[:, None] * source_stride + k[None, :]
        values = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
    if TURNED:
        inverse = tl.div_rn(1.0, tl.load(scale + k, mask=k < K, other=1.0))
        rounded = tl.trans((values * inverse[None, :]).to(tl.float8e4nv))
        target = out + k.to(tl.int64)[:, None] * out_stride + first_row + n[None, :]
        tl.store(target, rounded, mask=(k < K)[:, None] & n_inside[None, :])
    else:
        inverse = tl.div_rn(1.0, tl.load(scale + first_row + n, mask=n_inside, other=1.0))
        target = out + (first_row + n)[:, None] * out_stride + k[None, :]
        tl.store(target, (values * inverse[:, None]).to(tl.float8e4nv), mask=mask)
