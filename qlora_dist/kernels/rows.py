"""Rows of a frozen weight, by index or in order, from where they are kept: host memory, int8, 4 bits.

A GPU reads pinned host memory by itself (unified addressing), so that looking tokens up there needs no round trip.

V: rows of the weight  H: its columns  N: rows asked for
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_dist.kernels.launch import Kernel, power_of_two_from, runs_on_triton
from qlora_dist.kernels.nf4 import NestedAbsmax

if TYPE_CHECKING:
    import triton.language as tl

# 16 values a thread: one 16-byte load of int8, two of bf16.
LARGEST_BLOCK = 4096
BLOCK_4BIT = 1024


def gather_rows(weight_VH: Tensor, index_N: Tensor) -> Tensor:
    """Rows `index_N` (int64) of `weight_VH`, [N, H] on the index's device.

    The weight is contiguous, on that device or in pinned host memory, which the kernel reads over the bus. On a GPU an
    index beyond the weight gives a row of NaN; a CPU raises IndexError.
    """
    if not runs_on_triton(index_N):
        return weight_VH.index_select(0, index_N)
    out_NH = weight_VH.new_empty(index_N.numel(), weight_VH.shape[1], device=index_N.device)
    _launch(out_NH, weight_VH, None, index_N)
    return out_NH


def gather_rows_8bit(weight_VH: Tensor, scale_V: Tensor, index_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `index_N` of the int8 weight, each times its float32 scale, then rounded: [N, H] in `dtype`."""
    if not runs_on_triton(index_N):
        return (weight_VH.index_select(0, index_N) * scale_V.index_select(0, index_N)[:, None]).to(dtype)
    out_NH = torch.empty(index_N.numel(), weight_VH.shape[1], dtype=dtype, device=index_N.device)
    _launch(out_NH, weight_VH, scale_V, index_N)
    return out_NH


def dequantize_8bit_into(out_NH: Tensor, weight_NH: Tensor, scale_N: Tensor) -> Tensor:
    """Writes int8 rows, each times its float32 scale and then rounded, into the contiguous `out_NH` and returns it."""
    if not runs_on_triton(out_NH):
        return torch.mul(weight_NH, scale_N[:, None], out=out_NH)
    _launch(out_NH, weight_NH, scale_N, None)
    return out_NH


def gather_rows_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    nested: NestedAbsmax | None,
    index_N: Tensor,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `index_N` (int64) of a 4-bit weight of `columns` columns, [N, H], bit for bit what bitsandbytes gives.

    The other arguments are those of `dequantize_4bit_into`; rows need not begin at a block, nor at a byte.
    """
    packed_B = packed.reshape(-1).view(torch.uint8)
    if not runs_on_triton(index_N):
        return _reference_4bit(packed_B, absmax, code, blocksize, nested, index_N, columns).to(dtype)
    out_NH = torch.empty(index_N.numel(), columns, dtype=dtype, device=index_N.device)
    absmax2, code2, offset, blocksize2 = nested or (absmax, code, code, 1)
    if index_N.numel():
        _rows_4bit[(index_N.numel(), -(-columns // BLOCK_4BIT))](
            out_NH, packed_B, absmax, code, absmax2, code2, offset, index_N, packed_B.numel() * 2 // columns,
            H=columns, BLOCKSIZE=blocksize, BLOCKSIZE2=blocksize2, NESTED=nested is not None, BLOCK=BLOCK_4BIT,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out_NH


def _launch(out_NH: Tensor, weight_VH: Tensor, scale_V: Tensor | None, index_N: Tensor | None) -> None:
    rows, columns = out_NH.shape
    if not rows:
        return
    block = min(power_of_two_from(columns), LARGEST_BLOCK)
    _rows[(rows, -(-columns // block))](
        out_NH, weight_VH, weight_VH if scale_V is None else scale_V, out_NH if index_N is None else index_N,
        weight_VH.shape[0], H=columns, SCALED=scale_V is not None, INDEXED=index_N is not None, BLOCK=block,
        num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip


def _reference_4bit(
    packed_B: Tensor, absmax: Tensor, code: Tensor, blocksize: int, nested: NestedAbsmax | None, index_N: Tensor,
    columns: int,
) -> Tensor:  # fmt: skip
    value_NH = index_N[:, None] * columns + torch.arange(columns, device=index_N.device)
    both_NH = packed_B[value_NH >> 1].int()
    nibble_NH = torch.where(value_NH % 2 == 0, both_NH >> 4, both_NH & 15)
    block_NH = value_NH // blocksize
    scale_NH = absmax[block_NH]
    if nested is not None:
        scale_NH = nested.code2[scale_NH.int()] * nested.absmax2[block_NH // nested.blocksize2]
        scale_NH += nested.offset
    return code[nibble_NH] * scale_NH


@Kernel
def _rows(
    out: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    index: tl.tensor,
    rows_total: tl.tensor,
    H: tl.constexpr,
    SCALED: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program copies BLOCK values of one row."""
    target = tl.program_id(0).to(tl.int64)
    source = target
    if INDEXED:
        source = tl.load(index + target)
    inside = (source >= 0) & (source < rows_total)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < H
    if SCALED:
        factor = tl.load(scale + source, mask=inside, other=float("nan"))
        values = tl.load(weight + source * H + column, mask=mask & inside, other=0).to(tl.float32) * factor
    else:
        values = tl.load(weight + source * H + column, mask=mask & inside, other=float("nan"))
    tl.store(out + target * H + column, values.to(out.dtype.element_ty), mask=mask)


@Kernel
def _rows_4bit(
    out: tl.tensor,
    packed: tl.tensor,
    absmax: tl.tensor,
    code: tl.tensor,
    absmax2: tl.tensor,
    code2: tl.tensor,
    offset: tl.tensor,
    index: tl.tensor,
    rows_total: tl.tensor,
    H: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program unpacks BLOCK values of one row; both values of a byte read it, as a step looks up few rows."""
    target = tl.program_id(0).to(tl.int64)
    source = tl.load(index + target)
    inside = (source >= 0) & (source < rows_total)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (column < H) & inside
    value = source * H + column
    both = tl.load(packed + value // 2, mask=mask, other=0).to(tl.int32)
    nibble = tl.where(value % 2 == 0, both >> 4, both & 15)
    block = value // BLOCKSIZE
    if NESTED:
        quantised = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
        factor = tl.load(code2 + quantised) * tl.load(absmax2 + block // BLOCKSIZE2, mask=mask, other=float("nan"))
        factor += tl.load(offset)
    else:
        factor = tl.load(absmax + block, mask=mask, other=float("nan"))
    values = tl.load(code + nibble) * factor
    tl.store(out + target * H + column, values.to(out.dtype.element_ty), mask=column < H)
