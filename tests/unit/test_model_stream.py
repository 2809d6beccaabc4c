"""Streaming makes the very model that stock transformers makes, in host memory for one tensor beside it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma2ForCausalLM

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.base import load_base
from qlora_dist.model.tensors import folder_tensors
from qlora_dist.model.weights import weight_files

CPU = torch.device("cpu")
IDS = torch.arange(3, 83).reshape(2, 40)
SMALL = dict(
    vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
)  # fmt: skip


def make_folder(folder: Path, kind: str) -> Path:
    """A random bf16 model of another architecture than the tiny one, in shards of 100 kB."""
    import transformers

    config: Any = {
        "llama, tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
        "llama, scaled rotary": lambda: transformers.LlamaConfig(
            **SMALL, tie_word_embeddings=False,
            rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        ),
        "qwen2, biases": lambda: transformers.Qwen2Config(**SMALL, tie_word_embeddings=False),
        "gemma2, tied": lambda: transformers.Gemma2Config(**SMALL),
        "qwen3 with experts": lambda: transformers.Qwen3MoeConfig(
            **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
        "gpt2, Conv1D": lambda: transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4),
    }[kind]()  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


KINDS = ["llama, tied", "llama, scaled rotary", "qwen2, biases", "gemma2, tied", "qwen3 with experts", "gpt2, Conv1D"]


@pytest.mark.parametrize("kind", KINDS)
def test_bit_identical_to_stock_transformers(tmp_path: Path, kind: str) -> None:
    folder = make_folder(tmp_path / "model", kind)
    assert len(weight_files(folder)) > 1
    for quantization, dtype in (("nf4", torch.float32), ("fp4", torch.bfloat16), ("none", torch.bfloat16)):
        bnb = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ) if quantization != "none" else None  # fmt: skip
        attention = "eager" if kind.startswith("gemma2") else "sdpa"
        stock = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=bnb, device_map={"": "cpu"}, attn_implementation=attention
        )
        config = ModelConfig(
            name=str(folder), quantization=quantization, attn_implementation=attention,
            compute_dtype="fp32" if dtype == torch.float32 else "bf16",
        )  # fmt: skip
        ours = load_base(config, folder, CPU)
        expected, found = stock.state_dict(), ours.state_dict()
        assert list(found) == list(expected)
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype, key
            assert torch.equal(found[key], tensor), key
        buffers = dict(ours.named_buffers())
        assert buffers.keys() == dict(stock.named_buffers()).keys()
        for key, tensor in stock.named_buffers():
            assert buffers[key].dtype == tensor.dtype
            assert torch.equal(buffers[key], tensor), key
        tied = stock.get_output_embeddings().weight is stock.get_input_embeddings().weight
        assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == tied
        assert ours.generation_config.to_dict() == stock.generation_config.to_dict()
        assert ours.config.to_dict() | {"use_cache": None} == stock.config.to_dict() | {"use_cache": None}
        # In evaluation, bitsandbytes computes in bf16 on some CPUs; these models have no dropout in training mode.
        if kind != "gpt2, Conv1D":
            assert torch.equal(ours.train()(IDS).logits, stock.train()(IDS).logits)


@pytest.mark.skipif(Gemma2ForCausalLM._supports_sdpa, reason="this transformers gives Gemma 2 sdpa")
def test_attention_that_the_model_lacks(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "gemma2, tied")
    with pytest.raises(UserError, match=r"model\.attn_implementation: .* set it to eager"):
        load_base(ModelConfig(name=str(folder), attn_implementation="sdpa"), folder, CPU)


def test_fp4_through_its_cache(tiny_model: Path, tmp_path: Path) -> None:
    config = ModelConfig(name=str(tiny_model), quantization="fp4", cache_quantized=tmp_path / "fp4")
    written, read = (load_base(config, tiny_model, CPU) for _ in range(2))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "fp4", device_map={"": "cpu"}).train()
    assert stock.config.quantization_config.bnb_4bit_quant_type == "fp4"
    assert torch.equal(written(IDS).logits, read(IDS).logits)
    assert torch.equal(stock(IDS).logits, read(IDS).logits)
    with pytest.raises(UserError, match="its quantization is fp4, not nf4"):
        load_base(config.model_copy(update={"quantization": "nf4"}), tiny_model, CPU)
    with pytest.raises(UserError, match=r"already quantised \(fp4\).*; set model.quantization=fp4"):
        load_base(ModelConfig(name=str(tmp_path / "fp4")), tmp_path / "fp4", CPU)


def test_a_weight_that_is_missing_is_no_random_one(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = {name: tensor[...] for name, tensor in folder_tensors(folder).items()}
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(ModelConfig(name=str(folder)), folder, CPU)


def test_cache_has_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    """Of the quantised layers: 4 bits a weight and 8.1 bits of constants for 64 weights are 0.258 of bf16."""
    from transformers import LlamaConfig

    folder, cache = tmp_path / "model", tmp_path / "cache"
    shape = SMALL | dict(hidden_size=512, intermediate_size=2048, vocab_size=64)
    AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).save_pretrained(folder)
    shutil.copytree(make_tokenizer(tmp_path / "tokenizer"), folder, dirs_exist_ok=True)
    load_base(ModelConfig(name=str(folder), cache_quantized=cache, compute_dtype="bf16"), folder, CPU)
    full, quantised = (sum(path.stat().st_size for path in weight_files(each)) for each in (folder, cache))
    assert quantised / full < 0.28


def make_tokenizer(folder: Path) -> Path:
    from tests.tiny import make_tiny_model

    make_tiny_model(folder)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (folder / name).unlink()
    return folder


MEASURE = """
import gc, json, sys, threading, time
from pathlib import Path
import torch, bitsandbytes, transformers, peft
from transformers.models.llama import modeling_llama
from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.base import load_base
torch.set_num_threads(2)
def held():  # private and shared bytes without page cache: anonymous and shmem pages
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
config = ModelConfig(**json.loads(sys.argv[1]))
small = config.model_copy(update={"name": sys.argv[2], "cache_quantized": None})
load_base(small, Path(sys.argv[2]), torch.device("cpu"))
gc.collect()
start = peak = held()
ended = threading.Event()
def watch():
    global peak
    while not ended.wait(0.002):
        peak = max(peak, held())
