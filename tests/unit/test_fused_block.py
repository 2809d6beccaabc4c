"""The fused decoder layer against transformers + PEFT, in float64 and fp32, for each family and plan.

In float64 the reference is plain PEFT over dequantised weights with a float64 RMSNorm (transformers' computes in fp32):
what is left is the order of sums, about 1e-15 relative; 1e-9 leaves room for depth. In fp32 nothing is patched in the
reference; 1e-6 of the norm of all gradients is a few roundings of fp32 (6e-8; a single weight's gradient can be a small
difference of large numbers).
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM as Auto
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config, SmolLM3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_dist.model import attention as attention_module
from qlora_dist.model import block as block_module
from qlora_dist.model import host_store
from qlora_dist.model.block import KEEP_ALL, RECOMPUTE_ALL, Plan
from qlora_dist.model.fused import attends_by_documents, fuse, fused_loss_sum, set_plan
from qlora_dist.model.host_store import PACKED, HostStore, store_of

# bitsandbytes' CPU kernel dequantises wrongly where the inputs are no multiple of the block of 64 values.
SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, attn_implementation="sdpa",
)  # fmt: skip
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama with biases": lambda: LlamaConfig(**SIZES, attention_bias=True),
    "tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral with a window": lambda: MistralConfig(**SIZES, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "smollm3": lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0], pad_token_id=0),
}
PLANS = {"keep": KEEP_ALL, "recompute": RECOMPUTE_ALL, "gate and up again": Plan(gate_up=False),
         "attention again": Plan(attention=False), "weights kept": Plan(weights=True), "norms kept": Plan(norms=True),
         "weights alone": Plan(attention=False, gate_up=False, weights=True),
         "input on the host": Plan(attention=False, input_on_host=True),
         "attention on the host": Plan(gate_up=False, attention_on_host=True),
         "all on the host": Plan(norms=True, input_on_host=True, attention_on_host=True)}  # fmt: skip
ADAPTERS: dict[str, dict[str, Any]] = {
    "all linear": dict(r=4, lora_alpha=12, target_modules="all-linear"),
    "patterns": dict(r=4, lora_alpha=8, target_modules="all-linear", rank_pattern={"q_proj": 7, "up_proj": 2},
                     alpha_pattern={"v_proj": 3}, use_rslora=True),
    "some": dict(r=3, lora_alpha=6, target_modules=["k_proj", "gate_proj", "o_proj"]),
    "one layer": dict(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
}  # fmt: skip


class Float64RMSNorm(nn.Module):
    """RMSNorm in the dtype of its input."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def adapted(config: PretrainedConfig, dtype: torch.dtype, adapter: dict[str, Any]) -> nn.Module:
    torch.manual_seed(3)
    model = Auto.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.requires_grad_(False)
    made = get_peft_model(model, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **adapter))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * parameter.data.to(dtype)
    return made.train()


def with_float64_norms(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, Float64RMSNorm(child))
    return model


def batch(packed: bool) -> dict[str, Tensor]:
    torch.manual_seed(4)
    ids = torch.randint(0, 61, (2, 11))
    if not packed:
        return {"input_ids": ids}
    return {"input_ids": ids, "position_ids": torch.tensor([[*range(4), *range(7)], [*range(6), *range(5)]])}


def losses(model: nn.Module, inputs: dict[str, Tensor], fused: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss at some positions, the gradient of each adapter weight, and that of the embedding's output."""
    index_N = torch.tensor([1, 2, 9, 13, 14, 15, 20])
    target_N = torch.tensor([5, 60, 3, 17, 17, 0, 31])
    captured: list[Tensor] = []
    base: Any = model.get_base_model()
    handle = base.get_input_embeddings().register_forward_hook(
        lambda module, args, output: captured.append(output.requires_grad_()) or output
    )
    if fused:
        loss = fused_loss_sum(model, index_N, target_N, use_cache=False, **inputs)
        assert loss is not None
    else:
        logits = model(use_cache=False, **inputs).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1)[index_N], target_N, reduction="sum")
    handle.remove()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, [*trained.values(), captured[0]])
    return loss.detach(), dict(zip(trained, grads, strict=False)), grads[-1]


