"""Synthetic bases: real shapes, the same weights for all ranks, made one at a time, usable like any base."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.model.adapter import attach_adapter
from qlora_dist.model.base import linear4bit_layers, load_base, load_tokenizer
from qlora_dist.model.resolve import resolve_base
from qlora_dist.model.shapes import SHAPES
from qlora_dist.model.stream import empty_model
from qlora_dist.model.synthetic import synthetic_tensors
from qlora_dist.model.weights import base_fingerprint
from tests.single import small_config, train_here

CPU = torch.device("cpu")
IDS = torch.arange(3, 83).reshape(2, 40)
# Parameters of the published models, in whole numbers: what their safetensors indices add up to.
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "mistral-7b": 7_248_023_552,
    "qwen3-8b": 8_190_735_360,
    "qwen2.5-32b": 32_763_876_352,
    "smollm2-135m": 134_515_008,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QLORA_DIST_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_numbers_of_parameters(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[name]))
    model = empty_model(ModelConfig(name="x"), tmp_path, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("name", [name for name in SHAPES if "tiny" in name])
def test_small_ones_load_quantised(name: str) -> None:
    config = ModelConfig(name=f"synthetic:{name}")
    folder = resolve_base(config)
    assert not list(folder.glob("*.safetensors"))
    first, second = (load_base(config, folder, CPU) for _ in range(2))
    assert len(linear4bit_layers(first)) == 14
    for key, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], tensor), key
    assert torch.isfinite(first(IDS).logits).all()
    norm, embedding = first.model.norm.weight, first.get_input_embeddings().weight
    assert torch.equal(norm, torch.ones_like(norm))
    assert 0.019 < embedding.std() < 0.021


def test_a_weight_follows_from_its_name_alone() -> None:
    config = ModelConfig(name="synthetic:llama-tiny")
    folder = resolve_base(config)
    tensors = synthetic_tensors(config, folder, CPU)
    forwards = {name: tensors[name][...] for name in tensors}
    torch.manual_seed(1)
    backwards = {name: tensors[name][...] for name in reversed(tensors)}
    assert all(torch.equal(forwards[name], backwards[name]) for name in tensors)
    same_shape = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    assert not torch.equal(forwards[same_shape[0]], forwards[same_shape[1]])


def test_tokenizer_fills_the_vocabulary_and_gives_text_back() -> None:
    folder = resolve_base(ModelConfig(name="synthetic:smollm2-135m"))
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == SHAPES["smollm2-135m"]["vocab_size"]
    text = "Zürich 3 + 4 = 7\n\tتجربة 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=False)
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n"


def test_fingerprint_is_of_the_shape(tmp_path: Path) -> None:
    prints = {name: base_fingerprint(resolve_base(ModelConfig(name=f"synthetic:{name}"))) for name in
              ("llama-tiny", "qwen2-tiny", "llama-tiny-tied")}  # fmt: skip
    assert len(set(prints.values())) == 3
    assert prints["llama-tiny"] == base_fingerprint(resolve_base(ModelConfig(name="synthetic:llama-tiny")))


def test_through_the_quantised_cache(tmp_path: Path) -> None:
    config = ModelConfig(name="synthetic:qwen3-tiny", cache_quantized=tmp_path / "nf4")
    folder = resolve_base(config)
    written, read = (load_base(config, folder, CPU) for _ in range(2))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map={"": "cpu"}).train()
    assert torch.equal(written(IDS).logits, read(IDS).logits)
    assert torch.equal(stock(IDS).logits, read(IDS).logits)
    attach_adapter(read, AdapterConfig(), seed=0)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"no synthetic:llama-3-8b; use a name that there is: nearest are llama-3\.1-8b"
    ):
        resolve_base(ModelConfig(name="synthetic:llama-3-8b"))


def test_train_command_takes_one(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", Path("x"), model={"name": "synthetic:llama-tiny"}, data={"max_length": 512})
    outcome = train_here(config)
    assert outcome["state"] == "finished", outcome
