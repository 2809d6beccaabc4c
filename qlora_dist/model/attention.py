"""The attention half of a fused decoder layer: RMSNorm, q, k, v, RoPE, attention, its projection and the residual.

M tokens of the micro-batch (B rows of T), H hidden size, D head size, K inputs and N outputs of a projection, R its
total LoRA rank, W columns of a buffer with room for more.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qlora_dist.kernels.documents import documents_attention
from qlora_dist.kernels.rmsnorm import rms_norm, rms_norm_backward
from qlora_dist.kernels.rope import join_heads, rotate_
from qlora_dist.model.host_store import Stored, store_of
from qlora_dist.model.norm import normed
from qlora_dist.model.projection import current, statistics_dtype

if TYPE_CHECKING:
    from qlora_dist.model.block import Block


@dataclass
class Attended:
    """What the attention half keeps, but for its result and its input before heads are normed, and these.

    graph: of the attention, from its result to the gradients of q, k and v; it keeps them, and where autograd's saved
    tensors go elsewhere, it keeps them there.
    """

    xa_MR: Tensor
    rstd_M: Tensor
    graph: "AttentionGraph | None"
    head_rstd: tuple[Tensor, Tensor] | None
    normed_MW: Tensor | None


class AttentionGraph:
    """A graph of which nobody holds a tensor: neither its inputs nor its result need stay for their gradients."""

    def __init__(self, token: Tensor, caught: list[Tensor], result: Tensor):
        self.token, self.caught = token, caught
        self.end = torch.autograd.graph.get_gradient_edge(result)

    def gradients(self, dresult: Tensor) -> list[Tensor]:
        """Of q, k and v; once."""
        torch.autograd.grad(self.end, self.token, dresult, allow_unused=True)
        return self.caught


class _Catch(torch.autograd.Function):
    """Tensors as they are; their gradients go into a list."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, caught: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.caught = caught
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        ctx.caught.extend(grads)
        return (None,) * (2 + len(grads))


def attend(
    block: "Block",
    inputs: dict[str, Any],
    shape: torch.Size,
    x_MH: Tensor,
    factors: Sequence[Tensor],
    differentiable: bool = True,
) -> tuple[Attended, Tensor, Tensor | None]:
    """RMSNorm, q, k, v, RoPE and attention, with the attention's graph where `differentiable`.

    Beside what is kept: the attention's result [B, heads, T, D], and q, k, v before heads are normed, where they are.
    """
    n_MW, rstd_M = normed(block.layer.input_layernorm, x_MH, block.qkv)
    y_MN = block.qkv.forward(n_MW, factors)
    xa_MR = block.qkv.low_rank(n_MW)
    normed_MW = n_MW if block.plan.norms else None
    del n_MW
    raw_MN, head_rstd = None, None
    if block.normed_heads:
        raw_MN, y_MN = y_MN, torch.empty_like(y_MN)
        head_rstd = normed_heads(block, raw_MN, y_MN)
    turns = angles(block, inputs)
    if turns is not None:
        rotate_(y_MN[:, : block.q_width + block.kv_width].unflatten(1, (-1, block.head_dim)), *turns)
    batch, time = shape[0], shape[1]
    q, k, v = (
        part.unflatten(1, (-1, block.head_dim)).unflatten(0, (batch, time)).transpose(1, 2)
        for part in y_MN.split([block.q_width, block.kv_width, block.kv_width], dim=1)
    )
    graph: AttentionGraph | None = None
    with torch.set_grad_enabled(differentiable), keeping_elsewhere(block, inputs, y_MN):
        if differentiable:
            token, caught = torch.empty(0, dtype=q.dtype, requires_grad=True), list[Tensor]()
            q, k, v = _Catch.apply(token, caught, q, k, v)
        result = attention(block, q, k, v, inputs)
        if differentiable:
            graph = AttentionGraph(token, caught, result)
    return Attended(xa_MR, rstd_M, graph, head_rstd, normed_MW), result.detach(), raw_MN


def keeping_elsewhere(block: "Block", inputs: dict[str, Any], qkv_MN: Tensor) -> AbstractContextManager[Any]:
    """Where what autograd saves within goes to the host, if the plan says so; q, k and v are parts of `qkv_MN`."""
    if not (block.plan.attention and block.plan.attention_on_host and inputs["trains"]):
        return nullcontext()
    mask: Tensor | None = inputs["mask"]
    # No references: what is saved keeps this function.
    of_mask = None if mask is None else mask.untyped_storage()._cdata
    of_qkv = qkv_MN.untyped_storage()._cdata

    def pack(tensor: Tensor) -> Tensor | Stored:
        store, storage = store_of(tensor.device), tensor.untyped_storage()._cdata
        # All layers share the mask, which is there in any case.
        if storage == of_mask:
            return tensor
        # SDPA saves k first, and of few heads it is a small part, which alone would stay and hold q and v.
        return store.put(tensor) if storage == of_qkv else store.pack(tensor)

    def unpack(saved: Tensor | Stored) -> Tensor:
        return saved if isinstance(saved, Tensor) else store_of(saved.kept.device).get(saved)

    return saved_tensors_hooks(pack, unpack)


