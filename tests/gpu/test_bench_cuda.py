"""`qlora-dist bench` on a GPU: kernels against their ceilings, a tiny comparison, a sweep with a point too large."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def bench(*arguments: str) -> None:
    command = [sys.executable, "-m", "qlora_dist.cli", "bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


def out(tmp_path: Path, name: str) -> Path:
    """Where the result goes: the folder that $OUT names, so that it can be kept."""
    return Path(os.environ.get("OUT", tmp_path)) / name


def records(file: Path) -> dict[str, dict[str, Any]]:
    return {record["name"]: record for record in json.loads(file.read_text())["records"]}


def test_kernels_reach_their_ceilings(tmp_path: Path) -> None:
    """Well below what is expected: who falls under a half has left the path of 16-byte accesses."""
    file = out(tmp_path, "kernels.json")
    bench("kernels", "--out", str(file))
    measured = records(file)
    assert not [name for name, record in measured.items() if record["outcome"] != "ok"]
    slow = {name: record["of_ceiling"] for name, record in measured.items() if record["of_ceiling"] < 0.5}
    assert not slow
    # Nothing is faster than its ceiling by more than a timing's noise, or what is counted is wrong.
    assert not {name: record["of_ceiling"] for name, record in measured.items() if record["of_ceiling"] > 1.15}


def test_a_sweep_goes_on_after_a_point_that_is_too_large(tmp_path: Path) -> None:
    file = out(tmp_path, "throughput.json")
    # A budget below what CUDA itself takes leaves the allocator 0.1 GiB.
    bench(
        "throughput", "--model", "llama-3.2-1b", "--steps", "3", "--warm-up", "1", "--out", str(file),
        "--set", "train.memory_budget_gib=2,60", "--set", "data.max_length=512",
    )  # fmt: skip
    small, large = records(file).values()
    assert small["outcome"] == "out of memory"
    assert large["outcome"] == "ok"
    assert 0 < large["peak_allocated_gib"] <= large["peak_reserved_gib"] < large["gpu_total_gib"]


def test_peers_start_from_the_same_loss(tmp_path: Path) -> None:
    """The same weights and batches, and adapters that add nothing yet: a loss that differs is another computation."""
    file = out(tmp_path, "peers.json")
    bench(
        "peers", "--model", "llama-3.2-1b", "--size", "2x512", "--steps", "3", "--warm-up", "1", "--out", str(file),
        "--peer", "peft", "--peer", "liger", "--peer", "unsloth",
    )  # fmt: skip
    good = [record for record in records(file).values() if record["outcome"] != "not installed"]
    assert len(good) >= 3
    assert all(record["outcome"] == "ok" for record in good), [record.get("why") for record in good]
    assert len({record["trained_parameters"] for record in good if record["peer"]}) == 1
    for record in good:
        assert record["losses"][0] == pytest.approx(good[0]["losses"][0], rel=2e-3)
    document = json.loads(file.read_text())
    assert document["rates"]["2x512"]["bound"]["recomputed"] < document["rates"]["2x512"]["bound"]["kept"]
