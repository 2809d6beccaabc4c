"""Faults caused on purpose in real runs under Ray: whatever happens, every later loss is the uninterrupted run's.

CPU, fp32, dropout on, two workers: losses and gradient norms are compared for equality, to the last bit.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from qlora_dist.checkpoint.manifest import list_checkpoints, verify
from qlora_dist.track.metrics import read_metrics
from tests.cluster.faults import REPOSITORY, all_gone, family, wait_until
from tests.distributed.group import series, train_in_group
from tests.single import small_config

STEPS = 60
SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"max_rows": 200, "eval": "bundled:home_commands", "max_eval_rows": 4},
    # Large enough that a checkpoint takes a moment to write, and saved so often that one is always near.
    "adapter": {"r": 64, "lora_alpha": 64, "lora_dropout": 0.1},
    "train": {"max_steps": STEPS, "global_batch_size": 8, "per_device_train_batch_size": 2},
    "eval": {"eval_steps": 20},
    "checkpoint": {"save_steps": 5, "keep_last": 2},
    "launch": {"backend": "ray", "num_workers": 2, "device": "cpu", "collective_timeout_s": 10},
}


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    """The series of the same run that nothing happened to, started without Ray."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    config = small_config(run_dir, tiny_model, **SECTIONS)
    (outcome,) = train_in_group([config], world_size=2)
    assert outcome["state"] == "finished"
    return {metric: series(run_dir, metric) for metric in ("loss", "grad_norm", "eval_loss")}


class Job:
    """`qlora-dist train` as a person starts it, and what its run folder tells."""

    def __init__(self, tmp_path: Path, model: Path):
        self.run_dir = tmp_path / "run"
        self.config = tmp_path / "config.yaml"
        values = small_config(self.run_dir, model, **SECTIONS).model_dump(mode="json")
        self.config.write_text(yaml.safe_dump(values))
        self.output = tmp_path / "output.txt"

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "qlora_dist.cli", "train", str(self.config), *overrides]
        with self.output.open("a") as output:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=output, stderr=output, text=True, start_new_session=True
            )
        return self.process

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.run_dir / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [e for e in (json.loads(line) for line in lines if line.endswith("\n")) if e["kind"] == kind]

    def pid(self, rank: int) -> int:
        return int(self.events("generation")[-1]["members"][rank]["pid"])

    def step(self) -> int:
        return max((record["step"] for record in read_metrics(self.run_dir)), default=-1)

    def wait(self, timeout_s: float = 180) -> int:
        code = self.process.wait(timeout_s)
        print(self.output.read_text())
        return code

    def assert_as_if_nothing_had_happened(self, uninterrupted: dict[str, dict[int, float]]) -> None:
        for metric, values in uninterrupted.items():
            assert series(self.run_dir, metric) == values, metric
        kept = list_checkpoints(self.run_dir)
        assert kept[0].step == STEPS
        assert not [problem for checkpoint in kept for problem in verify(checkpoint.path)]


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path):
    made = Job(tmp_path, tiny_model)
    yield made
    if made.process.poll() is None:
        for process in family(made.process):
            process.kill()


def writing(run_dir: Path) -> list[str]:
    return [entry.name for entry in os.scandir(run_dir / "checkpoints") if entry.name.startswith(".writing-")]


def test_a_worker_killed_at_three_moments(job: Job, uninterrupted) -> None:
    """Rank 1 between two checkpoints; rank 0 in the middle of writing one; rank 1 while the new group is starting."""
    job.start()
    wait_until(lambda: job.step() >= 7)
    os.kill(job.pid(1), signal.SIGKILL)

    wait_until(lambda: len(job.events("generation")) == 2 and job.step() >= 20)
    pid = job.pid(0)
    caught = False
    deadline = time.monotonic() + 60
    while not caught and time.monotonic() < deadline:
        if writing(job.run_dir):
            # Held still for a moment: if its commit was already on the way, the folder is gone by then.
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.3)
            caught = bool(writing(job.run_dir))
            os.kill(pid, signal.SIGKILL if caught else signal.SIGCONT)
    assert caught, "no checkpoint was caught being written"

    # The third group's workers exist before they have joined: that is its start.
    wait_until(lambda: len(job.events("generation")) == 3)
    os.kill(job.pid(1), signal.SIGKILL)

    assert job.wait() == 0
    assert len(job.events("generation")) == 4
    assert len([event for event in job.events("restart") if event["restart"]]) == 3
    job.assert_as_if_nothing_had_happened(uninterrupted)
    assert not writing(job.run_dir)


def test_the_whole_job_killed_and_the_same_command_again(job: Job, uninterrupted) -> None:
    first = job.start()
    wait_until(lambda: job.step() >= 23)
    everything = family(first)
    for process in everything:
        process.kill()
    first.wait()
    job.start()
    assert job.wait() == 0
    assert "resumed from" in job.output.read_text()
    job.assert_as_if_nothing_had_happened(uninterrupted)
    wait_until(lambda: all_gone(everything), 30)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stopped_worker_is_named_and_the_run_resumes(job: Job, uninterrupted, rank: int) -> None:
    job.start()
    wait_until(lambda: job.step() >= 12)
    stopped = psutil.Process(job.pid(rank))
    stopped.suspend()
    since = time.monotonic()
    wait_until(lambda: bool(job.events("failed")), 60)
    took = time.monotonic() - since
    message = job.events("failed")[0]["message"]
    assert f"rank {rank}" in message
    assert str(stopped.pid) in message
    # The collective's own 10 s, and the time to ask who is silent.
    assert took < 10 + 10
    wait_until(lambda: len(job.events("generation")) == 2)
    if stopped.is_running():
        stopped.resume()
    assert job.wait() == 0
    job.assert_as_if_nothing_had_happened(uninterrupted)
    second = [event for event in job.events("committed") if event["time"] > job.events("generation")[1]["time"]]
    assert all(event["generation"] == 2 for event in second), "what woke up has committed something"


def test_a_mistake_found_inside_a_worker_ends_the_run_at_once(job: Job) -> None:
    """The data file is missing: every worker finds out, Ray starts the group once, exit code 2 and one sentence."""
    job.start("data.train=nowhere.jsonl")
    assert job.wait() == 2
    output = job.output.read_text()
    assert "nowhere.jsonl" in output
    assert "Traceback" not in output
    assert len(job.events("generation")) == 1
    assert not job.events("restart")
