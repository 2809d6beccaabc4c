"""AdamW over a flat parameter in one launch, with bitsandbytes' 8-bit blockwise state or with fp32 state.

Nothing is asked of the host: the gradient's multiplier (clipping, loss scale), the flag of a step to leave out and the
bias corrections are scalars on the device. bitsandbytes' order of things: decay after the update, epsilon beside the
corrected root. Its CUDA kernel takes powers and quotients from approximate instructions, and 1 - beta in fp32; here
they are exact, so a first step may differ from its by 1e-3 of the update.

N elements of the parameter; C blocks of 256 of them, the last of which may be partial.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qlora_dist.kernels.launch import Kernel, runs_on_triton

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 256
# Elements a program updates: eight a thread.
ROWS, WARPS = 4, 4
SIZE_32BIT = 1024
# The entry of the signed map that is 0.
ZERO = 127


class AdamW(NamedTuple):
    """What a step is made of beside the tensors of a parameter; the scalars live on the parameter's device.

    corrections: fp32 [2], 1 - beta1^t and 1 - beta2^t, t counting the steps taken, this one among them.
    scale: fp32, one element, by which the gradient is multiplied; None is 1.
    skip: bool, one element: whether nothing is to change; None is no.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    corrections: Tensor
    scale: Tensor | None = None
    skip: Tensor | None = None


class Map(NamedTuple):
    """bitsandbytes' dynamic map of 8-bit codes, signed or not, with what finds the entry nearest to a value.

    code: fp32 [256], ascending. borders: fp32 [257]; entry k is for (borders[k], borders[k + 1]].
    starts: int32 [65536], the entry of the least of the floats whose upper 16 bits are the index.
    """

    code: Tensor
    borders: Tensor
    starts: Tensor


class Moment(NamedTuple):
    """One of the two moments in 8 bits: codes uint8 [N], and the largest magnitude of each block, fp32 [C]."""

    codes: Tensor
    absmax: Tensor
    map: Map


def map_of(code: Tensor) -> Map:
    """The map with these entries.

    The nearest entry takes a value; one that is halfway goes to the entry with the even number, as in bitsandbytes'
    CUDA kernel (`quantize_2D`).
    """
    middle = (code[1:] + code[:-1]) * 0.5
    below = torch.nextafter(middle, torch.full_like(middle, -torch.inf))
    odd = torch.arange(255, device=code.device) % 2 == 1
    borders = torch.where(odd, below, middle)
    upper = torch.arange(65536, dtype=torch.int32, device=code.device)
    # The least float of these bits; of negative ones, that with all other bits set.
    least = (torch.where(upper < 32768, upper, upper - 65536) << 16) + torch.where(upper < 32768, 0, 65535)
    starts = torch.bucketize(least.int().view(torch.float32).nan_to_num(1.0), borders, out_int32=True)
    ends = torch.full((1,), torch.inf, device=code.device)
    return Map(code, torch.cat([-ends, borders, ends]), starts)


