"""A sharded run of one or two workers loses a node, and the worker that is left takes up the state of both."""

import os
import signal
from pathlib import Path

import pytest

from tests.cluster.test_two_nodes import TOLERANCE, Job, nodes, sections
from tests.cluster.two_nodes import RayNodes
from tests.distributed.group import series
from tests.single import small_config, train_here

__all__ = ["nodes"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_one_worker_goes_on_with_the_state_of_two(
    nodes: RayNodes, tiny_model: Path, tmp_path: Path, strategy: str
) -> None:
    settings = sections(5000, backend="ray", num_workers=[1, 2], address=nodes.address, collective_timeout_s=20)
    config = small_config(tmp_path / "run", tiny_model, shard={"strategy": strategy}, **settings)
    job = Job(nodes, tmp_path, config)
    job.wait(lambda: job.last()["step"] >= 30)
    nodes.kill(1)
    job.wait(lambda: job.last()["attempt"] == 2 and job.last()["step"] >= 45)
    assert job.events("resumed")[0]["step"] == 25
    assert job.sizes() == [2, 1]
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.process.wait(60) == 130

    last = job.last()["step"]
    alone = sections(last, backend="none", num_workers=1)
    undisturbed = small_config(tmp_path / "undisturbed", tiny_model, shard={"strategy": "none"}, **alone)
    assert train_here(undisturbed)["state"] == "finished"
    for metric in ("loss", "grad_norm"):
        whole, disturbed = series(undisturbed.run_dir, metric), series(job.run_dir, metric)
        assert set(disturbed) == set(range(1, last + 1))
        assert disturbed == pytest.approx({step: whole[step] for step in disturbed}, rel=TOLERANCE), metric
