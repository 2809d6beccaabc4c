"""`--device cuda` gives what the CPU gives, draws included."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_dist.aggregate.merge import aggregate
from qlora_dist.aggregate.methods import recipe
from tests.adapters import make_adapter

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("method", ["mean", "svd", "task-arithmetic", "ties", "dare", "della", "cat"])
def test_the_device_does_not_matter(tmp_path: Path, method: str) -> None:
    layers = {"model.layers.0.self_attn.q_proj": (600, 500), "model.layers.0.mlp.up_proj": (1300, 1100)}
    parents = [make_adapter(tmp_path / f"{i}", rank=4, layers=layers, seed=i) for i in range(3)]
    products = {}
    for device in ("cpu", "cuda"):
        summary = aggregate(parents, recipe(method, 3), tmp_path / device, device=device)
        weights = load_file(tmp_path / device / "adapter_model.safetensors")
        products[device] = [
            weights[f"base_model.model.{m}.lora_B.weight"] @ weights[f"base_model.model.{m}.lora_A.weight"]
            for m in layers
        ]
        assert summary.rank == (12 if method == "cat" else 4)
    for on_cpu, on_gpu in zip(products["cpu"], products["cuda"], strict=True):
        # fp32 of two libraries; an entry at TIES' threshold or next to 0 may fall on the other side.
        assert (on_gpu - on_cpu).norm() < 1e-3 * on_cpu.norm()
