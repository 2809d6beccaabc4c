"""Sharded loading and gathering between GPUs: what NCCL sends arrives bit for bit, and no GPU holds the whole base."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_dist.config.schema import RunConfig
from qlora_dist.model.base import load_base
from qlora_dist.shard.frozen import FrozenUnit
from qlora_dist.shard.loading import make_placement
from qlora_dist.shard.units import find_units
from tests.distributed.gloo import in_group
from tests.distributed.test_shards import compare_after_every_gather
from tests.single import small_config
from tests.tiny import make_tiny_model

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
    pytest.mark.timeout(300),
]
WORKERS = 2


def load_on_gpu(rank: int, configs: list[RunConfig]) -> tuple[dict[str, torch.Tensor], int, int]:
    """This rank's shards, and the most bytes that were allocated and reserved on its GPU."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    config = configs[rank]
    placement = make_placement(config, rank, len(configs), rank, len(configs))
    model = load_base(config.model, Path(config.model.name), device, config.adapter, placement)
    peak = torch.cuda.max_memory_allocated(device)
    loaded = placement.loaded
    if len(configs) == 1:
        units = find_units(model)
        modules = {module for unit in units for module in unit.modules}
        loaded = {}
        for unit in units:
            frozen = FrozenUnit(unit, WORKERS, modules - set(unit.modules))
            loaded[unit.name] = (frozen, frozen.pack())
    return {name: shard.cpu() for name, (_, shard) in loaded.items()}, peak, torch.cuda.max_memory_reserved(device)


def test_each_gpu_holds_its_shard(tmp_path: Path) -> None:
    """Only the first rank has files. 134M weights, of which 17M are embeddings."""
    shape = LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    configs = [
        small_config(
            tmp_path / folder, tmp_path / folder, model={"compute_dtype": "bf16"}, shard={"strategy": "fsdp"},
            launch={"backend": "torchrun", "num_workers": WORKERS},
        )
        for folder in ("base", "empty")
    ]  # fmt: skip
    backend = "cpu:gloo,cuda:nccl"
    sharded = in_group(WORKERS, load_on_gpu, configs, backend=backend)
    ((whole, whole_peak, whole_reserved),) = in_group(1, load_on_gpu, configs[:1], backend=backend)
    print(
        f"allocated {[s[1] for s in sharded]} of {whole_peak}, reserved {[s[2] for s in sharded]} of {whole_reserved}"
    )
    for name, expected in whole.items():
        assert torch.equal(torch.cat([shards[name] for shards, _, _ in sharded]), expected), name
    assert all(peak < 0.85 * whole_peak for _, peak, _ in sharded)


@pytest.mark.parametrize("options", [{}, {"offload_shards": True, "prefetch": 2}], ids=["on the GPU", "offloaded"])
def test_gathered_bytes_are_the_unsharded_ones(tmp_path: Path, options: dict[str, Any]) -> None:
    """Weights and constants of every byte value, compared wherever a layer looks at them in two steps."""
    base = make_tiny_model(tmp_path / "base", hidden_size=256)
    for seen in in_group(
        WORKERS, compare_after_every_gather, base, WORKERS, options, "cuda", backend="cpu:gloo,cuda:nccl"
    ):
        assert seen["forward"] >= 4 * 15
        assert seen["backward"] >= 4 * 12
