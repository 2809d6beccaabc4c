"""Fused layers with `model.compute: fp8` against the same arithmetic written out by hand, and against none of it.

The reference is one decoder layer after the other in plain PyTorch and autograd, in float64, where a product with a
frozen weight rounds both sides to e4m3 by a scale a row: the joint q, k, v and the joint gate and up as one product
each, since their gradients' rows are. What is left is the order of float64 sums; the scales are float32 on both sides.
"""

from copy import deepcopy
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import GPT2Config, GPT2LMHeadModel

from qlora_dist.config.errors import UserError
from qlora_dist.model.block import KEEP_ALL, RECOMPUTE_ALL, Plan
from qlora_dist.model.fp8 import check_fp8
from qlora_dist.model.fused import fuse, set_plan
from tests.single import small_config
from tests.unit.test_fused_block import (
    ADAPTERS,
    FAMILIES,
    adapted,
    assert_close,
    batch,
    losses,
    quantise,
    with_float64_norms,
)  # fmt: skip


def e4m3(x: Tensor) -> Tensor:
    """x rounded to e4m3 over a float32 scale for each row, as float64."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-30) * (1 / 448)
    return (x * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()


class Fp8Linear(torch.autograd.Function):
    """x W' with both sides rounded, in the backward anew and by other rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return e4m3(x) @ e4m3(weight).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return e4m3(dy) @ e4m3(ctx.weight.t()).t(), None


def joined(x: Tensor, layers: list[Any]) -> Tensor:
    """The outputs of PEFT's linear layers over the same input, side by side."""
    base = Fp8Linear.apply(x, torch.cat([layer.base_layer.weight for layer in layers]))
    branches = []
    for layer in layers:
        bias = layer.base_layer.bias
        branch = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        branches.append(branch if bias is None else branch + bias)
    return base + torch.cat(branches, dim=1)


