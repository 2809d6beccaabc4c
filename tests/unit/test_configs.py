"""Every YAML in configs/ trains three steps, on the tiny model and bundled rows in place of its own."""

from pathlib import Path

import pytest

from qlora_dist.config.load import load_config
from tests.single import train_here

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert "quickstart" in [path.stem for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_three_steps(path: Path, tiny_model: Path, tmp_path: Path) -> None:
    overrides = [
        f"output_dir={tmp_path / 'run'}", f"model.name={tiny_model}", "model.compute_dtype=fp32",
        "data.train=bundled:home_commands", "data.max_rows=40", "data.max_eval_rows=4",
        "train.max_steps=3", "train.num_train_epochs=null", "train.warmup_steps=0",
        "launch.backend=none", "launch.num_workers=1", "launch.address=null", "shard.strategy=auto",
    ]  # fmt: skip
    outcome = train_here(load_config(path, overrides))
    assert (outcome["state"], outcome["step"]) == ("finished", 3), outcome["message"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
