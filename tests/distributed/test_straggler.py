"""Two real ranks, one of them throttled for real: stopped for two thirds of its time."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.rundir import EVENTS_FILE
from tests.cluster.faults import REPOSITORY, all_gone, family, wait_until
from tests.single import small_config

# Stopped and running, in turn, shorter than a step.
STOPPED_S, RUNNING_S = 0.03, 0.015


@contextmanager
def throttled(pid: int) -> Iterator[None]:
    """`pid` stopped again and again within the block."""
    over = threading.Event()

    def throttle() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            os.kill(pid, signal.SIGCONT)
            time.sleep(RUNNING_S)

    thread = threading.Thread(target=throttle, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def busy(run_dir: Path) -> list[float]:
    """Seconds a step outside collectives of the ranks that have been judged."""
    return [rank["busy_s"] for rank in read_status(run_dir)["ranks"] if rank.get("busy_s")]


def told(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in EventLog(run_dir / EVENTS_FILE).read_new() if event["kind"] == "straggler"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_throttled_rank_is_named_and_nobody_else(tiny_model: Path, tmp_path: Path, strategy: str) -> None:
    """Under fsdp ranks wait inside forward and backward, under ddp at their end."""
    config = small_config(
        tmp_path / "run", tiny_model,
        data={"packing": True, "max_length": 256, "max_rows": 200},
        train={"max_steps": 1000000, "global_batch_size": 8, "per_device_train_batch_size": 4},
        checkpoint={"save_steps": 1000000}, shard={"strategy": strategy}, track={"tensorboard": False},
        launch={"backend": "torchrun", "num_workers": 2, "device": "cpu"},
    )  # fmt: skip
    file, run_dir = tmp_path / "config.yaml", config.run_dir
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    command = [sys.executable, "-m", "qlora_dist.cli", "train", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    everybody = []
    try:
        wait_until(lambda: (run_dir / "status.json").exists() and (read_status(run_dir)["step"] or 0) > 5, 120)
        ranks = read_status(run_dir)["ranks"]
        everybody = family(process)
        for rank in ranks:
            # On one core, so that whatever else this machine does slows both alike.
            psutil.Process(rank["pid"]).cpu_affinity([0])
        wait_until(lambda: len(busy(run_dir)) == 2, 30)
        time.sleep(8)
        assert not told(run_dir), "nobody is throttled yet"
        began = time.time()
        with throttled(ranks[1]["pid"]):
            wait_until(lambda: bool(told(run_dir)), 60)
        (event,) = told(run_dir)
        assert (event["rank"], event["host"], event["pid"]) == (1, ranks[1]["host"], ranks[1]["pid"])
        assert not event["over"]
        assert event["time"] - began < 60
        assert event["busy_s"] > 1.2 * event["usual_s"]
        wait_until(lambda: len(told(run_dir)) == 2, 60)
        assert told(run_dir)[1]["over"]
    finally:
        process.terminate()
        process.wait(60)
        wait_until(lambda: all_gone(everybody), 30)
