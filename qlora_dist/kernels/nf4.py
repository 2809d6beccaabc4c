"""4-bit weights (nf4, fp4) back to floating point, straight into a strided buffer, bit for bit what bitsandbytes gives.

N: rows (output features)  K: columns (input features)  B: bytes, N*K/2 rounded up  C: blocks of `blocksize` values
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


class NestedAbsmax(NamedTuple):
    """Double quantisation: what turns a uint8 absmax_C back to floats (bitsandbytes' `state2` and `offset`)."""

    absmax2: Tensor  # float32, one for each `blocksize2` entries of absmax
    code2: Tensor  # float32 [256]
    offset: Tensor  # float32, one element on the same device: read there, never by the host
    blocksize2: int


def dequantize_4bit_into(
    out_NK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    nested: NestedAbsmax | None = None,
) -> Tensor:
    """Writes the 4-bit weight into `out_NK` (bf16, fp16 or fp32; any row stride, columns contiguous) and returns it.

    `packed`: the bytes, contiguous, of any shape and storage type, two values each, the high nibble first, row-major.
    `absmax`: float32 [C], or uint8 [C] with `nested`. `code`: float32 [16], which holds nf4's or fp4's values.
    `blocksize`: a power of two, at least 32; the last block may be partial.

    value = round_to_out(code[nibble] * absmax), absmax = code2[uint8] * absmax2 + offset: every product and sum is
    rounded to float32 by itself (no fused multiply-add), which is bitsandbytes' arithmetic on CUDA.
    """
    rows, columns = out_NK.shape
    packed_B = packed.view(-1) if packed.dtype == torch.uint8 else packed.reshape(-1).view(torch.uint8)
    if packed_B.numel() != (rows * columns + 1) // 2:
        raise ValueError(f"{packed_B.numel()} bytes of 4-bit values do not fill a {rows} x {columns} matrix")
    if out_NK.stride(1) != 1:
        raise ValueError("the columns of the output must be contiguous")
    if blocksize < 32 or blocksize & (blocksize - 1):
        raise ValueError(f"blocksize {blocksize} is no power of two from 32")
    if (absmax.dtype == torch.uint8) != (nested is not None):
        raise ValueError("a uint8 absmax comes with the state that turns it back to floats, a float32 one without")
    out_NK.copy_(_reference(rows, columns, packed_B, absmax, code, blocksize, nested))
    return out_NK


def _reference(
    rows: int, columns: int, packed_B: Tensor, absmax: Tensor, code: Tensor, blocksize: int, nested: NestedAbsmax | None
) -> Tensor:
    """The weight as float32 [rows, columns]."""
    if nested is not None:
        scale = nested.absmax2.repeat_interleave(nested.blocksize2)[: absmax.numel()]
        absmax = code_lookup(nested.code2, absmax) * scale
        absmax += nested.offset
    nibbles = torch.stack((packed_B >> 4, packed_B & 15), dim=1).view(-1)[: rows * columns]
    values = code_lookup(code, nibbles)
    whole = values.numel() // blocksize * blocksize
    values[:whole].view(-1, blocksize).mul_(absmax[: whole // blocksize, None])
    values[whole:] *= absmax[-1]
    return values.view(rows, columns)


def code_lookup(code: Tensor, index: Tensor) -> Tensor:
    return code.index_select(0, index.reshape(-1).int())
