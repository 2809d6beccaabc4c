"""Planted secrets are in no file of a run folder, and in nothing that is printed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.single import small_config

ENVIRONMENT = {
    "WANDB_API_KEY": "plantedwandb0123456789plantedwandb01234567",
    "HF_TOKEN": "plantedhub0123456789",
    "AWS_ACCESS_KEY_ID": "PLANTEDAWSID0123",
    "AWS_SECRET_ACCESS_KEY": "plantedaws/secret+0123456789",
}
IN_CONFIG = ("plantedpassword", "plantedtag0123456789abcdef")
PLANTED = [*ENVIRONMENT.values(), *IN_CONFIG]


def run(config: Path, *overrides: str, command: str = "train") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ENVIRONMENT, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "qlora_dist.cli", *command.split(), str(config), *overrides],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def write_config(folder: Path, run_dir: Path, model: Path, **sections: Any) -> Path:
    held_out = {"eval": "bundled:home_commands", "max_eval_rows": 2}
    values = small_config(run_dir, model, data=held_out, train={"max_steps": 2}, **sections).model_dump(mode="json")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def files_with(folder: Path, text: str) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize("backend", ["none", "torchrun"])
def test_no_file_of_a_run_holds_a_secret(tiny_model: Path, tmp_path: Path, backend: str) -> None:
    run_dir = tmp_path / "run"
    track = {
        "wandb": "auto", "wandb_group": "https://me:plantedpassword@host/x", "wandb_name": "visible-name",
        "wandb_tags": ["hf_plantedtag0123456789abcdef", "tag " + ENVIRONMENT["HF_TOKEN"]],
    }  # fmt: skip
    config = write_config(tmp_path, run_dir, tiny_model, track=track, launch={"backend": backend})
    done = run(config)
    assert done.returncode == 0, done.stderr
    for secret in PLANTED:
        assert files_with(run_dir, secret) == []
        assert secret not in done.stdout + done.stderr
    # The controls: the search finds what may be there, W&B's own file and the report included.
    found = {Path(path).suffix for path in files_with(run_dir, "visible-name")}
    assert {".yaml", ".wandb", ".html"} <= found
    assert (run_dir / "report.html").exists()
    shown = run(config, command="config show")
    assert shown.returncode == 0
    assert not any(secret in shown.stdout for secret in PLANTED)
    assert "https://***@host/x" in shown.stdout


def test_credentials_in_a_source_are_refused_and_not_repeated(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tmp_path / "run", tiny_model)
    done = run(config, "data.train=s3://key:plantedpassword@bucket/rows.jsonl")
    assert done.returncode == 2, done.stderr
    assert "AWS_ACCESS_KEY_ID" in done.stderr
    assert "plantedpassword" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_a_failing_run_tells_no_secret(tiny_model: Path, tmp_path: Path) -> None:
    """A path with the value of a variable in it, which the error's sentence and the event log repeat."""
    config = write_config(tmp_path, tmp_path / "run", tiny_model)
    done = run(config, "model.name=/nowhere/" + ENVIRONMENT["HF_TOKEN"])
    assert done.returncode == 2, done.stderr
    assert "/nowhere/***" in done.stderr
    assert ENVIRONMENT["HF_TOKEN"] not in done.stdout + done.stderr
    assert files_with(tmp_path / "run", ENVIRONMENT["HF_TOKEN"]) == []
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").open()]
    assert "/nowhere/***" in events[-1]["message"]
