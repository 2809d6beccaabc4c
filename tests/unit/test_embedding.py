"""Embedding and head in int8, NF4 and host memory: values, gradients, bytes, what is refused, and that they train."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.model import embedding as stored
from qlora_dist.model.adapter import attach_adapter, check_trainable
from qlora_dist.model.base import load_base
from qlora_dist.model.embedding import Stored, StoredHead, quantize_8bit, slice_rows
from qlora_dist.model.fused import fuse, fused_loss_sum
from qlora_dist.model.resolve import resolve_base
from qlora_dist.shard.frozen import FrozenUnit
from qlora_dist.shard.units import Unit
from qlora_dist.track.metrics import read_metrics
from tests.single import small_config, train_here
from tests.unit.test_fused_block import with_float64_norms

CPU = torch.device("cpu")
KINDS = ["8bit", "nf4", "host"]
IDS = torch.arange(3, 83).reshape(2, 40)


def load(folder: Path, **model: Any) -> Any:
    """In training mode: bitsandbytes computes in bf16 in evaluation on some CPUs."""
    return load_base(ModelConfig(name=str(folder), **model), folder, CPU).train()


def dequantised(module: Stored) -> Tensor:
    """The whole weight, by PyTorch's and bitsandbytes' own means."""
    if module.host is not None:
        return module.host
    if module.scale is not None:
        return (module.weight * module.scale[:, None]).to(module.dtype)
    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def with_small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "SLICE_BYTES", 1)
    monkeypatch.setattr(stored, "SLICE_ROWS", 16)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_the_weight(tiny_model: Path, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lookup and slices give the dequantised weight bit for bit, and that is as near to the weight as its format is."""
    with_small_slices(monkeypatch)
    plain = load(tiny_model, compute_dtype=dtype)
    model = load(tiny_model, compute_dtype=dtype, embedding=kind, head=kind)
    assert (model.dtype, model.device) == (plain.dtype, CPU)
    pairs = ((model.model.embed_tokens, plain.model.embed_tokens), (model.lm_head, plain.lm_head))
    for module, original in pairs:
        whole, weight = dequantised(module), original.weight
        assert whole.dtype == weight.dtype
        assert torch.equal(torch.cat([part.clone() for _, part in module.slices(CPU)]), whole)
        # Uniform errors of half a step, |row|max / 127 of 64 normal values; NF4's are 10 % of a normal weight.
        least, most = {"8bit": (0.003, 0.009), "nf4": (0.05, 0.12), "host": (0, 0)}[kind]
        error = (whole.float() - weight.float()).norm() / weight.float().norm()
        assert least <= error <= most + (0.002 if dtype == "bf16" and kind == "8bit" else 0)
    embedding = pairs[0][0]
    assert torch.equal(embedding(IDS), dequantised(embedding)[IDS])
    packed, state = quantize_4bit(pairs[1][1].weight.data, compress_statistics=True, quant_type="nf4")
    if kind == "nf4":
        assert torch.equal(dequantised(model.lm_head), dequantize_4bit(packed, state))


def test_slices_begin_where_blocks_do() -> None:
    """NF4 with double quantisation can be cut every 16,384 values; others anywhere."""
    weight = torch.zeros(1200, 96)
    packed, nested = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    packed.quant_state = nested
    assert slice_rows(packed, 10**6, 96, 2) * 96 % (64 * 256) == 0
    assert slice_rows(packed, 128256, 4096, 2) == slice_rows(weight, 128256, 4096, 2) == 2**27 // 8192
    assert slice_rows(weight, 50, 96, 2) == 50


