"""Every YAML in configs/ trains three steps, on the tiny model and bundled rows in place of its own."""

from pathlib import Path

import pytest

from qlora_dist.config.load import load_config
from tests.single import train_here

ROOT = Path(__file__).parents[2]
CONFIGS, SLURM = (sorted((ROOT / folder).glob("*.yaml")) for folder in ("configs", "slurm"))


def test_there_are_configs() -> None:
    assert "quickstart" in [path.stem for path in CONFIGS]


@pytest.mark.parametrize("path", [*CONFIGS, *SLURM], ids=lambda path: path.stem)
def test_what_layers_keep_follows_from_the_memory_there_is(path: Path) -> None:
    """A config that recomputes everything gives a quarter of its speed away wherever memory is left."""
    assert load_config(path).activations == "auto"


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
