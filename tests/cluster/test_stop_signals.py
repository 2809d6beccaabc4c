"""SIGTERM and SIGUSR1 to `qlora-dist train`, as a queue sends them: a checkpoint at the next step, then the end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from qlora_dist.checkpoint.manifest import list_checkpoints, verify
from qlora_dist.coordinate.report import read_status
from qlora_dist.track.metrics import read_metrics
from tests.cluster.faults import REPOSITORY, all_gone, family, start_toy, started, wait_until
from tests.single import small_config


def start(folder: Path, model: Path, backend: str, workers: int, steps: int) -> subprocess.Popen[str]:
    """`qlora-dist train` of a run that makes no checkpoint by itself before its end."""
    config = small_config(
        folder / "run", model,
        train={"max_steps": steps, "lr_scheduler_type": "constant"},
        eval={"sample_prompts": 0},
        checkpoint={"save_steps": 1_000_000},
        launch={"backend": backend, "num_workers": workers, "device": "cpu"},
        track={"tensorboard": False, "report": False},
    )  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_dist.cli", "train", str(path)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("backend", "workers", "number"),
    [
        ("none", 1, signal.SIGTERM),
        ("torchrun", 1, signal.SIGUSR1),
        pytest.param("ray", 2, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_the_first_signal_is_a_checkpoint_and_the_same_command_goes_on(
    backend: str, workers: int, number: signal.Signals, tiny_model: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    process = start(tmp_path, tiny_model, backend, workers, 1_000_000)
    try:
        wait_until(lambda: max((r["step"] for r in read_metrics(run_dir)), default=0) > 3 or process.poll() is not None)
        processes = family(process)
        process.send_signal(number)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 128 + number, out + err
    assert f"{number.name}: a checkpoint at the next step boundary, then the end" in err
    assert f"stopped by {number.name} after a checkpoint; the same command goes on from it" in out.splitlines()
    assert "Traceback" not in out + err
    status = read_status(run_dir)
    assert (status["state"], status["reason"]) == ("stopped", f"{number.name} to the process that started the run")
    (checkpoint,) = list_checkpoints(run_dir)
    assert verify(checkpoint.path) == []
    # Nothing that was trained is lost.
    assert checkpoint.step == max(record["step"] for record in read_metrics(run_dir)) > 3
    helpers = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # which take a minute to see that their cluster is gone
    wait_until(lambda: all_gone([p for p in processes if p.pid == process.pid or not _is(p, *helpers)]), 30)

    if backend == "ray":
        again = start(tmp_path, tiny_model, backend, workers, checkpoint.step + 2)
        out, err = again.communicate(timeout=100)
        assert again.returncode == 0, out + err
        assert read_status(run_dir)["last_checkpoint"]["step"] == checkpoint.step + 2
        assert len(read_metrics(run_dir)) == checkpoint.step + 2


def _is(process: psutil.Process, *names: str) -> bool:
    try:
        return " ".join(process.cmdline()).strip() in names
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    "backend", ["torchrun", pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.timeout(200)])]
)
def test_a_second_sigterm_ends_the_run_at_once(
    backend: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers of this toy do not hear of a stop; SIGUSR1 may come as often as it likes."""
    temporary = tmp_path_factory.mktemp("tmp")
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = start_toy("hang", tmp_path, f"backend={backend}")
    wait_until(lambda: len(started(tmp_path)) == 2)
    processes = family(process)
    workers = [psutil.Process(pid) for pid in started(tmp_path)]
    asked = tmp_path / "events.jsonl"
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
        os.kill(process.pid, number)
        wait_until(lambda: "SIGUSR1 to the process" in asked.read_text(), 30)
    assert all(worker.is_running() for worker in workers)
    assert backend == "ray" or list(temporary.glob("qlora-dist-*"))
    assert process.poll() is None
    # Two signals that are pending at the same time are one.
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.count("SIGUSR1: a checkpoint at the next step boundary") == 1
    assert asked.read_text().count('"stop"') == 1
    assert "SIGTERM again: ended at once" in err
    assert not list(temporary.glob("qlora-dist-*"))
    wait_until(lambda: all_gone(workers), 30)
    helpers = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    wait_until(lambda: all_gone([p for p in processes if not _is(p, *helpers)]), 30)
