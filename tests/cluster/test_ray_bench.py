"""launchers/ray_bench.sh against a real local cluster: the throughput benchmark as a Ray job."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from qlora_dist.coordinate.host import this_host
from tests.bench_sums import check_sums
from tests.cluster.faults import REPOSITORY
from tests.cluster.test_ray_jobs import BIN, Cluster, cluster

__all__ = ["cluster"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_figures_of_each_rank_add_up(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = [
        str(out), "--model", "llama-tiny", "--steps", "6", "--warm-up", "2",
        "--set", "launch.num_workers=2", "--set", "launch.device=cpu", "--set", "train.global_batch_size=3",
        "--set", "data.max_length=128", "--set", "model.compute_dtype=fp32",
    ]  # fmt: skip
    more = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_API_SERVER_ADDRESS": cluster.url}
    done = subprocess.run(
        [REPOSITORY / "launchers" / "ray_bench.sh", *words], cwd=REPOSITORY, env=cluster.inside | more,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    check_sums(json.loads(out.read_text()), out.with_suffix(".md").read_text(), [this_host()], 2)
    assert "| defaults | all | all |" in done.stdout
