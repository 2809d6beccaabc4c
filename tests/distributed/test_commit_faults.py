"""Committed work is never lost: real processes that are killed, stopped and starved while they commit."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_dist.checkpoint.format import read_snapshot
from qlora_dist.checkpoint.manifest import latest_good, list_checkpoints, verify
from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.manifest import list_committed
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.rundir import open_run
from qlora_dist.coordinate.state import Coordinator
from tests.distributed import commit_child

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def fork() -> Iterator[Callable[..., BaseProcess]]:
    """Starts `target(*args)` in a process forked from a server that has torch imported and nothing running."""
    root = str(Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = root if before is None else f"{root}{os.pathsep}{before}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.commit_child"])
    started = []

    def start(target: Callable[..., None], *args: Any) -> BaseProcess:
        process = context.Process(target=target, args=args, daemon=True)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    open_run(tmp_path / "run", "name: faults\n")
    return tmp_path / "run"


def never(sentence: str) -> None:
    raise AssertionError(sentence)


def check_nothing_lost(run_dir: Path, promised: Path) -> int:
    """The invariants after a kill at any moment; returns the newest good step, 0 for none."""
    *lines, torn = (run_dir / "events.jsonl").read_bytes().split(b"\n")
    generations = [e["generation"] for line in lines if (e := json.loads(line))["kind"] == "generation"]
    assert generations == sorted(set(generations))
    assert len(torn) < 1000
    steps = [int(line) for line in promised.read_text().split()] if promised.exists() else []
    for folder in list_committed(run_dir):
        assert verify(folder) == []
    newest = latest_good(run_dir, never)
    if newest is None:
        assert not steps
        return 0
    snapshot = read_snapshot(newest)
    assert snapshot.step >= max(steps, default=0)
    assert snapshot.state == {"position": snapshot.step}
    assert bool((snapshot.adapter["w"] == snapshot.step).all())
    assert read_status(run_dir)["state"] in ("starting", "running")
    return snapshot.step


def leftovers(run_dir: Path) -> list[str]:
    return [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")]


def test_sigkill_before_every_file_operation_of_a_commit(run_dir: Path, tmp_path: Path, fork: Any) -> None:
    """The k-th process dies before its k-th file operation; the next one puts right what it left."""
    promised, kills, after_commit = tmp_path / "promised", 0, 0
    commit_child.train(run_dir, "first", promised, 2, 1000, 0)
    while True:
        before = check_nothing_lost(run_dir, promised)
        child = fork(commit_child.train, run_dir, f"killed-{kills}", promised, 1, 1000, kills + 1)
        child.join(30)
        step = check_nothing_lost(run_dir, promised)
        assert step in (before, before + 1)
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
        after_commit += step > before
        commit_child.train(run_dir, f"next-{kills}", promised, 1, 1000, 0)
        assert len(list_committed(run_dir)) == commit_child.KEEP_LAST
        assert leftovers(run_dir) == []
    assert kills > 60
    assert 10 < after_commit < kills - 30  # both sides of the rename were hit


def test_sigkill_at_random_moments_of_large_writes(run_dir: Path, tmp_path: Path, fork: Any) -> None:
    """16 MB a checkpoint, so that most kills hit a write, a checksum or an fsync in the middle."""
    promised, generator, kills, torn = tmp_path / "promised", random.Random(0), 0, 0
    started = time.monotonic()
    fork(commit_child.train, run_dir, "measured", promised, 2, 2_000_000, 0).join(60)
    span_s = time.monotonic() - started
    for n in range(120):
        child = fork(commit_child.train, run_dir, f"attempt-{n}", promised, 2, 2_000_000, 0)
        child.join(span_s * generator.random())
        child.kill()
        child.join()
        killed, half = child.exitcode == -signal.SIGKILL, bool(leftovers(run_dir))
        kills, torn = kills + killed, torn + (killed and half)
        # The speed of a shared disk changes: aim later when kills come before the write, earlier when after the end.
        span_s *= 0.9 if not killed else 1.0 if half else 1.05
        check_nothing_lost(run_dir, promised)
        if kills >= 30 and torn >= 8:
            break
    assert kills >= 30
    assert torn >= 8
    child = fork(commit_child.train, run_dir, "last", promised, 1, 1000, 0)
    child.join(30)
    assert child.exitcode == 0
    assert leftovers(run_dir) == []


def test_a_process_stopped_before_its_commit_wakes_up_and_changes_nothing(run_dir: Path, fork: Any) -> None:
    here, there = multiprocessing.Pipe()
    child = fork(commit_child.commit_late, run_dir, there)
    assert here.recv() == "about to commit"
    os.kill(child.pid, signal.SIGSTOP)

    coordinator, generation, start = commit_child.begin(run_dir, "living")
    assert (generation, start) == (2, 0)
    writer = commit_child.BackgroundWriter(run_dir, commit_child.DirectClient(coordinator), generation)
    writer.save(commit_child.snapshot(4))
    writer.close(30)
    content = {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()}

    here.send("go")
    os.kill(child.pid, signal.SIGCONT)
    assert here.recv().startswith("fenced: generation 1 commits nothing")
    assert not here.recv()["current"]
    assert "has taken its place" in here.recv()["refused"]
    assert here.recv() == {"recorded": False}
    child.join(30)
    assert {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()} == content
    assert coordinator.status()["generation"] == 2
    assert coordinator.status()["last_checkpoint"]["step"] == 4
    assert coordinator.outcome()["state"] == "running"


def test_coordinators_of_several_processes_agree(run_dir: Path, fork: Any) -> None:
    pipes = []
    for name in "abc":
        here, there = multiprocessing.Pipe()
        fork(commit_child.contend, run_dir, name, 12, there)
        pipes.append(here)
    granted = [entry for pipe in pipes for entry in pipe.recv()]
    generations = sorted(generation for generation, _ in granted)
    assert generations == list(range(1, 37))
    on_disk = {folder.name for folder in list_committed(run_dir)}
    assert on_disk == {name for _, name in granted if name is not None}
    assert all(verify(folder) == [] for folder in list_committed(run_dir))
    current = 0
    for line in (run_dir / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "generation":
            assert event["generation"] == current + 1
            current += 1
        elif event["kind"] == "committed":
            assert event["generation"] == current
        elif event["kind"] == "refused":
            assert event["generation"] < current
    assert any(name is None for _, name in granted), "nobody was ever fenced: the test tested nothing"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", folder]).returncode != 0:
        pytest.skip("a small disk takes root and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def after_a_full_disk(run_dir: Path, limit_bytes: int, fork: Any) -> None:
    here, there = multiprocessing.Pipe()
    child = fork(commit_child.fill, run_dir, limit_bytes, there)
    assert here.recv() == "committed"
    sentence = here.recv()
    assert sentence.startswith(f"output_dir {run_dir}: no space left to write")
    assert "free space or raise the quota" in sentence
    assert here.recv() == "committed"
    child.join(30)
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [3, 1]
    assert latest_good(run_dir, never) is not None
    assert leftovers(run_dir) == []


def test_a_quota_ends_in_a_sentence_and_leaves_what_was_committed(run_dir: Path, fork: Any) -> None:
    after_a_full_disk(run_dir, 1_000_000, fork)


def test_a_full_disk_ends_in_a_sentence_and_leaves_what_was_committed(small_disk: Path, fork: Any) -> None:
    open_run(small_disk / "run", "")
    after_a_full_disk(small_disk / "run", 0, fork)


def fill_up(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 512)


def note_without_end(coordinator: Coordinator) -> None:
    while True:  # the last page of the log still has room for some
        coordinator.note("x", text="y" * 500)


def test_a_disk_without_a_byte_left(small_disk: Path) -> None:
    """Not even an event fits: the log stays whole, the failure is still told, and all is well when there is space."""
    run_dir = small_disk / "run"
    open_run(run_dir, "")
    coordinator, generation, _ = commit_child.begin(run_dir, "one")
    writer = commit_child.BackgroundWriter(run_dir, commit_child.DirectClient(coordinator), generation)
    writer.save(commit_child.snapshot(1))
    writer.close(30)
    with pytest.raises(OSError, match="No space"):
        fill_up(small_disk / "filler")
    with pytest.raises(UserError, match="no space left"):
        note_without_end(coordinator)
    size = (run_dir / "events.jsonl").stat().st_size
    assert (run_dir / "events.jsonl").read_bytes().endswith(b"}\n")
    writer.save(commit_child.snapshot(2))
    with pytest.raises(UserError, match="no space left"):
        writer.close(30)
    coordinator.fail(1, 0, "user", "the disk is full" + "!" * 500, 2)
    assert coordinator.outcome()["exit_code"] == 2
    assert (run_dir / "events.jsonl").stat().st_size == size
    with pytest.raises(UserError, match="no space left"):
        open_run(run_dir, "a: " + "1" * 9000)
    (small_disk / "filler").unlink()
    again = Coordinator(run_dir)
    assert again.status()["last_checkpoint"]["step"] == 1
    assert again.join("two", 0, 1, "a", 1)["generation"] == 2
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [1]
    assert leftovers(run_dir) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_a_read_only_folder_is_a_user_error(run_dir: Path) -> None:
    coordinator, generation, _ = commit_child.begin(run_dir, "one")
    writer = commit_child.BackgroundWriter(run_dir, commit_child.DirectClient(coordinator), generation)
    (run_dir / "checkpoints").chmod(0o500)
    writer.save(commit_child.snapshot(1))
    with pytest.raises(UserError, match="cannot be written"):
        writer.close(30)
    (run_dir / "checkpoints").chmod(0o700)


def test_a_process_killed_while_it_holds_the_lock_frees_it(run_dir: Path, tmp_path: Path, fork: Any) -> None:
    child = fork(commit_child.train, run_dir, "one", tmp_path / "promised", 1, 1000, 0)
    child.join(30)
    started = time.monotonic()
    # The second operation comes after the lock was taken.
    child = fork(commit_child.train, run_dir, "two", tmp_path / "promised", 1, 1000, 12)
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert commit_child.begin(run_dir, "three")[1] >= 2
    assert time.monotonic() - started < 10
    assert torch.equal(read_snapshot(list_committed(run_dir)[0]).adapter["w"], torch.ones(1000))
