"""A rank that stops in the middle of a sharded step: named within the collectives' time, and the run goes on.

By torchrun, which starts faster than Ray; test_training_faults.py does the same for ddp under Ray.
"""

import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.cluster.faults import family, wait_until
from tests.cluster.test_training_faults import SECTIONS, Job
from tests.distributed.group import series
from tests.distributed.strategies import STRATEGIES, worst_difference
from tests.gpu.test_cuda import train_on_gpu
from tests.single import small_config, train_here

STEPS, TIMEOUT_S = 20, 20
# 8-bit state would carry differences in rounding over its steps.
TRAIN = {"max_steps": STEPS, "optim": "adamw_torch"}


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one worker."""
    sections = SECTIONS | {"launch": {"backend": "none"}, "train": SECTIONS["train"] | TRAIN}
    config = small_config(tmp_path_factory.mktemp("undisturbed"), tiny_model, **sections)
    # Where there are GPUs, the jobs below use them.
    train = train_on_gpu if torch.cuda.is_available() else train_here
    assert train(config)["state"] == "finished"
    return config.run_dir


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stopped_rank_is_named_and_the_run_goes_on(
    tmp_path: Path, tiny_model: Path, undisturbed: Path, strategy: str
) -> None:
    workers, settings = STRATEGIES[strategy]
    job = Job(tmp_path, tiny_model)
    job.start(
        "launch.backend=torchrun", f"launch.num_workers={workers}", f"launch.collective_timeout_s={TIMEOUT_S}",
        "launch.device=auto",
        f"shard.strategy={strategy}", *(f"shard.{key}={value}" for key, value in settings.items()),
        *(f"train.{key}={value}" for key, value in TRAIN.items()),
    )  # fmt: skip
    try:
        wait_until(lambda: job.step() >= 7, 240)
        stopped = psutil.Process(job.pid(1))
        stopped.suspend()
        since = time.monotonic()
        wait_until(lambda: bool(job.events("failed")), 120)
        took = time.monotonic() - since
        message = job.events("failed")[0]["message"]
        assert "rank 1" in message
        assert str(stopped.pid) in message
        assert "step " in message
        # The collective's own time, and that to ask who is silent.
        assert took < TIMEOUT_S + 10
        assert job.wait(300) == 0
    finally:
        if job.process.poll() is None:
            for process in family(job.process):
                process.kill()
    assert len(job.events("generation")) == 2
    for metric in ("loss", "grad_norm", "eval_loss"):
        assert worst_difference(series(job.run_dir, metric), series(undisturbed, metric)) < 1e-4, metric
