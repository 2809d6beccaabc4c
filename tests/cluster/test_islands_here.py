"""`qlora-dist train` with aggregate.islands: killed children come back, signals reach them, the run goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from qlora_dist.cluster.islands import run_islands
from qlora_dist.config.errors import UserError
from qlora_dist.config.load import load_config
from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.report import read_status
from qlora_dist.track.report import render
from tests.cluster.faults import REPOSITORY, all_gone, family, wait_until
from tests.distributed.islands import Event, violations
from tests.single import small_config

PATIENCE_S = 200.0
# Each starts four to seven processes that import torch and transformers: 20 to 40 s on two cores.
SLOW = pytest.mark.slow


class Started:
    """The command, as a person gives it."""

    def __init__(self, folder: Path, base: Path, max_steps: int):
        self.folder = folder
        config = small_config(
            folder / "run", base, aggregate={"islands": 2, "sync_every": 2, "round_deadline_s": 60},
            adapter={"lora_dropout": 0.0}, train={"max_steps": max_steps, "global_batch_size": 2},
            track={"tensorboard": False, "report": False},
        )  # fmt: skip
        self.run_dir = config.run_dir
        (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self.start()

    def start(self) -> None:
        output = (self.folder / "output.txt").open("ab")
        command = [sys.executable, "-m", "qlora_dist.cli", "train", str(self.folder / "config.yaml")]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=output, stderr=output, start_new_session=True, text=True
        )

    def events(self, kind: str) -> list[Event]:
        return [event for event in self.all_events() if event["kind"] == kind]

    def all_events(self) -> list[Event]:
        path = self.run_dir / "events.jsonl"
        return EventLog(path).read_new() if path.exists() else []

    def child(self, role: str) -> psutil.Process:
        """The coordinator, or the island of this name."""
        for process in psutil.Process(self.process.pid).children():
            variables = process.environ()
            if variables.get("QLORA_DIST_ROLE") == "coordinator" and role == "coordinator":
                return process
            if variables.get("QLORA_DIST_ROLE") == "island" and f'"island":"{role}"' in variables["QLORA_DIST_CONFIG"]:
                return process
        raise AssertionError(role)

    def rounds(self) -> int:
        return len(self.events("round_committed"))


@pytest.fixture
def started(tmp_path: Path, tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[Started]:
    run = Started(tmp_path, tiny_model, max_steps=getattr(request, "param", 60))
    yield run
    for process in family(run.process) if run.process.poll() is None else []:
        process.kill()
    run.process.wait()


@pytest.mark.parametrize("started", [4], indirect=True)
def test_one_command_trains_everything(started: Started) -> None:
    assert started.process.wait(PATIENCE_S) == 0
    assert violations(started.all_events()) == []
    status = read_status(started.run_dir)
    assert (status["state"], status["rounds"]["round"], status["rounds"]["packs_trained"]) == ("finished", 2, 16)
    assert all((started.run_dir / "islands" / name / "adapter").is_dir() for name in "01")
    shown = (started.folder / "output.txt").read_text()
    assert "round  1: 2 contribution(s)" in shown
    assert "round  2: 2 contribution(s)" in shown
    assert "closed by everyone" in shown
    report = render(started.run_dir)
    assert all(words in report for words in ("Round over time", ">Islands<", "2 rounds")), report
    assert "at step" not in report

    # The same command once more has nothing to do, and other settings would change what is trained no more.
    events = len(started.all_events())
    config = load_config(started.folder / "config.yaml")
    assert run_islands(config, started.run_dir).exit_code == 0
    more = load_config(started.folder / "config.yaml", ["train.max_steps=6"])
    with pytest.raises(UserError, match=r"began with 16 packs in all.*make 24 now"):
        run_islands(more, started.run_dir)
    assert len(started.all_events()) == events
    assert "island  1 has left" in shown


@SLOW
def test_a_killed_island_and_a_killed_coordinator_are_started_again(started: Started) -> None:
    wait_until(lambda: started.rounds() >= 2, PATIENCE_S)
    started.child("1").kill()
    started.child("coordinator").kill()
    assert started.process.wait(PATIENCE_S) == 0
    events = started.all_events()
    assert violations(events) == []
    again = {event["process"]: event for event in events if event["kind"] == "process_ended"}
    assert {name: event["restart"] for name, event in again.items()} == {"1": True, "coordinator": True}
    assert (started.run_dir / "adapter" / "adapter_model.safetensors").exists()
    status = read_status(started.run_dir)
    assert (status["state"], status["rounds"]["packs_trained"]) == ("finished", 60 * 2 * 2)


@SLOW
def test_sigterm_is_a_stop_after_what_was_trained_counts_and_the_same_command_goes_on(started: Started) -> None:
    wait_until(lambda: started.rounds() >= 2, PATIENCE_S)
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert read_status(started.run_dir)["state"] == "stopped"
    before = started.rounds()
    started.start()
    assert started.process.wait(PATIENCE_S) == 0
    assert started.rounds() > before
    assert violations(started.all_events()) == []


@SLOW
def test_a_killed_run_takes_its_processes_with_it_and_goes_on(started: Started) -> None:
    wait_until(lambda: started.rounds() >= 2, PATIENCE_S)
    processes = family(started.process)
    assert len(processes) >= 4
    os.kill(started.process.pid, signal.SIGKILL)
    started.process.wait()
    time.sleep(1)
    wait_until(lambda: all_gone(processes), 30)
    started.start()
    assert started.process.wait(PATIENCE_S) == 0
    assert violations(started.all_events()) == []
