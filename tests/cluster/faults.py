"""Real faults for real processes, and the proof that none of them is left."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.cluster.toys import read_log

REPOSITORY = Path(__file__).parents[2]


def wait_until(true: Callable[[], bool], timeout_s: float = 120) -> None:
    """Return when `true()`, fail after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def started(run_dir: Path, rank: int | None = None) -> list[int]:
    """Process ids of the workers started so far, in order."""
    return [int(w[2]) for w in read_log(run_dir) if w[0] == "start" and rank in (None, int(w[1]))]


def reached(run_dir: Path, step: int) -> bool:
    """Whether rank 0 has noted `step`."""
    return ["step", str(step)] in read_log(run_dir)


def signal_at(run_dir: Path, step: int, rank: int, number: signal.Signals) -> threading.Thread:
    """Send `number` to `rank` when rank 0 has noted `step`."""

    def act() -> None:
        wait_until(lambda: reached(run_dir, step))
        os.kill(started(run_dir, rank)[-1], number)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def start_toy(toy: str, run_dir: Path, *fields: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start `run_toy` as a person would, in a session of its own, and with a Ctrl-C that works.

    A shell starts what it puts into the background with SIGINT ignored, and that is inherited.
    """
    command = [sys.executable, *before, "-m", "tests.cluster.run_toy", toy, str(run_dir), *fields]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The process and all below it."""
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def all_gone(processes: list[psutil.Process]) -> bool:
    """Whether none is alive; a zombie is dead."""
    return not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
