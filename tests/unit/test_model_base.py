"""The NF4 base: its values, its cache, and what is frozen, quiet and refused."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.base import compute_dtype, linear4bit_layers, load_base, load_tokenizer

CPU = torch.device("cpu")
IDS = torch.arange(3, 83).reshape(2, 40)
# The 16 NF4 levels of the QLoRA paper (Dettmers et al. 2023, appendix E).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_weights_are_the_papers_nf4(tiny_model: Path) -> None:
    import bitsandbytes as bnb

    config = ModelConfig(name=str(tiny_model), double_quant=False)
    model = load_base(config, tiny_model, CPU)
    weight = model.model.layers[0].mlp.up_proj.weight
    found = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).double()
    true = load_file(tiny_model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].double().reshape(-1, 64)
    scale = true.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4, dtype=torch.float64)
    nearest = levels[((true / scale)[..., None] - levels).abs().argmin(-1)] * scale
    # fp32 arithmetic on values below 1: about 1e-7; a wrong level would be off by 1e-2 of the scale.
    torch.testing.assert_close(found.reshape(-1, 64), nearest, rtol=1e-6, atol=1e-9)


def test_frozen_without_cache_and_heads_unquantised(tiny_model: Path) -> None:
    model = load_base(ModelConfig(name=str(tiny_model)), tiny_model, CPU)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache is False
    assert len(linear4bit_layers(model)) == 2 * 7
    assert type(model.lm_head) is torch.nn.Linear
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    assert model.name_or_path == str(tiny_model)


def test_unquantised_base(tiny_model: Path) -> None:
    config = ModelConfig(name=str(tiny_model), quantization="none", compute_dtype="bf16", attn_implementation="eager")
    model = load_base(config, tiny_model, CPU)
    assert linear4bit_layers(model) == []
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cache_is_a_stock_model_and_bit_identical(
    tiny_model: Path, tmp_path: Path, double_quant: bool, dtype: str
) -> None:
    config = ModelConfig(
        name=str(tiny_model), cache_quantized=tmp_path / "nf4", double_quant=double_quant, compute_dtype=dtype
    )
    direct = load_base(config.model_copy(update={"cache_quantized": None}), tiny_model, CPU)
    written = load_base(config, tiny_model, CPU)
    stamp = (tmp_path / "nf4" / "quantized_cache.json").stat().st_mtime_ns
    read = load_base(config, tiny_model, CPU)
    assert (tmp_path / "nf4" / "quantized_cache.json").stat().st_mtime_ns == stamp
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map={"": "cpu"})
    # In evaluation, bitsandbytes computes in bf16 on CPUs with AVX512-BF16; training mode is exact and has no dropout.
    stock.train()
    expected = direct.state_dict()
    assert any(key.endswith("quant_state.bitsandbytes__nf4") for key in expected)
    assert any(key.endswith("nested_absmax") for key in expected) == double_quant
    for other in (written, read, stock):
        state = other.state_dict()
        assert set(state) == set(expected)
        for key, tensor in expected.items():
            assert torch.equal(state[key], tensor), key
        assert torch.equal(other(IDS).logits, direct(IDS).logits)
    assert stock.config.quantization_config.bnb_4bit_use_double_quant == double_quant
    assert len(load_tokenizer(tmp_path / "nf4")) == len(load_tokenizer(tiny_model))


def test_stock_quantisation_gives_the_same_model(tiny_model: Path) -> None:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    stock = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=nf4, device_map={"": "cpu"}).train()
    assert torch.equal(stock(IDS).logits, load_base(ModelConfig(name=str(tiny_model)), tiny_model, CPU)(IDS).logits)


def test_cache_of_something_else_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = ModelConfig(name=str(tiny_model), cache_quantized=tmp_path / "nf4")
    load_base(config, tiny_model, CPU)
    with pytest.raises(UserError, match="its double_quant is True, not False"):
        load_base(config.model_copy(update={"double_quant": False}), tiny_model, CPU)
    with pytest.raises(UserError, match="its dtype is float32, not bfloat16"):
        load_base(config.model_copy(update={"compute_dtype": "bf16"}), tiny_model, CPU)
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: weight * 2 for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="made from another base model"):
        load_base(config, other, CPU)
    with (tmp_path / "nf4" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"model\.safetensors is missing or damaged"):
        load_base(config, tiny_model, CPU)
    with pytest.raises(UserError, match="holds something else"):
        load_base(config.model_copy(update={"cache_quantized": tiny_model}), tiny_model, CPU)


def test_base_that_comes_quantised(tiny_model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "nf4"
    load_base(ModelConfig(name=str(tiny_model), cache_quantized=cache), tiny_model, CPU)
    config = ModelConfig(name=str(cache), compute_dtype="bf16")
    model = load_base(config, cache, CPU)
    assert {layer.compute_dtype for layer in linear4bit_layers(model)} == {torch.bfloat16}
    for change, sentence in (
        ({"double_quant": False}, "model.double_quant"),
        ({"quantization": "none"}, "already quantised"),
        ({"cache_quantized": tmp_path / "again"}, "needs no cache"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_base(config.model_copy(update=change), cache, CPU)
    settings = json.loads((cache / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (cache / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"already quantised \(gptq\)"):
        load_base(config, cache, CPU)


def test_training_after_an_evaluation_keeps_its_gradients(tiny_model: Path) -> None:
    model = load_base(ModelConfig(name=str(tiny_model)), tiny_model, CPU)

    def gradient() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.linspace(-1, 1, 8 * 64).reshape(1, 8, 64).requires_grad_()
        loss = model.train()(inputs_embeds=hidden).logits.square().sum()
        loss.backward()
        assert hidden.grad is not None
        return loss.detach(), hidden.grad

    loss_before, before = gradient()
    with torch.no_grad():
        evaluated = model.eval()(IDS).logits
        trained = model.train()(IDS).logits
    loss_after, after = gradient()
    assert torch.equal(evaluated, trained)
    assert torch.equal(loss_before, loss_after)
    assert torch.equal(before, after)


def test_compute_dtype(tiny_model: Path) -> None:
    config = ModelConfig(name=str(tiny_model))
    assert compute_dtype(config, CPU) == torch.float32
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert compute_dtype(config.model_copy(update={"compute_dtype": name}), CPU) == dtype


@pytest.mark.parametrize(("capability", "auto"), [((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_compute_dtype_of_gpus(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], auto: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    config, gpu = ModelConfig(name=str(tiny_model)), torch.device("cuda", 0)
    assert compute_dtype(config, gpu) == auto
    if auto == torch.float16:
        with pytest.raises(UserError, match="Some GPU has no bf16"):
            compute_dtype(config.model_copy(update={"compute_dtype": "bf16"}), gpu)


def test_flash_attention_needs_a_gpu(tiny_model: Path) -> None:
    config = ModelConfig(name=str(tiny_model), attn_implementation="flash_attention_2")
    with pytest.raises(UserError, match=r"model\.attn_implementation"):
        load_base(config, tiny_model, CPU)


def test_pad_token_never_grows_the_vocabulary(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    settings_file = folder / "tokenizer_config.json"
    size = len(load_tokenizer(folder))
    assert load_tokenizer(folder).pad_token == "<|endoftext|>"
    settings = json.loads(settings_file.read_text())
    for key in ("pad_token", "unk_token"):
        settings.pop(key, None)
    settings_file.write_text(json.dumps(settings))
    assert load_tokenizer(folder).pad_token == "<|im_end|>"
    settings_file.write_text(json.dumps({**settings, "unk_token": "<|im_start|>"}))
    assert load_tokenizer(folder).pad_token == "<|im_start|>"
    assert len(load_tokenizer(folder)) == size
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer files"):
        load_tokenizer(folder)


WORKER = """
import sys, torch
from pathlib import Path
from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.model.adapter import attach_adapter, check_trainable, save_adapter
from qlora_dist.model.base import load_base, load_tokenizer
from qlora_dist.model.resolve import resolve_base
config = ModelConfig(name=sys.argv[1], cache_quantized=sys.argv[2])
folder = resolve_base(config)
load_tokenizer(folder)
model = load_base(config, folder, torch.device("cpu"))
adapted = attach_adapter(model, AdapterConfig(), seed=1)
check_trainable(adapted)
save_adapter(adapted, Path(sys.argv[3]))
with torch.no_grad():
    for p in adapted.parameters():
        if p.requires_grad: p.add_(0.01)
    print(adapted(torch.arange(3, 43)[None]).logits.double().sum().item())
"""


def test_workers_of_one_node_share_one_cache_and_say_nothing(tiny_model: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tiny_model), str(tmp_path / "nf4"), str(tmp_path / f"adapter{rank}")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    answers = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], answers
    assert [errors for _, errors in answers] == ["", ""]
    assert len({output for output, _ in answers}) == 1
    assert {path.name for path in tmp_path.iterdir() if "partial" in path.name} == set()
    first, second = (tmp_path / f"adapter{rank}" for rank in range(2))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_other_warnings_still_arrive(tiny_model: Path) -> None:
    from qlora_dist.model.quiet import quiet_libraries

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet_libraries():
            warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
            warnings.warn("something real", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something real"]
