"""Whole runs with `model.compute: fp8`, by the references on a CPU."""

from pathlib import Path

import pytest
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from qlora_dist.plan.activations import LayerShape, gains
from qlora_dist.track.metrics import read_metrics
from tests.single import small_config, train_here

WITHOUT_DROPOUT = {"r": 4, "lora_alpha": 8}


@pytest.fixture
def steps() -> dict[str, int]:
    return {"max_steps": 3, "global_batch_size": 2}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_run_says_what_it_was_trained_with(
    quantization: str, steps: dict[str, int], tiny_model: Path, tmp_path: Path
) -> None:
    losses = {}
    for compute in ("bf16", "fp8"):
        model = {"fused": "always", "compute": compute, "quantization": quantization}
        config = small_config(
            tmp_path / compute, tiny_model, model={"name": str(tiny_model), "compute_dtype": "fp32"} | model,
            train=steps, run={"adapter": WITHOUT_DROPOUT},
        )  # fmt: skip
        outcome = train_here(config)
        assert outcome["state"] == "finished", outcome["message"]
        losses[compute] = [record["loss"] for record in read_metrics(config.run_dir) if "loss" in record]
        with safe_open(config.run_dir / "adapter" / "adapter_model.safetensors", "pt") as file:
            assert file.metadata()["compute"] == compute
        stock = AutoModelForCausalLM.from_pretrained(tiny_model)
        PeftModel.from_pretrained(stock, config.run_dir / "adapter")
    assert losses["fp8"] != losses["bf16"]
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.02)


def test_a_run_goes_on_in_what_it_began_with(steps: dict[str, int], tiny_model: Path, tmp_path: Path) -> None:
    model = {"name": str(tiny_model), "compute_dtype": "fp32", "fused": "always"}
    adapter = {"adapter": WITHOUT_DROPOUT}
    first = small_config(tmp_path / "run", tiny_model, model=model | {"compute": "fp8"}, train=steps, run=adapter)
    assert train_here(first)["state"] == "finished"
    outcome = train_here(
        small_config(tmp_path / "run", tiny_model, model=model, train=steps | {"max_steps": 5}, run=adapter)
    )
    assert outcome["kind"] == "user"
    assert "model.compute" in outcome["message"]


def test_layers_that_cannot_run_in_fp8_end_the_run_with_a_sentence(
    steps: dict[str, int], tiny_model: Path, tmp_path: Path
) -> None:
    model = {"name": str(tiny_model), "compute_dtype": "fp32", "compute": "fp8"}
    for fused, reason in (("always", "adapter.lora_dropout"), ("auto", "model.fused")):
        config = small_config(tmp_path / fused, tiny_model, model=model | {"fused": fused}, train=steps)
        outcome = train_here(config)
        assert outcome["kind"] == "user"
        assert reason in outcome["message"]


def test_the_plan_knows_what_fp8_weights_take_and_save() -> None:
    """Two copies of a byte each take what one of two takes, and save less."""
    shape = LayerShape(4096, 14336, 4096, 1024)
    plain, fp8 = gains(shape, 16384, 2048, 2), gains(shape, 16384, 2048, 2, fp8=True)
    assert fp8["weights"].size == plain["weights"].size
    assert fp8["weights"].seconds < plain["weights"].seconds
    assert fp8["gate_up"].size == plain["gate_up"].size
    assert fp8["gate_up"].seconds < plain["gate_up"].seconds
