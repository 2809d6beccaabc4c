"""Two starts of one run: the second is refused while the first lives, and one that was overtaken says so."""

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from qlora_dist.cluster import launch as launch_module
from qlora_dist.cluster import worker_entry
from qlora_dist.cluster.second_start import refuse_second_start
from qlora_dist.cluster.torchrun import CONFIG_VARIABLE, KEY_VARIABLE
from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.client import Fenced
from qlora_dist.coordinate.rundir import open_run
from qlora_dist.coordinate.state import Coordinator
from tests.single import small_config

pytestmark = pytest.mark.timeout(60)


def running(run_dir: Path, pid: int) -> Coordinator:
    """A run whose only rank, process `pid` of this host, has just been heard of."""
    open_run(run_dir, "")
    coordinator = Coordinator(run_dir, status_every_s=0.0)
    coordinator.start_job()
    coordinator.join("a", 0, 1, socket.gethostname(), pid)
    coordinator.heartbeat(1, 0, 3, "compute")
    return coordinator


def test_a_run_that_is_heard_of_is_not_started_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coordinator, ended = running(tmp_path / "run", os.getpid()), threading.Event()

    def live() -> None:
        while not ended.wait(0.3):
            coordinator.heartbeat(1, 0, 3, "compute")

    thread = threading.Thread(target=live)
    thread.start()
    try:
        config = small_config(tmp_path / "run", tmp_path)
        assert launch_module.launch(config, config.run_dir) == 2
    finally:
        ended.set()
        thread.join()
    said = capsys.readouterr().err
    assert f"is already running ({socket.gethostname()}:{os.getpid()}); wait for it" in said
    events = [json.loads(line)["kind"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events.count("opened") == 1


def test_a_run_that_was_killed_a_moment_ago_is(tmp_path: Path) -> None:
    """A dead process of this host at once, a silent one after a few heartbeats have not come."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    running(tmp_path / "dead", child)
    started = time.monotonic()
    refuse_second_start(tmp_path / "dead")
    assert time.monotonic() - started < 1
    running(tmp_path / "silent", os.getpid())
    refuse_second_start(tmp_path / "silent")
    refuse_second_start(tmp_path / "none")


def test_an_overtaken_start_says_by_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    running(tmp_path / "run", 4321)

    def overtaken(*_: object) -> None:
        raise Fenced("generation 1 is over")

    monkeypatch.setattr(launch_module, "_run", overtaken)
    config = small_config(tmp_path / "run", tmp_path)
    assert launch_module.launch(config, config.run_dir) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: another start of this run ({socket.gethostname()}:4321) has taken its place; wait")


def test_a_worker_that_sees_no_address_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path, tmp_path, launch={"start_timeout_s": 0.2})
    monkeypatch.setattr(worker_entry, "end_with_parent", lambda: None)
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        CONFIG_VARIABLE: config.model_dump_json(),
        KEY_VARIABLE: "k",
    }.items():
        monkeypatch.setenv(name, value)
    assert worker_entry.main(tmp_path, 1, "no:matter") == 2
    assert capsys.readouterr().err.startswith(f"error: output_dir {tmp_path} does not show what rank 0 has written")


def test_the_error_is_one_sentence() -> None:
    assert UserError("run-already-alive", run_dir="r", who="a:1").message.count(";") == 1
