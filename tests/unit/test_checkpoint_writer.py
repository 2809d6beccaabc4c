"""The background writer over a real coordinator; faults that need other processes are in test_commit_faults.py."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_dist.checkpoint.format import Snapshot, read_snapshot
from qlora_dist.checkpoint.manifest import list_checkpoints
from qlora_dist.checkpoint.writer import BackgroundWriter, Fenced
from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.client import DirectClient, Unreachable
from qlora_dist.coordinate.rundir import open_run
from qlora_dist.coordinate.state import Coordinator


def snapshot(step: int) -> Snapshot:
    return Snapshot(step=step, adapter={"w": torch.full((64,), float(step))}, adapter_config={"r": 1})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    open_run(tmp_path / "run", "")
    return tmp_path / "run"


def start(run_dir: Path) -> tuple[Coordinator, DirectClient]:
    coordinator = Coordinator(run_dir, settle_s=0.2)
    assert coordinator.join("one", 0, 1, "a", 1)["generation"] == 1
    return coordinator, DirectClient(coordinator)


class HeldClient:
    """The direct client, whose commits wait for a gate."""

    def __init__(self, client: DirectClient):
        self.client, self.gate, self.in_flight, self.most = client, threading.Event(), 0, 0

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        self.gate.wait(10)
        answer = self.client.call(method, **arguments)
        self.in_flight -= 1
        return answer


def test_save_copies_and_returns_and_the_thread_commits(run_dir: Path) -> None:
    client = HeldClient(start(run_dir)[1])
    writer = BackgroundWriter(run_dir, client, 1)
    content = snapshot(5)
    writer.save(content, {"eval_loss": 1.0})
    content.adapter["w"].zero_()
    assert writer.poll() is None
    with pytest.raises(TimeoutError):
        writer.close(0.05)
    client.gate.set()
    committed = writer.close(10)
    assert committed is not None
    assert committed == (5, run_dir / "checkpoints" / "step-00000005-g0001")
    assert torch.equal(read_snapshot(committed[1]).adapter["w"], torch.full((64,), 5.0))
    assert list_checkpoints(run_dir)[0].metrics == {"eval_loss": 1.0}


def test_at_most_one_is_in_flight(run_dir: Path) -> None:
    client = HeldClient(start(run_dir)[1])
    writer = BackgroundWriter(run_dir, client, 1)
    writer.save(snapshot(1))
    threading.Timer(0.3, client.gate.set).start()
    started = time.monotonic()
    writer.save(snapshot(2))
    assert time.monotonic() - started > 0.2
    writer.close(10)
    assert client.most == 1
    assert [c.step for c in list_checkpoints(run_dir)] == [2, 1]


def test_a_refused_commit_is_raised_once_and_leaves_nothing(run_dir: Path) -> None:
    coordinator, client = start(run_dir)
    writer = BackgroundWriter(run_dir, client, 1)
    coordinator.join("two", 0, 1, "a", 2)
    writer.save(snapshot(1))
    with pytest.raises(Fenced, match="generation 2 has taken its place"):
        writer.close(10)
    assert list((run_dir / "checkpoints").iterdir()) == []
    assert writer.close() is None


def test_a_file_in_the_place_of_the_folder_is_a_user_error_at_the_next_save(run_dir: Path) -> None:
    writer = BackgroundWriter(run_dir, start(run_dir)[1], 1)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").write_text("")
    writer.save(snapshot(1))
    with pytest.raises(UserError, match=r"output_dir .* is a file where a folder is needed"):
        writer.save(snapshot(2))


def test_without_an_answer_the_written_folder_is_left_alone(run_dir: Path) -> None:
    """The coordinator may be about to rename it."""

    class Deaf:
        def call(self, method: str, **arguments: Any) -> dict[str, Any]:
            raise Unreachable("no answer")

    coordinator, _ = start(run_dir)
    writer = BackgroundWriter(run_dir, Deaf(), 1)
    writer.save(snapshot(1))
    with pytest.raises(Unreachable):
        writer.close(10)
    (left,) = (run_dir / "checkpoints").iterdir()
    assert left.name.startswith(".writing-g0001-00000001-")
    coordinator.join("two", 0, 1, "a", 2)  # the next generation sweeps it
    assert list((run_dir / "checkpoints").iterdir()) == []
