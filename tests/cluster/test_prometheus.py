"""Metrics of a run of two workers, scraped while it trains: from Ray's actor, from torchrun's launcher, from rank 0."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.cluster.faults import REPOSITORY, all_gone, family, wait_until
from tests.single import small_config
from tests.unit.test_prometheus import Samples, free_port, scrape

TRAIN = ["-m", "qlora_dist.cli", "train"]
STARTED_BY = {
    "ray": TRAIN,
    "torchrun": TRAIN,
    "torchrun by hand": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *TRAIN],
}


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("how", STARTED_BY)
def test_two_workers_are_scraped(tiny_model: Path, tmp_path: Path, how: str) -> None:
    port = free_port()
    config = small_config(
        tmp_path / "run", tiny_model, train={"max_steps": 1000000}, checkpoint={"save_steps": 20},
        launch={"backend": how.partition(" ")[0], "num_workers": 2, "device": "cpu"},
        track={"prometheus_port": port, "tensorboard": False, "report": False},
    )  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    words = STARTED_BY[how]
    process = subprocess.Popen(
        [sys.executable, *words, str(file)], cwd=REPOSITORY, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    seen: Samples = {}
    try:
        deadline = time.monotonic() + 120
        while seen.get(("checkpoints_committed_total",), 0) < 2 or len(of_ranks(seen)) < 2:
            assert time.monotonic() < deadline, seen
            assert process.poll() is None
            time.sleep(0.3)
            try:
                seen = scrape(port)
            except OSError:
                continue
        assert sum(of_ranks(seen).values()) == pytest.approx(seen[("tokens_per_second",)])
        (node,) = [value for name, value in seen.items() if name[0] == "node_tokens_per_second"]
        assert node == pytest.approx(seen[("tokens_per_second",)])
        assert seen[("last_committed_step",)] >= 40
    finally:
        everybody = family(process)
        process.terminate()
        process.wait(60)
        wait_until(lambda: all_gone(everybody), 30)


def of_ranks(seen: Samples) -> dict[tuple[str, ...], float]:
    """The samples of ranks' throughput."""
    return {name: value for name, value in seen.items() if name[0] == "rank_tokens_per_second"}
