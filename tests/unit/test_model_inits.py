"""PiSSA and LoftQ against their definitions in float64, and through stock PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.model.adapter import attach_adapter, save_adapter, trainable_parameters
from qlora_dist.model.base import load_base
from qlora_dist.model.inits import AdaptedLayer, loftq, pissa
from tests.single import small_config, train_here

CPU = torch.device("cpu")
IDS = torch.arange(3, 83).reshape(2, 40)
MODULE = "model.layers.1.mlp.up_proj"
INITS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_16"},
    "loftq": {"init_lora_weights": "loftq"},
    "loftq 4": {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 4}},
}


def settings(tiny_model: Path, cache: Path, kind: str, **adapter: Any) -> tuple[ModelConfig, AdapterConfig]:
    return (
        ModelConfig(name=str(tiny_model), cache_quantized=cache),
        AdapterConfig(r=8, lora_alpha=32, **INITS[kind], **adapter),
    )


def load(config: ModelConfig, adapter: AdapterConfig, seed: int = 0) -> PeftModel:
    model = load_base(config, Path(config.name), CPU, adapter)
    return attach_adapter(model, adapter, seed)


def parts(model: PeftModel, module: str = MODULE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The dequantised base weight, B A with its scaling, and A, in float64."""
    layer = model.get_base_model().get_submodule(module)
    weight = layer.base_layer.weight
    base = functional.dequantize_4bit(weight.data, weight.quant_state).double()
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    return base, layer.scaling["default"] * b @ a, a


