"""4-bit weights (nf4, fp4) back to floating point, straight into a strided buffer, bit for bit what bitsandbytes gives.

N: rows (output features)  K: columns (input features)  B: bytes, N*K/2 rounded up  C: blocks of `blocksize` values
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qlora_dist.kernels.launch import Kernel, runs_on_triton

if TYPE_CHECKING:
    import triton.language as tl

# Four bytes a thread: one 4-byte load and, in bf16, one 16-byte store, both whole lines a warp.
WARPS = 8
GROUPS = 32 * WARPS


class NestedAbsmax(NamedTuple):
    """Double quantisation: what turns a uint8 absmax_C back to floats (bitsandbytes' `state2` and `offset`)."""

    absmax2: Tensor  # float32, one for each `blocksize2` entries of absmax
    code2: Tensor  # float32 [256]
    offset: Tensor  # float32, one element on the same device: read there, never by the host
    blocksize2: int


class Packed(NamedTuple):
    """A 4-bit weight as the kernel takes it, as `dequantize_4bit_into` describes its arguments."""

    packed_B: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int
    nested: NestedAbsmax | None


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
    return unpack_into(out_NK, pack(packed, absmax, code, blocksize, nested))


def pack(packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, nested: NestedAbsmax | None = None) -> Packed:
    """What `unpack_into` takes, looked through once for all launches; arguments as of `dequantize_4bit_into`."""
    if blocksize < 32 or blocksize & (blocksize - 1):
        raise ValueError(f"blocksize {blocksize} is no power of two from 32")
    if (absmax.dtype == torch.uint8) != (nested is not None):
        raise ValueError("a uint8 absmax comes with the state that turns it back to floats, a float32 one without")
    return Packed(packed.reshape(-1).view(torch.uint8), absmax, code, blocksize, nested)


def unpack_into(out_NK: Tensor, weight: Packed) -> Tensor:
    """As `dequantize_4bit_into`."""
    rows, columns = out_NK.shape
    packed_B, absmax, code, blocksize, nested = weight
    size = packed_B.numel()
    if size != (rows * columns + 1) // 2:
        raise ValueError(f"{size} bytes of 4-bit values do not fill a {rows} x {columns} matrix")
    if out_NK.stride(1) != 1:
        raise ValueError("the columns of the output must be contiguous")
    if not runs_on_triton(out_NK):
        out_NK.copy_(_reference(rows, columns, packed_B, absmax, code, blocksize, nested))
        return out_NK
    absmax2, code2, offset, blocksize2 = nested or (absmax, code, code, 1)
    _dequantize[(-(-size // (4 * GROUPS)),)](
        out_NK, packed_B, absmax, code, absmax2, code2, offset, size, rows * columns, out_NK.stride(0),
        K=columns, BLOCKSIZE=blocksize, BLOCKSIZE2=blocksize2, NESTED=nested is not None, GROUPS=GROUPS,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out_NK


def _reference(
    rows: int, columns: int, packed_B: Tensor, absmax: Tensor, code: Tensor, blocksize: int, nested: NestedAbsmax | None
) -> Tensor:
    """The weight as float32 [rows, columns]."""
    if nested is not None:
        scale = nested.absmax2.repeat_interleave(nested.blocksize2)[: absmax.numel()]
        absmax = nested.code2.index_select(0, absmax.view(-1).int()) * scale
        absmax += nested.offset
    nibbles = torch.stack((packed_B >> 4, packed_B & 15), dim=1).view(-1)[: rows * columns]
    values = code.index_select(0, nibbles.int())
    whole = values.numel() // blocksize * blocksize
    values[:whole].view(-1, blocksize).mul_(absmax[: whole // blocksize, None])
    values[whole:] *= absmax[whole // blocksize :]
    return values.view(rows, columns)


@Kernel
def _dequantize(
    out: tl.tensor,
    packed: tl.tensor,
    absmax: tl.tensor,
    code: tl.tensor,
    absmax2: tl.tensor,
    code2: tl.tensor,
    offset: tl.tensor,
    bytes_total: tl.tensor,
    values_total: tl.tensor,
    out_stride: tl.tensor,
    K: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    NESTED: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """A program turns GROUPS groups of 4 bytes into 8 values each; a group lies in one block, so has one absmax."""
    first_byte = tl.program_id(0).to(tl.int64) * (GROUPS * 4)
    first_value = first_byte * 2
    group = tl.arange(0, GROUPS)
    byte = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    mask = byte < bytes_total - first_byte
    both = tl.load(packed + first_byte + byte, mask=mask, other=0, eviction_policy="evict_first")

    # Both summands are whole: blocks and a program's share are powers of two.
    block = first_value // BLOCKSIZE + group * 8 // BLOCKSIZE
    within = group * 4 < bytes_total - first_byte
    if NESTED:
        quantised = tl.load(absmax + block, mask=within, other=0).to(tl.int32)
        scale = tl.load(code2 + quantised) * tl.load(absmax2 + block // BLOCKSIZE2, mask=within, other=0.0)
        scale += tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=within, other=0.0)

    high = tl.load(code + (both >> 4).to(tl.int32)) * scale[:, None]
    low = tl.load(code + (both & 15).to(tl.int32)) * scale[:, None]
    values = tl.reshape(tl.join(high, low), (GROUPS, 8))

    # The 64-bit division is done once a program, what a thread divides are 32-bit offsets from there.
    first_row = first_value // K
    index = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    from_row = (first_value - first_row * K).to(tl.int32) + index
    row = from_row // K
    target = out + first_row * out_stride + row.to(tl.int64) * out_stride + (from_row - row * K)
    tl.store(target, values.to(out.dtype.element_ty), mask=index < values_total - first_value)