def test_int8_rows_of_extremes() -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-30, -1e-30], [-3.0, 3.0], [1.0, 1.0 / 127 * 2.5]])
    rows, scale = quantize_8bit(weight)
    assert rows.tolist() == [[0, 0], [127, -127], [-127, 127], [127, 2]]
    torch.testing.assert_close((rows * scale[:, None])[:3], weight[:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_against_float64(
    tiny_model: Path, kind: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in float64, over the same dequantised weights: what is left is the order of sums."""
    with_small_slices(monkeypatch)
    index, target = torch.tensor([1, 2, 39, 40, 70]), torch.tensor([5, 300, 0, 17, 17])
    adapter = AdapterConfig(r=4, init_lora_weights="gaussian")
    base, plain = (load(tiny_model, quantization="none", **given) for given in ({"embedding": kind, "head": kind}, {}))
    for name in ("model.embed_tokens", "lm_head"):
        module = base.get_submodule(name)
        plain.get_submodule(name).weight.data = dequantised(module)
        module.dtype, module.host = torch.float64, None if module.host is None else module.host.double()
    model, reference = (
        with_float64_norms(attach_adapter(each, adapter, seed=1).double().train()) for each in (base, plain)
    )
    randomise_b(model)
    randomise_b(reference)
    if fused:
        fuse(model)
        loss = fused_loss_sum(model, index, target, input_ids=IDS, use_cache=False)
        assert loss is not None
    else:
        logits = model(IDS, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1)[index], target, reduction="sum")
    wanted = nn.functional.cross_entropy(
        reference(IDS, use_cache=False).logits.flatten(0, 1)[index], target, reduction="sum"
    )
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=0)
    for (name, found), (_, true) in zip(trained(model), trained(reference), strict=True):
        assert (found.grad - true.grad).norm() <= 1e-9 * true.grad.norm(), name


def trained(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def randomise_b(model: nn.Module) -> None:
    """As after some steps: otherwise the gradients of the A matrices are zero."""
    for seed, (name, parameter) in enumerate(trained(model)):
        if ".lora_B." in name:
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.data = 0.1 * drawn.to(parameter.dtype)


def test_nothing_of_the_head_is_kept_for_the_backward(tiny_model: Path) -> None:
    """Of the unfused forward either: its weight is made anew, so that it never exists whole."""
    saved: list[tuple[int, ...]] = []
    head = load(tiny_model, head="nf4").lm_head
    x = torch.randn(3, head.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)), lambda t: t):
        head(x)
    assert saved == []


# Bytes a weight: int8 and 4 bytes a row; a nibble, a byte a block, 4 bytes a 256 blocks.
BYTES = {"bf16": 4, "8bit": 1 + 4 / 64, "nf4": 0.5 + 1 / 64 + 4 / 64 / 256, "host": 0}


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_of_each(tiny_model: Path, kind: str) -> None:
    model = load(tiny_model, embedding=kind, head=kind)
    for module in (model.model.embed_tokens, model.lm_head):
        held = sum(p.untyped_storage().nbytes() for p in module.parameters())
        if kind == "8bit":
            held += module.scale.untyped_storage().nbytes()
        if kind == "nf4":
            state = module.weight.quant_state
            held += state.absmax.untyped_storage().nbytes() + state.state2.absmax.untyped_storage().nbytes()
        values = dequantised(module).numel() if kind != "bf16" else module.weight.numel()
        # The last of the blocks of 256 may be partial.
        assert values * BYTES[kind] <= held <= values * BYTES[kind] + 8


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights_are_stored_once(kind: str, own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(name="synthetic:llama-tiny-tied", embedding=kind, head=kind)
    folder = resolve_base(config)
    model = load_base(config, folder, CPU).train()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    assert head.host is embedding.host
    assert head.scale is embedding.scale
    assert torch.equal(embedding(IDS), dequantised(head)[IDS])
    attached = attach_adapter(model, AdapterConfig(r=4), seed=0)
    plain = attach_adapter(load_base(ModelConfig(name=config.name), folder, CPU), AdapterConfig(r=4), seed=0)
    assert check_trainable(attached) == check_trainable(plain)
    for embedding, head in ((kind, "bf16"), ("bf16", kind)):
        with pytest.raises(UserError, match="one weight for both; set both to the same"):
            load_base(config.model_copy(update={"embedding": embedding, "head": head}), folder, CPU)


def test_the_cache_is_the_same_whatever_is_stored(tiny_model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "nf4"
    first = load(tiny_model, cache_quantized=cache, embedding="8bit", head="nf4")
    again = load(tiny_model, cache_quantized=cache, embedding="8bit", head="nf4")
    other = load(tiny_model, cache_quantized=cache, embedding="host", head="bf16")
    direct = load(tiny_model, embedding="8bit", head="nf4")
    for name in ("model.embed_tokens", "lm_head"):
        wanted = dequantised(direct.get_submodule(name))
        assert torch.equal(dequantised(first.get_submodule(name)), wanted)
        assert torch.equal(dequantised(again.get_submodule(name)), wanted)
    stock = AutoModelForCausalLM.from_pretrained(cache, device_map={"": "cpu"}).train()
    assert torch.equal(other(IDS).logits, stock(IDS).logits)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], r".*\.embed_tokens|.*q_proj"])
def test_stored_weights_do_not_train(tiny_model: Path, targets: Any) -> None:
    model = load(tiny_model, embedding="8bit", head="nf4")
    with pytest.raises(
        UserError, match=r"adapter.target_modules names .* keeps frozen; set model\.(head|embedding)=bf16"
    ):
        attach_adapter(model, AdapterConfig(target_modules=targets), seed=0)
    with pytest.raises(UserError, match=r"adapter.modules_to_save names lm_head, whose weights model.head=nf4 keeps"):
        attach_adapter(model, AdapterConfig(modules_to_save=["lm_head"]), seed=0)


def test_an_embedding_of_another_kind_is_refused(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=32
    )
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"model\.embedding=nf4 needs a plain layer, which the Gemma3\w+ of a gemma3_text"
    ):
        load(tmp_path, embedding="nf4", head="nf4")


def test_a_head_with_biases(tmp_path: Path) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    made = PhiForCausalLM(
        PhiConfig(vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    nn.init.normal_(made.lm_head.bias)
    made.save_pretrained(tmp_path)
    plain, model = load(tmp_path), load(tmp_path, head="host")
    assert isinstance(model.lm_head, StoredHead)
    torch.testing.assert_close(model(IDS % 128).logits, plain(IDS % 128).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("embedding", "head", "fused"), [("8bit", "8bit", "always"), ("nf4", "nf4", "never"),
                                                          ("host", "host", "always")])  # fmt: skip
def test_a_run_with_each_trains_and_exports(
    tiny_model: Path, tmp_path: Path, embedding: str, head: str, fused: str
) -> None:
    adapter, evaluation = {"lora_dropout": 0.0}, {"eval_steps": 6}
    data = {"eval_split": 0.2}
    losses = {}
    for name, model in (("plain", {"fused": fused}), ("small", {"fused": fused, "embedding": embedding, "head": head})):
        config = small_config(
            tmp_path / name, tiny_model, adapter=adapter, data=data, eval=evaluation,
            model={"name": str(tiny_model), "compute_dtype": "fp32"} | model,
        )  # fmt: skip
        assert train_here(config)["state"] == "finished"
        losses[name] = [record["loss"] for record in read_metrics(tmp_path / name) if "loss" in record]
    difference = max(abs(a - b) for a, b in zip(losses["small"], losses["plain"], strict=True))
    assert losses["small"][-1] < losses["small"][0] - 0.1
    # Host memory holds the same weight; of the others the differences are 4e-4 and 3e-3 on this random model.
    assert difference <= {"host": 1e-5, "8bit": 2e-3, "nf4": 0.02}[head]
    stock = AutoModelForCausalLM.from_pretrained(tiny_model)
    exported = PeftModel.from_pretrained(stock, tmp_path / "small" / "adapter")
    assert exported(IDS).logits.isfinite().all()
    said = [json.loads((tmp_path / name / "adapter" / "adapter_config.json").read_text()) for name in losses]
    assert said[0] == said[1]


def test_a_checkpoint_knows_what_its_base_was(tiny_model: Path, tmp_path: Path) -> None:
    model = {"name": str(tiny_model), "compute_dtype": "fp32"}
    steps = {"max_steps": 1, "global_batch_size": 2}
    assert train_here(small_config(tmp_path, tiny_model, train=steps))["state"] == "finished"
    further = steps | {"max_steps": 2}
    outcome = train_here(small_config(tmp_path, tiny_model, train=further, model=model | {"head": "nf4"}))
    assert outcome["kind"] == "user"
    assert "model.head" in outcome["message"]
    outcome = train_here(small_config(tmp_path, tiny_model, train=further, model=model | {"embedding": "host"}))
    assert outcome["state"] == "finished", outcome["message"]


def test_shards_hold_the_stored_bytes(tiny_model: Path) -> None:
    model = load(tiny_model, embedding="nf4", head="8bit")
    values = model.lm_head.weight.numel()
    wanted = {"embed": values * BYTES["nf4"], "head": values, "host": 0}
    host = load(tiny_model, embedding="host").get_input_embeddings()
    modules = {"embed": model.get_input_embeddings(), "head": model.get_output_embeddings(), "host": host}
    for name, module in modules.items():
        frozen = FrozenUnit(Unit(name, (module,)), 2)
        assert wanted[name] <= frozen.num_bytes <= wanted[name] + (5 * 256 if wanted[name] else 0)
