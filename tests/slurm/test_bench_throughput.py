"""slurm/bench_throughput.sh itself over two real Slurm nodes, a CPU worker on each: figures by node and rank."""

import json
from pathlib import Path

import pytest

from tests.bench_sums import check_sums
from tests.slurm.cluster import Slurm


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_figures_of_two_nodes_add_up(slurm: Slurm, tmp_path: Path) -> None:
    """3 packs a step over two ranks, in rows of several lengths: rank 0 has more tokens than rank 1."""
    rows = tmp_path / "rows.jsonl"
    texts = ["word " * (5 + 7 * (number % 11)) for number in range(60)]
    rows.write_text("".join(json.dumps({"prompt": "write", "completion": text}) + "\n" for text in texts))
    job = slurm.submit(
        "--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/out.txt",
        "slurm/bench_throughput.sh", "--model", "llama-tiny", "--steps", "6", "--warm-up", "2",
        "--set", f"data.train={rows}", "--set", "data.max_length=512", "--set", "train.global_batch_size=3",
        "--set", "launch.device=cpu", "--set", "model.compute_dtype=fp32",
        QLORA_DIST_LOGS=str(tmp_path / "logs"), WORKERS_PER_NODE="1", QLORA_DIST_SCRATCH=str(slurm.folder),
        RAY_OBJECT_STORE_BYTES="80000000",
    )  # fmt: skip
    found = slurm.wait(job, 300)
    print((tmp_path / "out.txt").read_text())
    assert found["JobState"] == "COMPLETED"
    (out,) = tmp_path.glob("logs/*/*/bench-throughput.json")
    document = json.loads(out.read_text())
    check_sums(document, out.with_suffix(".md").read_text(), ["n1", "n2"], 2)
    first, second = document["records"][0]["ranks"]
    assert first["tokens_per_second"] > 1.2 * second["tokens_per_second"]