def best_of_rank(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix.double())
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def round_trip(weight: torch.Tensor) -> torch.Tensor:
    packed, state = functional.quantize_4bit(weight.float(), quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(packed, state).double()


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter"])
def test_pissa_takes_out_the_principal_part(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    model = load(*settings(tiny_model, tmp_path / "nf4", kind))
    weight = load_file(tiny_model / "model.safetensors")[f"{MODULE}.weight"].double()
    base, update, a = parts(model)
    best = best_of_rank(weight, 8)
    if kind == "pissa":
        # fp32 against fp64: about 1e-6 of weights of 0.02.
        torch.testing.assert_close(update, best, rtol=0, atol=1e-6)
        # Equal shares of the singular values in A and B: A's rows are orthogonal, of squared length sigma / scaling.
        sigma = torch.linalg.svdvals(weight)[:8] / 4
        torch.testing.assert_close(a @ a.T, torch.diag(sigma), rtol=1e-5, atol=1e-5)
    # A random matrix has no gap between its singular values: the randomised part is another, and nearly as good.
    assert (weight - update).norm() < 1.01 * (weight - best).norm()
    # A residual next to a boundary of two levels may fall to either: all but a few are quantised alike.
    assert ((base - round_trip(weight - update)).abs() < 1e-4).double().mean() > 0.999


@pytest.mark.parametrize(("kind", "rounds"), [("loftq", 1), ("loftq 4", 4)])
def test_loftq_is_its_algorithm(tiny_model: Path, tmp_path: Path, kind: str, rounds: int) -> None:
    model = load(*settings(tiny_model, tmp_path / "nf4", kind))
    weight = load_file(tiny_model / "model.safetensors")[f"{MODULE}.weight"].double()
    update = torch.zeros_like(weight)
    for _ in range(rounds):
        quantised = round_trip(weight - update)
        update = best_of_rank(weight - quantised, 8)
    base, found, _ = parts(model)
    # After the first round a weight at a boundary of two levels may fall to either, and moves the fit by little.
    torch.testing.assert_close(found, update, rtol=0, atol=1e-6 if rounds == 1 else 1e-4)
    assert ((base - quantised).abs() < 1e-4).double().mean() > 0.999


@pytest.mark.parametrize("kind", INITS)
def test_start_is_nearer_to_the_original_than_plain_nf4(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    weight = load_file(tiny_model / "model.safetensors")[f"{MODULE}.weight"].double()
    base, update, _ = parts(load(*settings(tiny_model, tmp_path / "nf4", kind)))
    assert (weight - base - update).norm() < 0.97 * (weight - round_trip(weight)).norm()


def test_formulas_in_float64() -> None:
    weight = torch.randn(24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = AdaptedLayer(rank=4, scaling=0.5)
    rest, a, b = pissa(weight, layer, None, 0)
    torch.testing.assert_close(rest, weight - best_of_rank(weight, 4), rtol=0, atol=1e-12)
    torch.testing.assert_close(rest + 0.5 * b @ a, weight, rtol=0, atol=1e-12)

    def coarse(matrix: torch.Tensor) -> torch.Tensor:
        return (matrix * 2).round() / 2

    for rounds in (1, 2, 5):
        rest, a, b = loftq(weight, layer, rounds, coarse)
        update = torch.zeros_like(weight)
        for _ in range(rounds):
            expected = weight - update
            update = best_of_rank(weight - coarse(expected), 4)
        torch.testing.assert_close(rest, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(0.5 * b @ a, update, rtol=0, atol=1e-12)
        assert (weight - coarse(rest) - 0.5 * b @ a).norm() < (weight - coarse(weight)).norm()


@pytest.mark.parametrize("kind", INITS)
def test_stock_peft_on_the_stock_loaded_cache(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    config, adapter = settings(tiny_model, tmp_path / "nf4", kind, rank_pattern={"q_proj": 4})
    model = load(config, adapter)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, tmp_path / "adapter")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map={"": "cpu"})
    loaded = PeftModel.from_pretrained(stock, tmp_path / "adapter").train()
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "nf4")
    # Same kernels, same weights: equal bits.
    assert torch.equal(loaded(IDS).logits, model.train()(IDS).logits)
    again = attach_adapter(
        load_base(ModelConfig(name=str(tmp_path / "nf4")), tmp_path / "nf4", CPU),
        AdapterConfig(path=tmp_path / "adapter"), 0,
    )  # fmt: skip
    assert torch.equal(again.train()(IDS).logits, model(IDS).logits)


def test_the_cache_brings_the_same_start(tiny_model: Path, tmp_path: Path) -> None:
    config, adapter = settings(tiny_model, tmp_path / "nf4", "pissa_niter", modules_to_save=["lm_head"])
    written, read = (trainable_parameters(load(config, adapter, seed=seed)) for seed in (1, 2))
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in written)
    other, _ = settings(tiny_model, tmp_path / "other", "pissa_niter")
    torch.manual_seed(5)
    rebuilt = trainable_parameters(load(other, adapter))
    assert all(torch.equal(written[name], rebuilt[name]) for name in written)


def test_what_does_not_fit_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config, adapter = settings(tiny_model, tmp_path / "nf4", "pissa")
    load(config, adapter)
    with pytest.raises(UserError, match="other adapter settings"):
        load(config, adapter.model_copy(update={"r": 4}))
    with pytest.raises(UserError, match="an adapter initialisation has changed its weights"):
        load(config, AdapterConfig())
    with pytest.raises(UserError, match="needs the original weights"):
        load_base(ModelConfig(name="x", cache_quantized=tmp_path / "x"), tmp_path / "nf4", CPU, adapter)
    config, adapter = settings(tiny_model, tmp_path / "b", "pissa", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UserError, match=r"is for linear layers, and model\.embed_tokens is none"):
        load(config, adapter)
    for model, changes in (({}, {}), ({"cache_quantized": "c", "quantization": "none"}, {})):
        with pytest.raises(ValueError, match=r"set model\.cache_quantized"):
            small_config(tmp_path / "run", tiny_model, model=model, adapter={"init_lora_weights": "pissa", **changes})


def test_a_whole_run_with_pissa(tiny_model: Path, tmp_path: Path) -> None:
    config = small_config(
        tmp_path / "run",
        tiny_model,
        model={"cache_quantized": tmp_path / "nf4"},
        adapter={"init_lora_weights": "pissa"},
    )
    outcome = train_here(config)
    assert outcome["state"] == "finished", outcome
