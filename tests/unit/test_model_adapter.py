"""Adapters: PEFT's own format, exact round trips, deterministic starts, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.model.adapter import (
    adapter_config_json,
    adapter_state,
    attach_adapter,
    check_trainable,
    load_adapter_state,
    save_adapter,
    trainable_parameters,
    write_adapter,
)
from qlora_dist.model.base import load_base
from tests.tiny import make_tiny_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 83).reshape(2, 40)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "names": {"target_modules": ["q_proj", "v_proj"], "r": 4},
    "pattern": {"target_modules": r".*\.1\.mlp\.(up|down)_proj", "init_lora_weights": "gaussian"},
    "rslora": {"use_rslora": True, "init_lora_weights": "orthogonal"},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"], "use_dora": True},
    "norms and both": {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    "embedding target": {"target_modules": ["embed_tokens", "q_proj"]},
    "one layer": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "ranks": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6},
        "alpha_pattern": {"q_proj": 64},
        "init_lora_weights": "orthogonal",
    },
}


def base(folder: Path, **changes: Any) -> Any:
    return load_base(ModelConfig(name=str(folder), **changes), folder, CPU)


def disturb(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("tied"))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_what_peft_saves(tiny_model: Path, kind: str) -> None:
    model = attach_adapter(base(tiny_model), AdapterConfig(**KINDS[kind]), seed=3)
    disturb(model)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = adapter_state(model)
    assert set(state) == set(expected) == set(trainable_parameters(model))
    for name, tensor in expected.items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "tied"), [*((kind, False) for kind in KINDS), ("plain", True), ("head", True), ("norms and both", True)]
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_stock_peft_gives_the_same_logits(
    tiny_model: Path, tied_model: Path, tmp_path: Path, kind: str, tied: bool
) -> None:
    folder = tied_model if tied else tiny_model
    model = attach_adapter(base(folder, cache_quantized=tmp_path / "nf4"), AdapterConfig(**KINDS[kind]), seed=3)
    before = model(IDS).logits
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    stock_base = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map={"": "cpu"})
    # Training mode, because bitsandbytes computes in bf16 on some CPUs in evaluation; nothing drops out here.
    stock = PeftModel.from_pretrained(stock_base, tmp_path / "adapter").train()
    assert not torch.equal(model(IDS).logits, before)
    assert torch.equal(stock(IDS).logits, model(IDS).logits)
    # And back: the same folder as a starting point.
    again = attach_adapter(base(folder), AdapterConfig(path=tmp_path / "adapter"), seed=99)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert list(trainable_parameters(again)) == list(trainable_parameters(model))
    save_adapter(again, tmp_path / "adapter2")
    first, second = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "adapter2")
    )
    if "init_lora_weights" not in KINDS[kind]:
        assert first == second


def test_start_is_the_seeds_alone(tiny_model: Path) -> None:
    def start(seed: int, drawn_before: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(drawn_before)
        torch.rand(drawn_before + 1)
        state_before = torch.get_rng_state()
        state = adapter_state(attach_adapter(base(tiny_model), AdapterConfig(modules_to_save=["lm_head"]), seed=seed))
        assert torch.equal(torch.get_rng_state(), state_before)
        return state

    one, same, other = start(7, 0), start(7, 5), start(8, 0)
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert not torch.equal(one[name], other[name])
    assert one[name].abs().max() > 0


def test_round_trip_into_a_model_with_other_weights(tiny_model: Path) -> None:
    config = AdapterConfig(use_dora=True, modules_to_save=["lm_head"])
    model, other = (attach_adapter(base(tiny_model), config, seed=seed) for seed in (1, 2))
    disturb(model)
    state = adapter_state(model)
    parameters = trainable_parameters(other)
    load_adapter_state(other, state)
    assert all(torch.equal(parameters[name], tensor) for name, tensor in state.items())
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    # A snapshot: what trains on does not change it.
    disturb(model)
    assert torch.equal(
        adapter_state(other)["base_model.model.lm_head.weight"], state["base_model.model.lm_head.weight"]
    )


def test_names_do_not_depend_on_wrappers(tiny_model: Path) -> None:
    model = attach_adapter(base(tiny_model), AdapterConfig(modules_to_save=["lm_head"]), seed=1)
    names, state, config = list(trainable_parameters(model)), adapter_state(model), adapter_config_json(model)

    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    for wrapped in (Wrapper(model), torch.compile(model), Wrapper(torch.compile(model))):
        assert list(trainable_parameters(wrapped)) == names
        assert set(adapter_state(wrapped)) == set(state)
        assert adapter_config_json(wrapped) == config
        load_adapter_state(wrapped, state)
    assert names[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert names[-1] == "base_model.model.lm_head.weight"


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("saved", [None, ["lm_head"], ["norm"], ["lm_head", "embed_tokens", "norm"]])
def test_masters_are_fp32_in_a_bf16_model(tiny_model: Path, autocast: bool, saved: list[str] | None) -> None:
    config = AdapterConfig(modules_to_save=saved)
    model = attach_adapter(base(tiny_model, compute_dtype="bf16"), config, seed=1)
    reference = attach_adapter(base(tiny_model, compute_dtype="fp32"), config, seed=1)
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}
    disturb(model)
    disturb(reference)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = model(IDS, labels=IDS, output_hidden_states=True)
        loss = output.loss
    # The stream between layers stays in bf16, else an fp32 embedding would double its memory.
    assert {hidden.dtype for hidden in output.hidden_states} == {torch.bfloat16}
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable_parameters(model).values())
    # bf16 keeps 8 bits, and a loss of about 6 averages over 78 tokens: 1 % is several times what is seen.
    assert loss.item() == pytest.approx(reference(IDS, labels=IDS).loss.item(), rel=1e-2)


def test_folder_is_plain_peft(tiny_model: Path, tmp_path: Path) -> None:
    model = attach_adapter(base(tiny_model), AdapterConfig(r=4), seed=1, base_revision="abc")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "stale").write_text("of an earlier run")
    save_adapter(model, tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert (config["revision"], config["r"], config["peft_type"]) == ("abc", 4, "LORA")
    assert config["inference_mode"] is True
    write_adapter(adapter_state(model), adapter_config_json(model), tmp_path / "same")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_counts(tiny_model: Path) -> None:
    model = attach_adapter(base(tiny_model), AdapterConfig(r=4, target_modules=["q_proj"]), seed=1)
    full = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapter = 2 * 4 * (64 + 64)
    assert check_trainable(model) == (adapter, sum(p.numel() for p in full.parameters()) + adapter)


def test_runs_that_would_train_nothing_or_too_much(tiny_model: Path) -> None:
    plain = base(tiny_model)
    with pytest.raises(UserError, match="adapter: none is active"):
        check_trainable(plain)
    model = attach_adapter(plain, AdapterConfig(), seed=1)
    check_trainable(model)
    with model.disable_adapter(), pytest.raises(UserError, match="adapter: none is active"):
        check_trainable(model)
    model.requires_grad_(False)
    with pytest.raises(UserError, match="no weight of it requires a gradient"):
        check_trainable(model)
    model = attach_adapter(base(tiny_model), AdapterConfig(), seed=1)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"base weight base_model\.model\.model\.norm\.weight would be trained"):
        check_trainable(model)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "adapter.target_modules names 'v_porj', which the base lacks; use"),
        ({"target_modules": r".*\.query"}, "matches no module in full"),
        ({"target_modules": r"(unclosed"}, "no valid pattern"),
        ({"target_modules": ["norm"]}, "model.norm is no linear layer; take it out"),
        ({"modules_to_save": ["lmhead"]}, "has: nearest are lm_head"),
        ({"modules_to_save": ["up_proj"]}, "is quantised and cannot be trained in full"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs an even rank, not 3"),
    ],
)  # fmt: skip
def test_module_names_and_settings(tiny_model: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        attach_adapter(base(tiny_model), AdapterConfig(**settings), seed=1)
    assert sentence in error.value.message


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def test_adapter_folders_that_cannot_be_continued(tiny_model: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    save_adapter(attach_adapter(base(tiny_model), AdapterConfig(r=4), seed=1), good)
    wider = make_tiny_model(tmp_path / "wider", hidden_size=128)

    def refusal(folder: Path, model_folder: Path = tiny_model) -> str:
        with pytest.raises(UserError) as error:
            attach_adapter(base(model_folder), AdapterConfig(path=folder), seed=1)
        return error.value.message

    message = refusal(good, wider)
    assert str(good) in message
    assert "where this model needs [4, 128" in message or "where this model needs [4, 256" in message
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        bad = Path(shutil.copytree(good, tmp_path / f"without {name}"))
        (bad / name).unlink()
        assert f"has no {name}" in refusal(bad)
        (bad / name).write_bytes(b"{broken")
        assert "damaged" in refusal(bad)
    for changes, sentence in (
        ({"peft_type": "IA3"}, "is of type IA3"),
        ({"bias": "all"}, "bias all"),
        ({"init_lora_weights": "pissa"}, "changes the base weights too"),
        ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
        ({"target_modules": ["query"]}, "nearest are"),
        ({"target_modules": ["q_proj"]}, "which this model's adapter lacks"),
    ):
        bad = Path(shutil.copytree(good, tmp_path / sentence.replace(" ", "_")))
        edit(bad, **changes)
        assert sentence in refusal(bad)


def test_state_of_another_shape_changes_nothing(tiny_model: Path) -> None:
    model = attach_adapter(base(tiny_model), AdapterConfig(r=4), seed=1)
    before = adapter_state(model)
    other = adapter_state(attach_adapter(base(tiny_model), AdapterConfig(r=8), seed=2))
    with pytest.raises(UserError, match=r"Checkpoint step_7: .* has rank 8, not 4"):
        load_adapter_state(model, other, source="Checkpoint step_7")
    disturb(model, seed=5)
    changed = adapter_state(model)
    incomplete = dict(list(before.items())[:-1])
    with pytest.raises(UserError, match="Checkpoint step_7 lacks"):
        load_adapter_state(model, incomplete, source="Checkpoint step_7")
    assert all(torch.equal(tensor, changed[name]) for name, tensor in adapter_state(model).items())


def test_layers_and_patterns_shape_the_adapter(tiny_model: Path) -> None:
    model = attach_adapter(base(tiny_model), AdapterConfig(**KINDS["one layer"]), seed=0)
    assert {name.split(".layers.")[1].split(".lora")[0] for name in trainable_parameters(model)} == {
        "1.self_attn.q_proj", "1.mlp.up_proj"
    }  # fmt: skip
    model = attach_adapter(base(tiny_model), AdapterConfig(**KINDS["ranks"]), seed=0)
    ranks = {n.split(".model.model.")[1]: p.shape[0] for n, p in trainable_parameters(model).items() if "lora_A" in n}
    assert ranks["layers.0.self_attn.q_proj.lora_A.weight"] == 2
    assert ranks["layers.0.mlp.up_proj.lora_A.weight"] == 16
    assert ranks["layers.1.mlp.up_proj.lora_A.weight"] == 6
    layers = model.get_base_model().model.layers
    assert layers[0].self_attn.q_proj.scaling == {"default": 64 / 2}
    assert layers[1].mlp.up_proj.scaling == {"default": 32 / 6}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank_pattern": {"q_prj": 4}}, "adapter.rank_pattern names 'q_prj', which matches no module; write one"),
        ({"alpha_pattern": {"q_(": 4}}, "no valid pattern"),
        ({"layers_to_transform": [0, 2]}, "names layer 2, but the base has 2, counted from 0; give numbers up to 1"),
        ({"layers_to_transform": 1, "layers_pattern": "nothing"}, "PEFT refuses these settings"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 3}}, "needs an even rank, not 3"),
    ],
)
def test_patterns_that_match_nothing(tiny_model: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        attach_adapter(base(tiny_model), AdapterConfig(**{"target_modules": ["q_proj"], **settings}), seed=0)
