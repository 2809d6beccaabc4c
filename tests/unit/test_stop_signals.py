"""The thread that hears signals: a storage that fails at first, a run that is over, a second SIGTERM."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_dist.cluster import stop_signals
from qlora_dist.cluster.stop_signals import StopSignals
from qlora_dist.coordinate import stop
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.rundir import EVENTS_FILE, open_run
from qlora_dist.coordinate.state import Coordinator
from tests.cluster.faults import wait_until

ENDS = """
import sys, time
from pathlib import Path
from qlora_dist.cluster.stop_signals import stop_on_signals
with stop_on_signals(Path(sys.argv[1])) as signals:
    signals.scratch = Path(sys.argv[2])
    print("listening", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stop_signals, "RETRY_S", 0.05)
    open_run(tmp_path / "run", "{}")
    Coordinator(tmp_path / "run").start_job()
    return tmp_path / "run"


@pytest.fixture
def signals(run_dir: Path) -> Iterator[StopSignals]:
    made = StopSignals(run_dir)
    yield made
    made.close()


def hear(signals: StopSignals, number: signal.Signals) -> None:
    """As Python's own handler writes it."""
    os.write(signals.write, bytes([number]))


def asked(run_dir: Path) -> bool:
    log = run_dir / EVENTS_FILE
    return log.exists() and "SIGUSR1 to the process that started the run" in log.read_text()


def test_a_folder_that_is_gone_for_a_moment(
    run_dir: Path, signals: StopSignals, capfd: pytest.CaptureFixture[str]
) -> None:
    away = run_dir.rename(run_dir.with_name("away"))
    hear(signals, signal.SIGUSR1)
    time.sleep(0.3)
    away.rename(run_dir)
    wait_until(lambda: asked(run_dir), 5)
    err = capfd.readouterr().err
    assert err.count("the run could not be asked to stop: ") == err.count("; trying again") == 1, err
    assert "Traceback" not in err


def test_a_log_that_is_locked_for_too_long(
    run_dir: Path, signals: StopSignals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stop, "LOCK_TIMEOUT_S", 0.05)
    with open(run_dir / f"{EVENTS_FILE}.lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        hear(signals, signal.SIGUSR1)
        time.sleep(0.4)
        assert not asked(run_dir)
    wait_until(lambda: asked(run_dir), 5)
    assert "; trying again" in capfd.readouterr().err


def test_a_run_that_is_over_is_asked_once(
    run_dir: Path, signals: StopSignals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    coordinator = Coordinator(run_dir)
    generation = coordinator.join("a", 0, 1, "here", os.getpid())["generation"]
    coordinator.finish(generation, 3, {})
    assert read_status(run_dir)["state"] == "finished"
    tries: list[Path] = []
    real = stop.ask_at_once
    monkeypatch.setattr(stop_signals, "ask_at_once", lambda *words: (tries.append(words[0]), real(*words)))
    hear(signals, signal.SIGUSR1)
    time.sleep(0.4)
    assert tries == [run_dir]
    assert capfd.readouterr().err.count("could not be asked to stop") == 1


def test_a_second_sigterm_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    (scratch / "agent").mkdir(parents=True)
    process = subprocess.Popen(
        [sys.executable, "-c", ENDS, str(tmp_path / "run"), str(scratch)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    process.terminate()
    time.sleep(0.2)
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "SIGTERM again: ended at once; the same command goes on from the last checkpoint\n" in err
    assert not scratch.exists()
