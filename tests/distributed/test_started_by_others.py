"""Workers that a person's own torchrun started: the number of workers is the one that is there."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed.group import series
from tests.single import small_config, train_here


def torchrun(config: Path, workers: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(workers), "-m"]
    command += ["qlora_dist.cli", "train", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def write_config(tmp_path: Path, base: Path, name: str, **launch) -> Path:
    values = small_config(tmp_path / name, base, adapter={"lora_dropout": 0.0}).model_dump(mode="json")
    values["launch"] = {"backend": "torchrun", "device": "cpu", **launch}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_two_workers_train_what_one_trains(tiny_model: Path, tmp_path: Path) -> None:
    """launch.num_workers is left out, so its default of 1 must not turn the sum over ranks off."""
    done = torchrun(write_config(tmp_path, tiny_model, "two"), 2)
    assert done.returncode == 0, done.stderr
    train_here(small_config(tmp_path / "one", tiny_model, adapter={"lora_dropout": 0.0}))
    for metric in ("loss", "grad_norm"):
        # Two ranks sum in another order; 6 steps carry that along. A missing sum is off by a factor.
        assert series(tmp_path / "two", metric) == pytest.approx(series(tmp_path / "one", metric), rel=1e-4)


def test_another_number_in_the_config_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    done = torchrun(write_config(tmp_path, tiny_model, "three", num_workers=3), 2)
    assert done.returncode != 0
    assert "launch.num_workers is 3, but WORLD_SIZE is 2" in done.stderr