def assert_close(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    assert torch.linalg.vector_norm(found - wanted) <= tolerance * torch.linalg.vector_norm(wanted), what


def compare(
    fused: nn.Module, stock: nn.Module, inputs: dict[str, Tensor], tolerance: float, together: bool = False
) -> None:
    loss, grads, dx = losses(fused, inputs, fused=True)
    wanted, wanted_grads, wanted_dx = losses(stock, inputs, fused=False)
    assert_close(loss, wanted, tolerance, "loss")
    assert_close(dx, wanted_dx, tolerance, "embedding")
    assert grads.keys() == wanted_grads.keys()
    if together:
        every, wanted_every = (torch.cat([g.flatten() for g in part.values()]) for part in (grads, wanted_grads))
        return assert_close(every, wanted_every, tolerance, "all gradients")
    for name, grad in grads.items():
        assert_close(grad, wanted_grads[name], tolerance, name)


def pairs() -> Iterator[Any]:
    for family in FAMILIES:
        for plan in PLANS:
            yield pytest.param(family, plan, "all linear", id=f"{family}-{plan}")
    for adapter in ADAPTERS:
        yield pytest.param("qwen2", "keep", adapter, id=f"qwen2-{adapter}")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(("family", "plan", "adapter"), pairs())
def test_fused_layers_equal_plain_peft_in_float64(
    family: str, plan: str, adapter: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = with_float64_norms(adapted(FAMILIES[family](), torch.float64, ADAPTERS[adapter]))
    fused = deepcopy(stock)
    blocks = fuse(fused)
    assert len(blocks) == 2
    set_plan(blocks, PLANS[plan])
    monkeypatch.setattr(store_of(torch.device("cpu")), "min_bytes", 1)
    compare(fused, stock, batch(packed), 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_borders_of_documents_do_what_the_mask_of_positions_does(family: str) -> None:
    """Two lines of two documents each; the first line ends in a token of padding, which nothing looks at."""
    stock = with_float64_norms(adapted(FAMILIES[family](), torch.float64, ADAPTERS["all linear"]))
    fused = deepcopy(stock)
    fuse(fused)
    assert attends_by_documents(fused)
    inputs = batch(True)
    borders = torch.tensor([0, 4, 11, 17, 22], dtype=torch.int32)
    told = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 11, "max_length_k": 11}
    given = inputs | told | {"attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool)}
    loss, grads, _ = losses(fused, given, fused=True)
    wanted, wanted_grads, _ = losses(stock, inputs, fused=False)
    assert_close(loss, wanted, 1e-9, "loss")
    for name, grad in grads.items():
        assert_close(grad, wanted_grads[name], 1e-9, name)
    # Borders elsewhere make another loss: they are what counts.
    moved = given | {"cu_seq_lens_q": torch.tensor([0, 6, 11, 17, 22], dtype=torch.int32)}
    assert not torch.isclose(losses(fused, moved, fused=True)[0], wanted, rtol=1e-4)


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_equal_stock_bitsandbytes_and_peft_in_fp32(family: str, double: bool) -> None:
    stock = adapted(FAMILIES[family](), torch.float32, ADAPTERS["all linear"])
    quantise(stock, double)
    fused = deepcopy(stock)
    fuse(fused)
    compare(fused, stock, batch(False), 1e-6, together=True)


def quantise(model: nn.Module, double: bool) -> None:
    """Put NF4 layers under the adapters, as bitsandbytes makes them."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if base is None:
            continue
        layer = bnb.nn.Linear4bit(
            base.in_features, base.out_features, bias=base.bias is not None, compute_dtype=torch.float32,
            quant_type="nf4", compress_statistics=double,
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(
            base.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=double, module=layer
        )
        if base.bias is not None:
            layer.bias = base.bias
        module.base_layer = layer.to("cpu").train()
        assert module.base_layer.weight.quant_state.nested == double


def test_generation_and_the_bare_base_go_through_the_usual_forward() -> None:
    stock = adapted(FAMILIES["llama"](), torch.float32, ADAPTERS["all linear"]).eval()
    fused = deepcopy(stock)
    fuse(fused)
    ids = batch(False)["input_ids"]
    kwargs = dict(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(fused.generate(**kwargs), stock.generate(**kwargs))
    with fused.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(fused(input_ids=ids).logits, stock(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3", "llama with one key head"])
@pytest.mark.parametrize("plan", ["input on the host", "attention on the host", "all on the host"])
def test_what_goes_to_the_host_comes_back_to_the_bit(family: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With five layers the first ones' storages die in the forward, and the last two's never leave."""
    # There k is less than an eighth of q, k and v.
    heads = {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 1} if family.endswith("head") else {}
    sizes = SIZES | {"num_hidden_layers": 5} | heads
    plain = adapted(type(FAMILIES[family.split()[0]]())(**sizes), torch.float32, ADAPTERS["all linear"])
    away = deepcopy(plain)
    set_plan(fuse(plain), replace(PLANS[plan], input_on_host=False, attention_on_host=False))
    set_plan(fuse(away), PLANS[plan])
    store = HostStore(torch.device("cpu"))
    store.min_bytes = 1
    monkeypatch.setattr(host_store, "SLAB_BYTES", 1)
    for module in (block_module, attention_module):
        monkeypatch.setattr(module, "store_of", lambda device: store)
    wanted, wanted_grads, _ = losses(plain, batch(False), fused=True)
    lines: list[list[tuple[int, bool, bool]]] = []
    sent: list[tuple[int, StorageWeakRef]] = []
    send = store._send
    monkeypatch.setattr(store, "_send", lambda one: (sent.append((store.group, StorageWeakRef(one))), send(one))[1])

    def see(*_: Any) -> None:
        # `losses` holds the first layer's input.
        gone = [ref.expired() for group, ref in sent if store.group - 4 < group < store.group - 1]
        assert gone
        assert all(gone), "nobody else holds them"
        sent.clear()
        kept = [ref() for ref in store.order]
        lines.append([(one.group, one.source is None, one.back is None) for one in kept if one is not None])

    away.get_base_model().get_output_embeddings().register_forward_pre_hook(see)  # type: ignore[operator]
    for _ in range(3):
        loss, grads, _ = losses(away, batch(False), fused=True)
        assert torch.equal(loss, wanted)
        assert all(torch.equal(grad, grads[name]) for name, grad in wanted_grads.items())
        away.zero_grad()
        if len(lines) == 1:
            taken = store.memory.taken
    # After the first step the host's memory is what it is.
    assert taken == store.memory.taken
    assert not store.leaving
    assert not store.coming
    # q, k and v together; the result, for both backwards; the log of the softmax's sums; the residual stream after it.
    of_attention = 4 + (family == "qwen3")
    each = {"input on the host": 1, "attention on the host": of_attention, "all on the host": 1 + of_attention}[plan]
    groups = [group for group, _, _ in lines[0]]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [each] * 5, "each storage once, by layer"
    assert all(gone == (group < max(groups) - 1) for group, gone, _ in lines[0])
    assert all(nowhere for _, _, nowhere in lines[0])


def test_what_is_needed_next_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a layer's backward the one before it has been sent for, and no other."""
    store = HostStore(torch.device("cpu"))
    stored = []
    for number in range(6):
        store.begin_layer()
        stored.append([store.put(torch.full((8,), float(number + part))) for part in (0, 0.5)])
    for number in reversed(range(6)):
        for part, one in zip((0, 0.5), stored[number], strict=True):
            assert torch.equal(store.get(one), torch.full((8,), number + part))
            there = [all(s.kept.source or s.kept.back for s in pair) for pair in stored]
            assert [n for n, here in enumerate(there) if here] == list(range(max(0, min(number - 1, 4)), number + 1))
        del stored[number], one
    assert not store.coming
    # A plan whose layers send less has less under way than the one before it.
    store.settle()
    small = []
    for _ in range(4):
        store.begin_layer()
        small.append(store.put(torch.zeros(1)))
    assert [one.kept.source is None for one in small] == [True, True, False, False]
    assert len(store.memory.free) + len(store.memory.returned) + len(small) == 12


def test_what_may_be_under_way_is_two_of_the_largest_layers_of_this_model() -> None:
    """Of one whose layers differ too, in its first forward and later; a model before it with larger ones is over."""
    store = HostStore(torch.device("cpu"))

    def forward_and_backward(sizes: Sequence[int]) -> list[int]:
        stored, under_way = [], []
        for size in sizes:
            store.begin_layer()
            stored.append(store.put(torch.zeros(size, dtype=torch.uint8)))
            under_way.append(store.leaving_bytes)
        while stored:
            store.get(stored.pop())
        return under_way

    assert forward_and_backward([100] * 5) == [100, 200, 200, 200, 200]
    forward_and_backward([1] * 5)
    assert forward_and_backward([1] * 5) == [1, 2, 2, 2, 2]
    assert max(forward_and_backward([1, 1, 1, 8, 1, 8, 8])) <= 16
    # What is known of a layer to come lets small ones leave without waiting.
    assert forward_and_backward([1, 1, 1, 8, 1, 8, 8]) == [1, 2, 3, 11, 12, 9, 16]


@pytest.mark.parametrize("sizes", [[64, 64, 96, 64], [128, 128, 192, 128], [128, 128, 160, 128]])
def test_hardly_more_of_the_hosts_memory_is_taken_than_is_used(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of 8B and 70B models, in KiB for MiB: pieces of a few tensors would lose up to 40 %."""
    monkeypatch.setattr(host_store, "FIRST_SLAB_BYTES", 2**18)
    monkeypatch.setattr(host_store, "SLAB_BYTES", 2**20)
    store = HostStore(torch.device("cpu"))
    stored = []
    for layer in range(1, 81):
        store.begin_layer()
        stored.append([store.put(torch.zeros(size * 2**10, dtype=torch.uint8)) for size in sizes])
        used = layer * sum(sizes) * 2**10
        # The last piece may be all but empty, which counts where there are few.
        assert used <= store.memory.taken <= used / PACKED + (0.7 if used < 12 * 2**20 else 0) * 2**20


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["input_layernorm"]}, "modules_to_save"),
    ],
)
def test_a_layer_that_cannot_run_fused_stays_as_it_is_and_is_told_of_once(adapter: dict[str, Any], reason: str) -> None:
    told: list[str] = []
    model = adapted(FAMILIES["llama"](), torch.float32, ADAPTERS["all linear"] | adapter)
    assert fuse(model, told.append) == []
    assert len(told) == 1
    assert reason in told[0]


@pytest.mark.parametrize(("family", "window"), [("mistral with a window", 5), ("llama", None)])
def test_flash_attention_is_called_with_the_models_window(
    family: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel itself needs a GPU; what it is asked for does not."""
    told: list[Any] = []

    def recorded(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        told.append(kwargs.get("sliding_window"))
        return (q + k.mean() + v.mean()).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", recorded)
    model = adapted(FAMILIES[family](), torch.float32, ADAPTERS["all linear"])
    fuse(model)
    model.get_base_model().config._attn_implementation = "flash_attention_2"
    losses(model, batch(False), fused=True)
    assert told == [window, window]