def decoder_layer(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, T, H] to [B, T, H], causal, without a window or normed heads."""
    attention, mlp, (batch_size, length, width) = layer.self_attn, layer.mlp, x.shape
    flat = x.reshape(-1, width)
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    qkv = joined(layer.input_layernorm(flat), projections).view(batch_size, length, -1, attention.head_dim)
    q, k, v = qkv.transpose(1, 2).split([4, 2, 2], dim=1)

    def turned(heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return heads * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    mixed = scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
    flat = flat + joined(mixed.transpose(1, 2).reshape(len(flat), -1), [attention.o_proj])
    gate, up = joined(layer.post_attention_layernorm(flat), [mlp.gate_proj, mlp.up_proj]).chunk(2, dim=1)
    return (flat + joined(silu(gate) * up, [mlp.down_proj])).view(x.shape)


def by_hand(model: Any) -> nn.Module:
    """The same model, its decoder layers written out."""
    made = deepcopy(model)
    for layer in made.get_base_model().model.layers:

        def forward(hidden_states: Tensor, layer: Any = layer, **kwargs: Any) -> Tensor:
            return decoder_layer(layer, hidden_states, *kwargs["position_embeddings"])

        layer.forward = forward
    return made


PLANS = {"keep": KEEP_ALL, "recompute": RECOMPUTE_ALL, "weights kept": Plan(weights=True)}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["llama", "llama with biases"])
def test_fp8_layers_equal_the_arithmetic_written_out(family: str, plan: str) -> None:
    exact = with_float64_norms(adapted(FAMILIES[family](), torch.float64, ADAPTERS["all linear"]))
    fused = deepcopy(exact)
    blocks = fuse(fused, compute="fp8")
    assert [block.compute for block in blocks] == ["fp8", "fp8"]
    set_plan(blocks, PLANS[plan])
    inputs = batch(False)
    wanted, wanted_grads, wanted_dx = losses(by_hand(exact), inputs, fused=False)
    for _ in range(2):  # once more from what the first has kept
        loss, grads, dx = losses(fused, inputs, fused=True)
        assert_close(loss, wanted, 1e-9, "loss")
        assert_close(dx, wanted_dx, 1e-6, "embedding")
        for name, grad in grads.items():
            assert_close(grad, wanted_grads[name], 1e-6, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_costs_what_two_roundings_to_4_bits_cost(family: str) -> None:
    """Each product is off by some 4 % of its norm; a gradient has gone through eight of them one after the other."""
    stock = with_float64_norms(adapted(FAMILIES[family](), torch.float64, ADAPTERS["all linear"]))
    fused = deepcopy(stock)
    fuse(fused, compute="fp8")
    loss, grads, dx = losses(fused, batch(True), fused=True)
    wanted, wanted_grads, wanted_dx = losses(stock, batch(True), fused=False)
    assert_close(loss, wanted, 0.02, "loss")
    every, wanted_every = (torch.cat([g.flatten() for g in part.values()]) for part in (grads, wanted_grads))
    for found, right in ((dx, wanted_dx), (every, wanted_every)):
        error = (torch.linalg.vector_norm(found - right) / torch.linalg.vector_norm(right)).item()
        assert 0.005 < error < 0.15


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_weights_in_4_bits_are_those_that_bitsandbytes_gives(double: bool) -> None:
    """Straight from 4 bits to e4m3, against dequantised weights in layers without quantisation."""
    packed = adapted(FAMILIES["qwen2"](), torch.float32, ADAPTERS["all linear"])
    quantise(packed, double)
    plain = adapted(FAMILIES["qwen2"](), torch.float32, ADAPTERS["all linear"])
    for ours, theirs in zip(plain.modules(), packed.modules(), strict=True):
        base: Any = getattr(theirs, "base_layer", None)
        if base is not None:
            weight: Any = dequantize_4bit(base.weight.data, base.weight.quant_state)
            ours.base_layer.weight.data = weight  # type: ignore[union-attr]
    for model in (packed, plain):
        fuse(model, compute="fp8")
    loss, grads, _ = losses(packed, batch(False), fused=True)
    wanted, wanted_grads, _ = losses(plain, batch(False), fused=True)
    assert torch.equal(loss, wanted)
    for name, grad in grads.items():
        assert torch.equal(grad, wanted_grads[name]), name


def test_what_is_kept_of_the_weights_is_given_back() -> None:
    model = adapted(FAMILIES["llama"](), torch.float32, ADAPTERS["all linear"])
    blocks = fuse(model, compute="fp8")
    set_plan(blocks, Plan(weights=True))
    losses(model, batch(False), fused=True)
    qkv: Any = blocks[1].qkv
    kept = {turned: scaled.values_RC.shape for turned, scaled in qkv._resident.items()}
    assert kept == {False: (128, 64), True: (64, 128)}
    set_plan(blocks, KEEP_ALL)
    assert not qkv._resident


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [({"lora_dropout": 0.1}, "lora_dropout"), ({"use_dora": True}, "use_dora")],
)
def test_fp8_refuses_layers_that_would_run_otherwise(adapter: dict[str, Any], reason: str) -> None:
    model = adapted(FAMILIES["llama"](), torch.float32, ADAPTERS["all linear"] | adapter)
    with pytest.raises(UserError, match=f"model.compute: fp8 needs fused layers.*{reason}"):
        fuse(model, compute="fp8")


def test_fp8_refuses_other_families_and_odd_sizes() -> None:
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=61))
    with pytest.raises(UserError, match="layers of a gpt2 model are not fused"):
        fuse(other, compute="fp8")
    config = FAMILIES["llama"]()
    config.intermediate_size = 72
    with pytest.raises(UserError, match="72 inputs or outputs"):
        fuse(adapted(config, torch.float32, ADAPTERS["all linear"]), compute="fp8")


def test_fp8_refuses_what_has_none(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fused is never"):
        small_config(tmp_path / "run", tmp_path, model={"compute": "fp8", "fused": "never"})
    model = small_config(tmp_path / "run", tmp_path, model={"compute": "fp8"}).model
    with pytest.raises(UserError, match="fuses on a GPU only"):
        check_fp8(model, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    with pytest.raises(UserError, match="an A100 has no FP8"):
        check_fp8(model, torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(UserError, match="compute_dtype is float16"):
        check_fp8(model, torch.device("cuda"), torch.float16)
    check_fp8(model, torch.device("cuda"), torch.bfloat16)
