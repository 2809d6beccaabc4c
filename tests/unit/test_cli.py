"""The command as a person runs it: what it prints, and its exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.single import small_config, train_here


def qlora_dist(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qlora_dist.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def config_file(tmp_path: Path, tiny_model: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_config(tmp_path / "run", tiny_model).model_dump(mode="json")))
    return path


def test_train_ends_with_an_adapter_and_code_0(config_file: Path, tmp_path: Path) -> None:
    done = qlora_dist("train", config_file)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert "done  6 steps" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.max_stps=3", "train.max_stps is not a setting"),
        ("model.name=/nowhere/at/all", "/nowhere/at/all"),
        ("data.train=missing.jsonl", "missing.jsonl"),
        ("adapter.target_modules=[q_prj]", "q_proj"),
        ("resume=/nowhere", "/nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(config_file: Path, override: str, sentence: str) -> None:
    done = qlora_dist("train", config_file, override)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 1


def test_config_show_loads_back_and_schema_is_json(config_file: Path) -> None:
    shown = qlora_dist("config", "show", config_file, "train.max_steps=9")
    assert yaml.safe_load(shown.stdout)["train"]["max_steps"] == 9
    schema = json.loads(qlora_dist("config", "schema").stdout)
    assert "learning_rate" in schema["$defs"]["TrainConfig"]["properties"]


def test_status_of_a_finished_run_and_of_no_run(tiny_model: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", tiny_model)
    train_here(config)
    text = qlora_dist("status", config.run_dir)
    assert text.returncode == 0
    assert "is finished" in text.stdout
    assert "step-00000006-g0001" in text.stdout
    assert json.loads(qlora_dist("status", config.run_dir, "--json").stdout)["last_checkpoint"]["step"] == 6
    nothing = qlora_dist("status", tmp_path)
    assert nothing.returncode == 2
    assert "there is no run in" in nothing.stderr
