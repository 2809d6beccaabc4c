"""The head and its loss in one: cross entropy of hidden @ weight^T, without ever holding all logits.

N: trained tokens  H: hidden size  V: vocabulary  C: rows of a chunk
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora_dist.kernels.launch import Kernel, compute_dtype, runs_on_triton

if TYPE_CHECKING:
    import triton.language as tl

# Bytes of a chunk of logits. At a vocabulary of 128,256 in bf16 that is 2,048 rows, which fills the GPU's GEMM, and
# the chunk stays small beside the rest of a step.
CHUNK_BYTES = 2**29 + 2**24
# 16 values a thread: two 16-byte accesses in bf16.
WARPS = 16
BLOCK = 16 * 32 * WARPS
# A target that bears no loss and no gradient, as in torch.nn.functional.cross_entropy.
IGNORED = -100


@dataclass(frozen=True)
class Slices:
    """A frozen [V, H] weight of which so many rows at a time exist in floating point, such as a quantised one.

    step: rows of a slice; the last may have fewer.
    make: rows [first, last) in `dtype`, [last - first, H]; they last until it is called again.
    """

    vocabulary: int
    dtype: torch.dtype
    step: int
    make: Callable[[int, int], Tensor]

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, self.vocabulary, self.step):
            last = min(first + self.step, self.vocabulary)
            yield slice(first, last), self.make(first, last)


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor | Slices | Callable[[], Tensor | Slices],
    targets_N: Tensor,
    chunk: int | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """The sum over n of -log softmax(hidden[n] @ weight^T)[targets[n]]: a float32 scalar (float64 for float64).

    The weight is frozen; a callable is asked for it once, in the forward, and it is not kept (a sharded head gathers it
    there). Slices of it are made twice for each chunk of rows. GEMMs run in the weight's dtype; the gradient of hidden
    is computed in the same pass and kept, [N, H] in hidden's dtype. `targets_N`: int64 in [0, V), or -100 for a token
    that does not count. N may be 0.
    `chunk`: rows of logits held at once; by default what `chunk_bytes` hold, which are 0.5 GiB.
    """
    gradient = torch.is_grad_enabled() and hidden_NH.requires_grad
    loss: Tensor = _LinearCrossEntropy.apply(hidden_NH, weight_VH, targets_N, chunk, chunk_bytes, gradient)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor | Slices | Callable[[], Tensor | Slices],
        targets_N: Tensor,
        chunk: int | None,
        chunk_bytes: int | None,
        gradient: bool,
    ) -> Tensor:
        weight = weight_VH if isinstance(weight_VH, Tensor | Slices) else weight_VH()
        slices = weight if isinstance(weight, Slices) else _whole(weight.detach())
        rows, vocabulary = hidden_NH.shape[0], slices.vocabulary
        dhidden_NH = torch.empty_like(hidden_NH, memory_format=torch.contiguous_format) if gradient else None
        chunk = chunk or chunk_rows(rows, vocabulary, slices.dtype.itemsize, chunk_bytes or CHUNK_BYTES)
        logits_CV = hidden_NH.new_empty(min(chunk, rows), vocabulary, dtype=slices.dtype)
        loss_N = hidden_NH.new_zeros(rows, dtype=compute_dtype(logits_CV))
        for start in range(0, rows, chunk):
            end = min(start + chunk, rows)
            logits = logits_CV[: end - start]
            hidden = hidden_NH[start:end].to(slices.dtype)
            for part, weight in slices:
                torch.mm(hidden, weight.t(), out=logits[:, part])
            cross_entropy_(logits, targets_N[start:end], loss_N[start:end], gradient)
            if dhidden_NH is not None:
                product_into(dhidden_NH[start:end], logits, slices)
        if dhidden_NH is not None:
            ctx.save_for_backward(dhidden_NH)
        return loss_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (dhidden_NH,) = ctx.saved_tensors
        # One element, not none: then the product is computed in float32 and rounded once, where a scalar tensor would
        # be rounded to bf16 first, and all gradients of the run with it.
        scaled_NH = torch.mul(dhidden_NH, dloss.view(1), out=torch.empty_like(dhidden_NH))
        return scaled_NH, None, None, None, None, None


def _whole(weight_VH: Tensor) -> Slices:
    return Slices(weight_VH.shape[0], weight_VH.dtype, max(weight_VH.shape[0], 1), lambda first, last: weight_VH)


def product_into(out_CH: Tensor, grad_CV: Tensor, slices: Slices) -> None:
    """Writes grad @ weight into `out_CH`; the slices' products are summed in float32 and rounded once."""
    if slices.step >= slices.vocabulary:
        ((_, weight_VH),) = slices
        if out_CH.dtype == slices.dtype:
            torch.mm(grad_CV, weight_VH, out=out_CH)
        else:
            out_CH.copy_(grad_CV @ weight_VH)
        return
    wide = compute_dtype(grad_CV)
    sum_CH = torch.zeros(out_CH.shape, dtype=wide, device=out_CH.device)
    for part, weight in slices:
        if wide == slices.dtype:
            sum_CH.addmm_(grad_CV[:, part], weight)
        elif grad_CV.is_cuda:
            sum_CH += torch.mm(grad_CV[:, part], weight, out_dtype=wide)
        else:
            sum_CH += grad_CV[:, part].to(wide) @ weight.to(wide)
    out_CH.copy_(sum_CH)


