"""The fused path put into a transformers + PEFT model: same parameters, same names, other arithmetic.

A layer that cannot run fused keeps transformers' and PEFT's own forward, and is told of once.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn

from qlora_dist.config.errors import UserError
from qlora_dist.kernels.linear_cross_entropy import CHUNK_BYTES, linear_cross_entropy
from qlora_dist.model.block import KEEP_ALL, Block, Plan, run_block
from qlora_dist.model.embedding import StoredHead
from qlora_dist.model.fp8 import misfit
from qlora_dist.model.norm import fuse_norm

# Decoder layers that are Llama's but for what `Block` knows of: biases, normed heads, sliding windows.
LAYER_CLASSES = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer",
                           "SmolLM3DecoderLayer"})  # fmt: skip
SUBLAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def fuse(
    model: nn.Module, notice: Callable[[str], None] = print, compute: Literal["bf16", "fp8"] = "bf16"
) -> list[Block]:
    """Give the decoder layers that allow it and the last norm their fused forward, and the head its fused loss.

    Generation, disabled adapters and key-value caches go on through the usual forward.

    Args:
        notice: is told once, with the reason, of layers that stay as they are.
        compute: how the frozen weights of the layers are multiplied.

    Returns:
        The fused layers, in order.

    Raises:
        UserError: `compute` is fp8, and a layer cannot run so.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    blocks: list[Block] = []
    reasons: Counter[str] = Counter()
    for module in base.modules():
        if type(module).__name__ not in LAYER_CLASSES:
            continue
        reason = why_not(module, base.config)
        if reason is None:
            blocks.append(fuse_layer(module, compute))
        else:
            reasons[reason] += 1
    if compute == "fp8":
        refuse_in_fp8(base, blocks, reasons)
    for reason, count in reasons.items():
        notice(f"{count} decoder layers run unfused, and slower: {reason}")
    base.windowed = any(block.window is not None for block in blocks)
    base.attends_by_documents = bool(blocks) and not reasons and base.config._attn_implementation == "sdpa"
    fuse_norm(base)
    fuse_head(base)
    return blocks


def refuse_in_fp8(base: Any, blocks: list[Block], reasons: Iterable[str]) -> None:
    """Raise UserError where a layer would run in another way than in FP8: a run is one or the other."""
    for reason in reasons:
        raise UserError("fp8-needs-fused", reason=reason)
    if not blocks:
        raise UserError("fp8-needs-fused", reason=f"the layers of a {base.config.model_type} model are not fused")
    for projection in blocks[0].projections:
        if (odd := misfit(projection)) is not None:
            raise UserError("fp8-sizes", reason=odd)


def attends_by_documents(model: nn.Module) -> bool:
    """Whether all of its layers take the borders of documents in place of a mask."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return getattr(base, "attends_by_documents", False)


def has_window(model: nn.Module) -> bool:
    """Whether some fused layer sees a window of the tokens before each."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return getattr(base, "windowed", False)


def why_not(layer: Any, config: Any) -> str | None:
    """The reason for which a decoder layer cannot run fused; None where it can."""
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if getattr(config, "attention_dropout", 0.0):
        return "the base model has attention dropout"
    if config._attn_implementation == "eager":
        return "model.attn_implementation is eager"
    if getattr(config, "pretraining_tp", 1) > 1:
        return "the base model was laid out for tensor parallelism"
    for name in SUBLAYERS:
        linear: Any = layer.get_submodule(name)
        base = getattr(linear, "base_layer", linear)
        if not isinstance(base, nn.Linear):
            return f"{name} is no linear layer"
        if not hasattr(linear, "lora_A"):
            continue
        if len(linear.active_adapters) != 1 or linear.merged:
            return "it has more than one adapter, or a merged one"
        adapter = linear.active_adapters[0]
        if adapter in linear.lora_variant:
            return "the adapter uses DoRA (adapter.use_dora)"
        if adapter in linear.lora_dropout and not isinstance(linear.lora_dropout[adapter], nn.Identity):
            return "the adapter has dropout (adapter.lora_dropout)"
        if adapter in linear.lora_B and linear.lora_B[adapter].bias is not None:
            return "the adapter has biases"
    if any(p.requires_grad for n, p in layer.named_parameters() if ".lora_" not in n):
        return "weights beside the adapter train (adapter.modules_to_save)"
    return None


