"""PEFT LoRA folders with random weights, written without PEFT or a model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYERS = {"model.layers.0.self_attn.q_proj": (10, 8), "model.layers.0.mlp.up_proj": (12, 8)}


def make_adapter(
    folder: Path,
    rank: int = 3,
    lora_alpha: float = 6,
    seed: int = 0,
    layers: Mapping[str, tuple[int, int]] = LAYERS,
    notes: Mapping[str, str] | None = None,
    ranks: Mapping[str, int] | None = None,
    **settings: Any,
) -> Path:
    """Write the folder of an adapter on `layers` (module -> outputs, inputs) and return it.

    Args:
        ranks: of the modules whose rank is not `rank`.
        settings: further fields of adapter_config.json.
    """
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for module, (num_outputs, num_inputs) in layers.items():
        own = (ranks or {}).get(module, rank)
        weights[f"base_model.model.{module}.lora_A.weight"] = torch.randn(own, num_inputs, generator=draw)
        weights[f"base_model.model.{module}.lora_B.weight"] = torch.randn(num_outputs, own, generator=draw)
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt", **(notes or {})})
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "owner/base", "revision": None,
        "r": rank, "lora_alpha": lora_alpha, "target_modules": sorted({name.split(".")[-1] for name in layers}),
        "bias": "none", "use_rslora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(fields | settings))
    return folder