def adamw_8bit_(param_N: Tensor, grad_N: Tensor, first: Moment, second: Moment, step: AdamW) -> None:
    """Updates the parameter and both moments in place, as bitsandbytes' `AdamW8bit` does (blocks of 256).

    `first` has the signed map and never loses the sign of a negative value; `second` has the unsigned one. All tensors
    are contiguous and of N elements (C for `absmax`), their shape is of no concern. `first` and `second` may lie in
    managed memory, which PyTorch takes for the CPU's.
    """
    if not runs_on_triton(param_N):
        _reference_8bit(param_N, grad_N, first, second, step)
        return
    size = param_N.numel()
    _adamw_8bit[(-(-size // (ROWS * BLOCK)),)](
        param_N, grad_N, first.codes, first.absmax, first.map.code, first.map.borders,
        second.codes, second.absmax, second.map.code, second.map.borders, step.corrections,
        *_or_corrections(step), size, step.lr, step.beta1, 1 - step.beta1, step.beta2, 1 - step.beta2, step.eps,
        1 - step.lr * step.weight_decay,
        HAS_SCALE=step.scale is not None, HAS_SKIP=step.skip is not None, ROWS=ROWS, BLOCK=BLOCK,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def adamw_32bit_(param_N: Tensor, grad_N: Tensor, first_N: Tensor, second_N: Tensor, step: AdamW) -> None:
    """The same with fp32 moments, as bitsandbytes' `AdamW32bit` does and `AdamW8bit` for small weights."""
    if not runs_on_triton(param_N):
        _reference_32bit(param_N, grad_N, first_N, second_N, step)
        return
    size = param_N.numel()
    _adamw_32bit[(-(-size // SIZE_32BIT),)](
        param_N, grad_N, first_N, second_N, step.corrections,
        *_or_corrections(step), size, step.lr, step.beta1, 1 - step.beta1, step.beta2, 1 - step.beta2, step.eps,
        1 - step.lr * step.weight_decay,
        HAS_SCALE=step.scale is not None, HAS_SKIP=step.skip is not None, SIZE=SIZE_32BIT,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def _or_corrections(step: AdamW) -> tuple[Tensor, Tensor]:
    """Scale and skip for a launch; a pointer that is not read where there is none."""
    scale = step.corrections if step.scale is None else step.scale
    return scale, step.corrections if step.skip is None else step.skip.view(torch.uint8)


def _reference_8bit(param_N: Tensor, grad_N: Tensor, first: Moment, second: Moment, step: AdamW) -> None:
    if step.skip is not None and bool(step.skip):
        return
    moments = [_dequantize(moment) for moment in (first, second)]
    _update(param_N, grad_N, moments[0], moments[1], step)
    for moment, values_N, signed in ((first, moments[0], True), (second, moments[1], False)):
        blocks_CB = torch.nn.functional.pad(values_N, (0, -len(values_N) % BLOCK)).view(-1, BLOCK)
        absmax_C = blocks_CB.abs().amax(1)
        unit_CB = blocks_CB / torch.where(absmax_C > 0, absmax_C, 1.0)[:, None]
        entries_N = nearest_entry(unit_CB.view(-1)[: len(values_N)], moment.map)
        if signed:
            entries_N -= ((entries_N == ZERO) & (values_N < 0)).int()
        moment.codes.view(-1).copy_(entries_N)
        moment.absmax.copy_(absmax_C)


def nearest_entry(unit_N: Tensor, to: Map) -> Tensor:
    """The number of the entry nearest to each value in [-1, 1], int32."""
    # No two borders lie within floats that share their upper 16 bits: one comparison decides.
    key_N = (unit_N.view(torch.int32) >> 16).bitwise_and_(65535)
    start_N = to.starts.index_select(0, key_N)
    return start_N + (unit_N > to.borders.index_select(0, start_N + 1)).int()


def _dequantize(moment: Moment) -> Tensor:
    codes_N = moment.codes.reshape(-1).int()
    return moment.map.code.index_select(0, codes_N) * moment.absmax.repeat_interleave(BLOCK)[: codes_N.numel()]


def _reference_32bit(param_N: Tensor, grad_N: Tensor, first_N: Tensor, second_N: Tensor, step: AdamW) -> None:
    if step.skip is None or not bool(step.skip):
        _update(param_N, grad_N, first_N.view(-1), second_N.view(-1), step)


def _update(param_N: Tensor, grad_N: Tensor, first_N: Tensor, second_N: Tensor, step: AdamW) -> None:
    """The moments and the parameter, in place."""
    grad = grad_N.reshape(-1).float()
    if step.scale is not None:
        grad = grad * step.scale
    first_N.copy_(first_N * step.beta1 + grad * (1 - step.beta1))
    second_N.copy_(second_N * step.beta2 + grad * (1 - step.beta2) * grad)
    root = step.corrections[1].sqrt()
    size = root * step.lr / step.corrections[0]
    param = param_N.reshape(-1).float() - size * (first_N / (second_N.sqrt() + root * step.eps))
    param_N.view(-1).copy_(param * (1 - step.lr * step.weight_decay))


@Kernel
def _adamw_8bit(
    param: tl.tensor,
    grad: tl.tensor,
    codes1: tl.tensor,
    absmax1: tl.tensor,
    code1: tl.tensor,
    borders1: tl.tensor,
    codes2: tl.tensor,
    absmax2: tl.tensor,
    code2: tl.tensor,
    borders2: tl.tensor,
    corrections: tl.tensor,
    scale: tl.tensor,
    skip: tl.tensor,
    total: tl.tensor,
    lr: tl.tensor,
    beta1: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    decay: tl.tensor,
    HAS_SCALE: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program updates ROWS blocks. A masked element is 0 throughout, and so has no part in its block's maximum.

    The entry of a map nearest to a value is guessed from the map's making, a decade for each exponent and equal steps
    within it, which is off by one at most, and then looked up among the exact borders.
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    blocks = tl.cdiv(total, BLOCK)
    mask, within = at < total, row < blocks
    if HAS_SKIP:
        taken = tl.load(skip) == 0
        mask, within = mask & taken, within & taken
    p = tl.load(param + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    c1 = tl.load(codes1 + at, mask=mask, other=0).to(tl.int32)
    c2 = tl.load(codes2 + at, mask=mask, other=0).to(tl.int32)
    m1 = tl.load(absmax1 + row, mask=within, other=0.0)
    m2 = tl.load(absmax2 + row, mask=within, other=0.0)
    if HAS_SCALE:
        g = g * tl.load(scale)
    s1 = tl.load(code1 + c1, mask=mask, other=0.0) * m1[:, None] * beta1 + g * rest1
    s2 = tl.load(code2 + c2, mask=mask, other=0.0) * m2[:, None] * beta2 + g * rest2 * g

    root = tl.sqrt_rn(tl.load(corrections + 1))
    size = tl.div_rn(root * lr, tl.load(corrections))
    p = p - size * tl.div_rn(s1, tl.sqrt_rn(s2) + root * eps)
    tl.store(param + at, (p * decay).to(param.dtype.element_ty), mask=mask)

    m1, m2 = tl.max(tl.abs(s1), 1), tl.max(s2, 1)
    tl.store(absmax1 + row, m1, mask=within)
    tl.store(absmax2 + row, m2, mask=within)
    x1 = tl.div_rn(s1, tl.where(m1 > 0, m1, 1.0)[:, None] + tl.zeros_like(s1))
    x2 = tl.div_rn(s2, tl.where(m2 > 0, m2, 1.0)[:, None] + tl.zeros_like(s2))

    # Decade 0 is [1e-7, 1e-6), decade 6 is [0.1, 1); the signed map has 2^decade entries in each, from 127 on outwards.
    a1 = tl.maximum(tl.abs(x1), 1e-7)
    decade1 = tl.minimum(tl.maximum(tl.floor(tl.log2(a1) * 0.3010299956639812) + 7.0, 0.0), 6.0)
    count1 = tl.exp2(decade1)
    step1 = tl.floor((a1 * tl.exp2((6.0 - decade1) * 3.321928094887362) - 0.1) * (count1 / 0.9))
    rank1 = (count1 + tl.minimum(tl.maximum(step1, 0.0), count1 - 1.0)).to(tl.int32)
    guess1 = tl.where(x1 < 0, 127 - rank1, 127 + rank1)
    e1 = guess1 - 1
    e1 += (x1 > tl.load(borders1 + guess1)).to(tl.int32)
    e1 += (x1 > tl.load(borders1 + guess1 + 1)).to(tl.int32)
    e1 -= ((e1 == 127) & (s1 < 0)).to(tl.int32)
    tl.store(codes1 + at, e1.to(tl.uint8), mask=mask)

    # The unsigned map has twice as many.
    a2 = tl.maximum(x2, 1e-7)
    decade2 = tl.minimum(tl.maximum(tl.floor(tl.log2(a2) * 0.3010299956639812) + 7.0, 0.0), 6.0)
    count2 = tl.exp2(decade2 + 1.0)
    step2 = tl.floor((a2 * tl.exp2((6.0 - decade2) * 3.321928094887362) - 0.1) * (count2 / 0.9))
    guess2 = (count2 - 1.0 + tl.minimum(tl.maximum(step2, 0.0), count2 - 1.0)).to(tl.int32)
    e2 = guess2 - 1
    e2 += (x2 > tl.load(borders2 + guess2)).to(tl.int32)
    e2 += (x2 > tl.load(borders2 + guess2 + 1)).to(tl.int32)
    tl.store(codes2 + at, e2.to(tl.uint8), mask=mask)


@Kernel
def _adamw_32bit(
    param: tl.tensor,
    grad: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    corrections: tl.tensor,
    scale: tl.tensor,
    skip: tl.tensor,
    total: tl.tensor,
    lr: tl.tensor,
    beta1: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    eps: tl.tensor,
    decay: tl.tensor,
    HAS_SCALE: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = at < total
    if HAS_SKIP:
        mask = mask & (tl.load(skip) == 0)
    p = tl.load(param + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        g = g * tl.load(scale)
    s1 = tl.load(first + at, mask=mask, other=0.0) * beta1 + g * rest1
    s2 = tl.load(second + at, mask=mask, other=0.0) * beta2 + g * rest2 * g
    root = tl.sqrt_rn(tl.load(corrections + 1))
    size = tl.div_rn(root * lr, tl.load(corrections))
    p = p - size * tl.div_rn(s1, tl.sqrt_rn(s2) + root * eps)
    tl.store(param + at, (p * decay).to(param.dtype.element_ty), mask=mask)
    tl.store(first + at, s1, mask=mask)
    tl.store(second + at, s2, mask=mask)