def fuse_layer(layer: Any, compute: Literal["bf16", "fp8"] = "bf16") -> Block:
    """Put a fused forward in front of a decoder layer's own."""
    block, usual = Block(layer, compute), layer.forward
    linears = [layer.get_submodule(name) for name in SUBLAYERS]

    def forward(
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        off = any(getattr(linear, "disable_adapters", False) or getattr(linear, "merged", False) for linear in linears)
        if past_key_values is not None or use_cache or off or position_embeddings is None:
            output: Tensor = usual(
                hidden_states, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **kwargs,
            )  # fmt: skip
            return output
        if attention_mask is not None and attention_mask.numel() == 1:
            attention_mask = None
        told = {name: value for name, value in kwargs.items() if name in ATTENTION_KWARGS and value is not None}
        return run_block(block, hidden_states, *position_embeddings, attention_mask, **told)

    layer.forward = forward
    # The block recomputes by its own plan.
    layer.gradient_checkpointing = False
    return block


# Borders of packed documents, as flash attention takes them.
ATTENTION_KWARGS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})


def set_plan(blocks: list[Block], plan: Plan = KEEP_ALL) -> None:
    """Use one plan for all layers."""
    for block in blocks:
        block.set_plan(plan)


class HeadLoss:
    """What turns the head's logits into a loss while it is set: the predictions that count, and their targets.

    index_N: int64, rows of the flattened [B * T] hidden states. target_N: int64. chunk_bytes: of logits at a time.
    """

    chunk_bytes = CHUNK_BYTES

    def __init__(self) -> None:
        self.index_N: Tensor | None = None
        self.target_N: Tensor | None = None


def fuse_head(base: Any) -> HeadLoss | None:
    """Let the head give the sum of token losses in place of logits while its `fused_loss` asks for it.

    The loss is made inside the head's own forward, so that whatever gathers its weight for that serves here too.
    None where the head trains or is wrapped: its logits are needed then.
    """
    head = base.get_output_embeddings()
    stored = isinstance(head, StoredHead)
    if not stored and (type(head) is not nn.Linear or head.weight.requires_grad):
        return None
    if head.bias is not None:
        return None
    if getattr(base.config, "final_logit_softcapping", None) or getattr(base.config, "logit_scale", 1.0) != 1.0:
        return None
    asked = HeadLoss()
    head.fused_loss = asked

    def with_loss(usual: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(hidden_states: Tensor) -> Tensor:
            if asked.index_N is None or asked.target_N is None:
                return usual(hidden_states)
            hidden_NH = hidden_states.reshape(-1, hidden_states.shape[-1])[asked.index_N]
            if stored:
                weight = head.slices(hidden_NH.device)
            else:
                current = head.__dict__.get("current_weight")
                weight = head.weight if current is None else current
            return linear_cross_entropy(hidden_NH, weight, asked.target_N, chunk_bytes=asked.chunk_bytes)

        return forward

    head.with_loss = with_loss
    head.forward = with_loss(head.forward)
    return asked


def limit_logits(model: nn.Module, most_bytes: int) -> None:
    """Let a fused head hold no more than so many bytes of logits at a time, 0.5 GiB in any case."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    asked = getattr(base.get_output_embeddings(), "fused_loss", None)
    if asked is not None:
        asked.chunk_bytes = min(most_bytes, CHUNK_BYTES)


def fused_loss_sum(model: nn.Module, index_N: Tensor, target_N: Tensor, **inputs: Any) -> Tensor | None:
    """The sum of token losses through the fused head, an fp32 scalar; None where the model has none."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    asked = getattr(base.get_output_embeddings(), "fused_loss", None)
    if asked is None:
        return None
    asked.index_N, asked.target_N = index_N, target_N
    try:
        loss: Tensor = model(**inputs).logits
    finally:
        asked.index_N = asked.target_N = None
    return loss
