"""What a person reads names a machine as Slurm does, everywhere."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_dist.cluster.plain import run_plain
from qlora_dist.cluster.torchrun import _explain
from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.rundir import EVENTS_FILE, check_shared, open_run
from tests.cluster.toys import toy_config


@pytest.fixture(autouse=True)
def named_by_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-node-7")


def test_in_the_event_log_and_its_lock(tmp_path: Path) -> None:
    open_run(tmp_path, "{}")
    run_plain(toy_config(num_workers=1, backend="none", steps=1), tmp_path, "tests.cluster.toys:count")
    events: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / EVENTS_FILE).read_text().splitlines()]
    assert {event["kind"]: event["host"] for event in events if "host" in event and event["kind"] != "joining"} == {
        "opened": "gpu-node-7", "job": "gpu-node-7"
    }  # fmt: skip
    log = EventLog(tmp_path / EVENTS_FILE)
    with log.locked():
        assert (tmp_path / f"{EVENTS_FILE}.lock").read_text() == f"process {os.getpid()} on host gpu-node-7"


@pytest.mark.parametrize("found", [True, False], ids=["another run's folder", "no folder"])
def test_in_what_a_node_says_of_the_run_folder(tmp_path: Path, found: bool) -> None:
    if found:
        open_run(tmp_path, "{}")
    with pytest.raises(UserError, match="gpu-node-7"):
        check_shared(tmp_path, "another nonce", wait_s=0.0)


def test_in_what_torchrun_says_of_a_worker_that_died() -> None:
    died: Any = SimpleNamespace(failures={1: SimpleNamespace(exitcode=-signal.SIGKILL, pid=4321)})
    client: Any = SimpleNamespace(call=lambda method: {"state": "running", "message": None})
    assert _explain(died, client) == "rank 1 (host gpu-node-7, pid 4321) died of SIGKILL"
