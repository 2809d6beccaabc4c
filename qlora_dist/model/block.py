"""A decoder layer of the Llama family as one autograd function with a backward written out.

Every product of the base weight and its LoRA branch is one GEMM: [x | xA'] [W | sB]' forward and [dy | dy sB] [W ; A]
backward, where W is dequantised into a buffer that has room for the factors beside it; q, k, v share one, and gate, up.
The residual additions ride in the GEMMs too. RMSNorm, RoPE and SwiGLU are a kernel each, and cheap enough to be done
once more in the backward. What else is recomputed is the `Plan`'s to say.

M tokens of the micro-batch (B rows of T), H hidden size, F intermediate size, D head size, K inputs and N outputs of a
projection, R its total LoRA rank, P that rank padded for the GEMM.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_dist.kernels.rmsnorm import rms_norm_backward
from qlora_dist.kernels.swiglu import swiglu, swiglu_backward
from qlora_dist.model.attention import attend, attention_backward, attention_output
from qlora_dist.model.fp8 import Fp8Projection
from qlora_dist.model.host_store import Stored, store_of
from qlora_dist.model.norm import normed
from qlora_dist.model.projection import Projection, current
from qlora_dist.plan.activations import LayerShape


@dataclass(frozen=True)
class Plan:
    """What a layer keeps from its forward for its backward; the rest is computed again.

    attention: q, k, v and the attention's output. gate_up: the inputs of SwiGLU. weights: the frozen weights in the
    compute dtype, from step to step. norms: what both norms gave.

    input_on_host, attention_on_host: the layer's input, which is kept in any case, and what `attention` keeps, wait in
    host memory.
    """

    attention: bool = True
    gate_up: bool = True
    weights: bool = False
    norms: bool = False
    input_on_host: bool = False
    attention_on_host: bool = False


KEEP_ALL, RECOMPUTE_ALL = Plan(), Plan(attention=False, gate_up=False)


class Block:
    """The fused forward and backward of one decoder layer; its weights stay where PEFT and transformers keep them.

    Args:
        compute: how the frozen weights are multiplied, `bf16` (any float) or `fp8`.

    Attributes:
        trains: whether the last forward with gradients leads to a backward; one before the first adapter does not.
    """

    def __init__(self, layer: Any, compute: Literal["bf16", "fp8"] = "bf16"):
        attention, mlp = layer.self_attn, layer.mlp
        self.layer, self.attention = layer, attention
        self.compute = compute
        kind = Fp8Projection if compute == "fp8" else Projection
        self.qkv = kind(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = kind(attention.o_proj)
        self.gate_up = kind(mlp.gate_proj, mlp.up_proj)
        self.down = kind(mlp.down_proj)
        self.head_dim: int = attention.head_dim
        self.q_width, self.kv_width = self.qkv.parts[0].rows.stop, self.qkv.parts[1].rows.stop
        self.kv_width -= self.q_width
        self.normed_heads = hasattr(attention, "q_norm")
        # Mistral's attention reads it from the config; Qwen's has its own, None in layers that look everywhere.
        config_window = getattr(attention.config, "sliding_window", None) if "Mistral" in type(layer).__name__ else None
        self.window: int | None = getattr(attention, "sliding_window", config_window)
        # Some of SmolLM3's layers see no positions.
        self.rotates: bool = bool(getattr(attention, "use_rope", True))
        self.plan = KEEP_ALL
        self.trains = True

    def set_plan(self, plan: Plan) -> None:
        """Use `plan` from the next forward on."""
        self.plan = plan
        for projection in self.projections:
            projection.keep_weight(plan.weights)

    @property
    def sharded(self) -> bool:
        """Whether the frozen weights are gathered for each use."""
        return any("current_weight" in part.base.__dict__ for p in self.projections for part in p.parts)

    @property
    def shape(self) -> LayerShape:
        """Its sizes."""
        ranks = (self.qkv.R, self.output.R, self.gate_up.R, self.down.R)
        return LayerShape(self.qkv.K, self.down.K, self.q_width, self.kv_width, self.normed_heads, ranks)

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All four, in the order of their factors."""
        return self.qkv, self.output, self.gate_up, self.down

    def factors(self) -> list[Tensor]:
        """The LoRA factors of the layer, as the autograd function takes them."""
        return [factor for projection in self.projections for factor in projection.factors()]

    @property
    def num_factors(self) -> int:
        """How many there are."""
        return sum(2 * len(projection.adapted) for projection in self.projections)

    def split(self, values: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """`values`, one a factor, by projection."""
        parts, start = [], 0
        for projection in self.projections:
            count = 2 * len(projection.adapted)
            parts.append(values[start : start + count])
            start += count
        return parts


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, block: Block, inputs: dict[str, Any], x_BTH: Tensor, *factors: Tensor
    ) -> Tensor:  # x_BTH: the residual stream
        plan, (qkv_f, out_f, gu_f, down_f) = block.plan, block.split(factors)
        x_MH = x_BTH.reshape(-1, x_BTH.shape[-1])
        store = store_of(x_BTH.device)
        hosts_input, hosts_attention = (inputs["trains"] and on for on in (plan.input_on_host, plan.attention_on_host))
        if hosts_input or hosts_attention:
            store.begin_layer()
        held: list[Tensor | Stored | None] = [store.put(x_BTH) if hosts_input else x_BTH]
        kept, result, raw_MN = attend(block, inputs, x_BTH.shape, x_MH, qkv_f, differentiable=plan.attention)
        x1_MH, out_xa = attention_output(block, result, x_MH, out_f)
        gu_MW, gu_xa, rstd_M, normed_MW = gate_and_up(block, x1_MH, gu_f)
        h_MW = block.down.room(x_MH.shape[0], x_MH)
        swiglu(*halves(block, gu_MW), h_MW[:, : block.down.K])
        # The output is no view: FSDP hangs its hook on it.
        y_BTH = torch.empty_like(x_BTH)
        block.down.forward(h_MW, down_f, residual_MN=x1_MH, out_MN=y_BTH.view(x_MH.shape))
        ctx.block, ctx.inputs, ctx.shape = block, inputs, x_BTH.shape
        if plan.attention:
            held += [t if t is None or not hosts_attention else store.put(t) for t in (x1_MH, result, raw_MN)]
        # Autograd saves tensors; what is on the host stays with the layer.
        ctx.on_host = [one if isinstance(one, Stored) else None for one in held]
        ctx.save_for_backward(*factors, *(None if isinstance(one, Stored) else one for one in held))
        ctx.attended = kept if plan.attention else None
        ctx.out_xa = out_xa if plan.attention else None
        ctx.gate_up = (gu_MW, gu_xa, rstd_M, normed_MW) if plan.gate_up else None
        ctx.down_xa = block.down.low_rank(h_MW)
        return y_BTH

    @staticmethod
    def backward(ctx: Any, dy_BTH: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        block: Block = ctx.block
        saved = ctx.saved_tensors
        factors, saved = saved[: block.num_factors], saved[block.num_factors :]
        x_BTH, *of_attention = (
            one if away is None else store_of(dy_BTH.device).get(away)
            for one, away in zip(saved, ctx.on_host, strict=True)
        )
        ctx.on_host = None
        del saved
        qkv_f, out_f, gu_f, down_f = block.split(factors)
        x_MH = x_BTH.reshape(-1, x_BTH.shape[-1])
        kept, out_xa = ctx.attended, ctx.out_xa
        if kept is None:
            kept, result, raw_MN = attend(block, ctx.inputs, ctx.shape, x_MH, qkv_f)
            x1_MH, out_xa = attention_output(block, result, x_MH, out_f)
        else:
            x1_MH, result, raw_MN = of_attention
        del of_attention
        gu_MW, gu_xa, rstd2_M, n_MW = ctx.gate_up or gate_and_up(block, x1_MH, gu_f)
        ctx.attended = ctx.out_xa = ctx.gate_up = None

        dy_MW = widened(dy_BTH, block.down)
        dh_MF = block.down.input_gradient(dy_MW, down_f)
        # The gradients of gate and up take their places, and SwiGLU's output, made again, that of its gradient.
        gate_MF, up_MF = halves(block, gu_MW)
        swiglu_backward(dh_MF, gate_MF, up_MF, gate_MF, up_MF, dh_MF)
        down_g = block.down.factor_gradients(dy_MW, dh_MF, ctx.down_xa)
        del dh_MF
        dn_MH = block.gate_up.input_gradient(gu_MW, gu_f)
        norm2 = block.layer.post_attention_layernorm
        if n_MW is None:
            n_MW, _ = normed(norm2, x1_MH, block.gate_up)
        gu_g = block.gate_up.factor_gradients(gu_MW, n_MW[:, : block.gate_up.K], gu_xa)
        del gu_MW, gate_MF, up_MF, n_MW
        dx1_MW = block.output.output_room(x_MH.shape[0], x_MH)
        dx1_MH = dx1_MW[:, : block.output.N]
        rms_norm_backward(dn_MH, x1_MH, current(norm2, "weight"), rstd2_M, dy_MW[:, : block.down.N], dx1_MH)
        del dn_MH, dy_MW

        da_MK = block.output.input_gradient(dx1_MW, out_f)
        a_MK = result.transpose(1, 2).reshape(x_MH.shape[0], block.output.K)
        out_g = block.output.factor_gradients(dx1_MW, a_MK, out_xa)
        dqkv_MW = attention_backward(block, ctx.inputs, ctx.shape, kept, raw_MN, da_MK)
        del da_MK, a_MK, result, raw_MN
        norm1 = block.layer.input_layernorm
        n1_MW = kept.normed_MW
        if n1_MW is None:
            n1_MW, _ = normed(norm1, x_MH, block.qkv)
        n1_MK = n1_MW[:, : block.qkv.K]
        if not ctx.needs_input_grad[2]:
            qkv_g = block.qkv.factor_gradients(dqkv_MW, n1_MK, kept.xa_MR, qkv_f)
            return (None, None, None, *qkv_g, *out_g, *gu_g, *down_g)
        dn1_MH = block.qkv.input_gradient(dqkv_MW, qkv_f)
        qkv_g = block.qkv.factor_gradients(dqkv_MW, n1_MK, kept.xa_MR)
        del dqkv_MW, n1_MW, n1_MK
        # As wide as the layer before this one wants it, which is of the same make.
        dx_MW = block.down.output_room(x_MH.shape[0], x_MH)
        dx_MH = dx_MW[:, : block.down.N]
        rms_norm_backward(dn1_MH, x_MH, current(norm1, "weight"), kept.rstd_M, dx1_MH, dx_MH)
        WIDE.clear()
        WIDE.append(StorageWeakRef(dx_MW.untyped_storage()))
        return (None, None, dx_MH.view(ctx.shape), *qkv_g, *out_g, *gu_g, *down_g)


# The last gradient that a layer gave, in a buffer with room beside it.
WIDE: list[StorageWeakRef] = []


def widened(dy_BTH: Tensor, projection: Projection) -> Tensor:
    """dy in the first N columns of [M, N + P]: as it lies where a fused layer has made it, else a copy."""
    rows, width = dy_BTH.shape[0] * dy_BTH.shape[1], projection.N + projection.padded_rank(dy_BTH.device)
    storage = dy_BTH.untyped_storage()
    if (
        any(ref.cdata == storage._cdata and not ref.expired() for ref in WIDE)
        and dy_BTH.stride() == (dy_BTH.shape[1] * width, width, 1)
        and dy_BTH.storage_offset() == 0
        and storage.nbytes() == rows * width * dy_BTH.element_size()
    ):
        return dy_BTH.as_strided((rows, width), (width, 1))
    dy_MW = projection.output_room(rows, dy_BTH)
    dy_MW[:, : projection.N] = dy_BTH.reshape(rows, projection.N)
    return dy_MW


def run_block(block: Block, x_BTH: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """The layer's output [B, T, H].

    Args:
        cos, sin: [B or 1, T, D], as transformers' rotary embedding gives them.
        mask: as transformers makes it for `sdpa`; None is causal.
        kwargs: what else the attention function takes.
    """
    factors = block.factors()
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_BTH, *factors))
    if torch.is_grad_enabled():
        block.trains = trains
    inputs = {"cos": cos, "sin": sin, "mask": mask, "kwargs": kwargs, "trains": trains}
    output: Tensor = _BlockFunction.apply(block, inputs, x_BTH, *factors)
    return output


def gate_and_up(block: Block, x1_MH: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gate and up in the first columns of [M, N + P], their low rank products, 1 / rms of x1 [M], and x1 normed.

    The last is as of `normed`, None where the plan does not keep it.
    """
    n_MW, rstd_M = normed(block.layer.post_attention_layernorm, x1_MH, block.gate_up)
    gu_MW = block.gate_up.output_room(x1_MH.shape[0], x1_MH)
    block.gate_up.forward(n_MW, factors, out_MN=gu_MW[:, : block.gate_up.N])
    return gu_MW, block.gate_up.low_rank(n_MW), rstd_M, n_MW if block.plan.norms else None


def halves(block: Block, gu_MW: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up, [M, F] each."""
    features = block.down.K
    return gu_MW[:, :features], gu_MW[:, features : 2 * features]