thread = threading.Thread(target=watch)
thread.start()
began = time.monotonic()
model = load_base(config, Path(config.name), torch.device("cpu"))
seconds = time.monotonic() - began
ended.set()
thread.join()
size = sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
print(json.dumps({"peak": peak - start, "model": size, "seconds": seconds}))
"""


@pytest.mark.slow
def test_host_memory_of_a_1b_shape(tmp_path: Path, tiny_model: Path) -> None:
    """Peak over the value after imports < largest tensor + what stays + 200 MB; written, and read from the cache.

    The tiny model is loaded first: lazily imported code is not the loading's memory. Sampled every 2 ms.
    """
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("needs 8 GB of free disk")
    folder = write_1b_shape(tmp_path / "model")
    shutil.copytree(make_tokenizer(tmp_path / "tokenizer"), folder, dirs_exist_ok=True)
    largest = 128256 * 2048 * 2
    try:
        for name, changes in (
            ("no cache", {}),
            ("cache written", {"cache_quantized": str(tmp_path / "cache")}),
            ("cache read", {"cache_quantized": str(tmp_path / "cache")}),
            ("not quantised", {"quantization": "none"}),
        ):
            settings = json.dumps({"name": str(folder), "compute_dtype": "bf16", **changes})
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, settings, str(tiny_model)], capture_output=True, text=True,
                env={**os.environ, "PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1"}, timeout=500, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            measured = json.loads(done.stdout)
            print(name, measured)
            assert measured["peak"] < largest + measured["model"] + 200e6, (name, measured)
        full, quantised = (
            sum(path.stat().st_size for path in weight_files(each)) for each in (folder, tmp_path / "cache")
        )
        # The embedding (0.53 GB) stays in bf16.
        assert (quantised - largest) / (full - largest) < 0.27
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def write_1b_shape(folder: Path) -> Path:
    """The shape of a 1B Llama (tied, vocabulary of 128,256), bf16, in shards of some 400 MB."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    for name, shape in shapes.items():
        shard[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        if sum(t.nbytes for t in shard.values()) > 4e8 or name == list(shapes)[-1]:
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
