"""The processes that test_commit_faults.py kills, stops and starves. Each runs the real coordinator and writer."""

import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from qlora_dist.checkpoint.format import Snapshot, read_snapshot
from qlora_dist.checkpoint.manifest import resolve_resume
from qlora_dist.checkpoint.writer import BackgroundWriter, Fenced
from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.client import DirectClient
from qlora_dist.coordinate.state import Coordinator

KEEP_LAST = 2


def snapshot(step: int, elements: int = 1000) -> Snapshot:
    return Snapshot(
        step=step,
        adapter={"w": torch.full((elements,), float(step))},
        adapter_config={"r": 1},
        optimizer={"w|exp_avg": torch.full((elements,), -float(step))},
        state={"position": step},
    )


def fail_on_warning(sentence: str) -> None:
    raise AssertionError(sentence)


def begin(run_dir: Path, attempt: str, **options: Any) -> tuple[Coordinator, int, int]:
    """(coordinator, generation, step to go on from)."""
    coordinator = Coordinator(run_dir, keep_last=KEEP_LAST, settle_s=0.2, **options)
    generation = coordinator.join(attempt, 0, 1, "a", os.getpid())["generation"]
    resume = resolve_resume(run_dir, "auto", 0, fail_on_warning)
    return coordinator, generation, 0 if resume is None else read_snapshot(resume).step


def die_at(run_dir: Path, countdown: int) -> None:
    """SIGKILL this process just before its n-th operation on files of the run folder, or on its lock."""
    left = [countdown]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "fcntl.flock" or (
            event.split(".")[0] in ("open", "os", "shutil") and args and str(run_dir) in str(args[0])
        ):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def train(run_dir: Path, attempt: str, promised: Path, steps: int, elements: int, countdown: int) -> None:
    """Commit `steps` more checkpoints; write a step to `promised` as soon as the writer has said it is committed."""
    if countdown:
        die_at(run_dir, countdown)
    coordinator, generation, start = begin(run_dir, attempt)
    writer = BackgroundWriter(run_dir, DirectClient(coordinator), generation)
    for step in range(start + 1, start + 1 + steps):
        writer.save(snapshot(step, elements))
        committed = writer.close(30)
        assert committed is not None
        assert committed[0] == step
        with open(promised, "a") as file:
            file.write(f"{step}\n")


class SlowClient(DirectClient):
    """Says when a commit is about to be sent, and waits to be told to send it."""

    pipe: Connection

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        if method == "commit":
            self.pipe.send("about to commit")
            self.pipe.recv()
        return super().call(method, **arguments)


def commit_late(run_dir: Path, pipe: Connection) -> None:
    """Write step 9 as generation 1, be stopped before the commit, and tell what became of it."""
    coordinator, generation, _ = begin(run_dir, "stopped")
    client = SlowClient(coordinator)
    client.pipe = pipe
    writer = BackgroundWriter(run_dir, client, generation)
    writer.save(snapshot(9))
    try:
        writer.close(30)
        pipe.send("committed")
    except Fenced as error:
        pipe.send(f"fenced: {error}")
    # It wakes as a whole: what else it tries is refused too.
    pipe.send(coordinator.heartbeat(generation, 0, 9, "compute"))
    pipe.send(coordinator.join("stopped", 0, 1, "a", os.getpid()))
    pipe.send(coordinator.finish(generation, 9, {}))


def contend(run_dir: Path, name: str, rounds: int, pipe: Connection) -> None:
    """Take over again and again, commit once each time, and tell what was granted."""
    coordinator, granted = Coordinator(run_dir, keep_last=1000, settle_s=0.2), []
    for n in range(rounds):
        generation = coordinator.join(f"{name}-{n}", 0, 1, "a", os.getpid())["generation"]
        writer = BackgroundWriter(run_dir, DirectClient(coordinator), generation)
        writer.save(snapshot(n + 1, 10))
        try:
            committed = writer.close(60)
        except Fenced:
            committed = None
        granted.append((generation, None if committed is None else committed[1].name))
    pipe.send(granted)


def fill(run_dir: Path, limit_bytes: int, pipe: Connection) -> None:
    """Save a small, a too big and a small checkpoint; a limit of 0 leaves the disk itself to be full."""
    coordinator, generation, _ = begin(run_dir, f"fill-{os.getpid()}")
    if limit_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    writer = BackgroundWriter(run_dir, DirectClient(coordinator), generation)
    for step, elements in ((1, 1000), (2, 1_000_000), (3, 1000)):
        writer.save(snapshot(step, elements))
        try:
            writer.close(30)
            pipe.send("committed")
        except UserError as error:
            pipe.send(error.message)