def chunk_rows(rows: int, vocabulary: int, element_size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows of a chunk: chunks as equal as multiples of 128 rows allow, none above `chunk_bytes`, but for 128 rows."""
    most = max(chunk_bytes // (vocabulary * element_size) // 128 * 128, 128)
    chunks = max(-(-rows // most), 1)
    return max(-(-rows // chunks // 128) * 128, 128)


def cross_entropy_(logits_CV: Tensor, targets_C: Tensor, loss_C: Tensor, gradient: bool) -> None:
    """Writes each row's loss into `loss_C` and, with `gradient`, softmax(logits) - onehot(target) over the logits."""
    if not runs_on_triton(logits_CV):
        _reference_(logits_CV, targets_C, loss_C, gradient)
        return
    _cross_entropy[(logits_CV.shape[0],)](
        logits_CV, targets_C, loss_C, logits_CV.shape[1], logits_CV.stride(0),
        IGNORED=IGNORED, GRADIENT=gradient, BLOCK=BLOCK, BLOCKS=-(-logits_CV.shape[1] // BLOCK), num_warps=WARPS,
    )  # fmt: skip


def _reference_(logits_CV: Tensor, targets_C: Tensor, loss_C: Tensor, gradient: bool) -> None:
    logits = logits_CV.to(compute_dtype(logits_CV))
    counts_C = targets_C != IGNORED
    index_C1 = targets_C.where(counts_C, 0)[:, None]
    lse_C = logits.logsumexp(-1)
    loss_C.copy_((lse_C - logits.gather(1, index_C1)[:, 0]) * counts_C)
    if gradient:
        softmax = (logits - lse_C[:, None]).exp_()
        softmax.scatter_add_(1, index_C1, softmax.new_full(index_C1.shape, -1.0))
        logits_CV.copy_(softmax * counts_C[:, None])


@Kernel
def _cross_entropy(
    logits: tl.tensor,
    targets: tl.tensor,
    loss: tl.tensor,
    vocabulary: tl.tensor,
    stride: tl.tensor,
    IGNORED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """A program takes a row: one pass for the maximum and the sum of exponentials, one for the gradient in place."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    column = tl.arange(0, BLOCK)
    maximum = -float("inf")
    # Summed lane by lane, so that each block costs one reduction, the maximum's.
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(BLOCKS):
        at = i * BLOCK + column
        values = tl.load(logits + at, mask=at < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(maximum, tl.max(values, axis=0))
        total = total * tl.exp(maximum - higher) + tl.exp(values - higher)
        maximum = higher
    lse = maximum + tl.log(tl.sum(total, axis=0))

    counts = target != IGNORED
    # Nothing is read past the row for a target that is none; its loss is a NaN, which the step then reports.
    valid = (target >= 0) & (target < vocabulary)
    at_target = tl.load(logits + target, mask=valid, other=float("nan")).to(tl.float32)
    tl.store(loss + row, tl.where(counts, lse - at_target, 0.0))
    if GRADIENT:
        # Backwards: the blocks read last are still in the L2 cache.
        for i in range(BLOCKS):
            at = (BLOCKS - 1 - i) * BLOCK + column
            values = tl.load(logits + at, mask=at < vocabulary, other=0.0).to(tl.float32)
            softmax = tl.exp(values - lse)
            dlogits = tl.where(counts, tl.where(at == target, softmax - 1.0, softmax), 0.0)
            tl.store(logits + at, dlogits.to(logits.dtype.element_ty), mask=at < vocabulary)