def attention(block: "Block", q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Any]) -> Tensor:
    """softmax(q k' / sqrt(D)) v, [B, heads, T, D]."""
    borders_D1: Tensor | None = inputs["kwargs"].get("cu_seq_lens_q")
    if borders_D1 is not None and block.attention.config._attn_implementation == "sdpa":
        longest: int = inputs["kwargs"]["max_length_q"]
        return documents_attention(q, k, v, borders_D1, longest, block.attention.scaling, block.window)
    # Under sdpa a window shorter than the sequence always comes with a mask; other kernels are told of it.
    if inputs["mask"] is None and not inputs["kwargs"] and block.attention.config._attn_implementation == "sdpa":
        grouped = q.shape[1] != k.shape[1]
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] > 1, scale=block.attention.scaling, enable_gqa=grouped
        )
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ALL_ATTENTION_FUNCTIONS[block.attention.config._attn_implementation]
    window = {} if block.window is None else {"sliding_window": block.window}
    result: Tensor = function(
        block.attention, q, k, v, inputs["mask"], dropout=0.0, scaling=block.attention.scaling, **window,
        **inputs["kwargs"],
    )[0]  # fmt: skip
    return result.transpose(1, 2)


def attention_backward(
    block: "Block", inputs: dict[str, Any], shape: torch.Size, kept: Attended, raw_MN: Tensor | None, da_MK: Tensor
) -> Tensor:
    """The gradient of q, k, v before RoPE in the first columns of a buffer for the projection's backward."""
    assert kept.graph is not None
    da = da_MK.view(*shape[:2], -1, block.head_dim).transpose(1, 2)
    grads = kept.graph.gradients(da)
    dqkv_MW = block.qkv.output_room(da_MK.shape[0], da_MK)
    join_heads(dqkv_MW[:, : block.qkv.N], *grads, angles=angles(block, inputs), inverse=True)
    if block.normed_heads:
        normed_heads_backward(block, kept, raw_MN, dqkv_MW)
    return dqkv_MW


def angles(block: "Block", inputs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """cos and sin of RoPE, [T or B * T, D]; None in a layer without it."""
    if not block.rotates:
        return None
    return inputs["cos"].reshape(-1, block.head_dim), inputs["sin"].reshape(-1, block.head_dim)


def normed_heads(block: "Block", raw_MN: Tensor, out_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Qwen3's RMSNorm over each head of q and k; v is copied. Returns both 1 / rms, one a token and head."""
    found = []
    for norm, columns in _head_columns(block):
        raw, out = (t[:, columns].unflatten(1, (-1, block.head_dim)) for t in (raw_MN, out_MN))
        flat = raw.reshape(-1, block.head_dim)
        rstd = torch.empty(len(flat), dtype=statistics_dtype(raw_MN), device=raw_MN.device)
        result = torch.empty_like(flat)
        rms_norm(flat, current(norm, "weight"), norm.variance_epsilon, result, rstd)
        out.copy_(result.view(out.shape))
        found.append(rstd)
    rest = block.q_width + block.kv_width
    out_MN[:, rest:] = raw_MN[:, rest:]
    return found[0], found[1]


def normed_heads_backward(block: "Block", kept: Attended, raw_MN: Tensor | None, dqkv_MW: Tensor) -> None:
    """The backward of `normed_heads`, in place."""
    assert raw_MN is not None
    assert kept.head_rstd is not None
    for (norm, columns), rstd in zip(_head_columns(block), kept.head_rstd, strict=True):
        raw = raw_MN[:, columns].reshape(-1, block.head_dim)
        view = dqkv_MW[:, columns].unflatten(1, (-1, block.head_dim))
        result = torch.empty_like(raw)
        rms_norm_backward(view.reshape(-1, block.head_dim), raw, current(norm, "weight"), rstd, None, result)
        view.copy_(result.view(view.shape))


def _head_columns(block: "Block") -> list[tuple[Any, slice]]:
    attention = block.attention
    return [
        (attention.q_norm, slice(0, block.q_width)),
        (attention.k_norm, slice(block.q_width, block.q_width + block.kv_width)),
    ]


def attention_output(block: "Block", result: Tensor, x_MH: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The residual stream [M, H] after the attention, and the low rank product of its projection."""
    a_MW = block.output.room(x_MH.shape[0], x_MH)
    join_heads(a_MW[:, : block.output.K], result.detach())
    x1_MH = block.output.forward(a_MW, factors, residual_MN=x_MH)
    return x1_MH, block.output.low_rank(a_MW)
