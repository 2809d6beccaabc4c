"""FP8 over shards: the scales of a weight that is gathered for each use are those of the whole weight.

Tolerance: tokens are rounded by themselves, whatever micro-batch they are in; but where sums of another order move a
number across the border between two of e4m3's, it moves by a sixteenth: 1e-5 in loss and 3e-4 in gradient norm are
seen. FP8 itself costs ten times that here.
"""

from pathlib import Path

import pytest

from tests.distributed.group import series, train_in_group
from tests.distributed.strategies import (
    make_first_adapter,
    make_odd_model,
    matrix_config,
    worst_difference,
    write_rows,
)
from tests.single import train_here


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fp8_over_shards_trains_what_one_worker_trains_in_fp8(tmp_path: Path) -> None:
    base = make_odd_model(tmp_path / "base")
    adapter, data = make_first_adapter(base, tmp_path / "adapter"), write_rows(tmp_path / "rows.jsonl")
    steps = {"max_steps": 4, "activations": "recompute"}
    configs = {
        name: matrix_config(
            tmp_path / name, base, adapter, data, strategy, workers,
            model={"fused": "always", "compute": compute}, train=steps,
        )
        for name, strategy, workers, compute in [
            ("bf16", "none", 1, "bf16"), ("fp8", "none", 1, "fp8"), ("fsdp", "fsdp", 2, "fp8"),
            ("zero3", "zero3", 2, "fp8"),
        ]
    }  # fmt: skip
    outcomes = [train_here(configs["bf16"]), train_here(configs["fp8"])]
    outcomes += train_in_group([configs["fsdp"], configs["zero3"]], 2)
    assert all(outcome["state"] == "finished" for outcome in outcomes), outcomes
    for metric, tolerance, costs in (("loss", 5e-5, 1e-4), ("grad_norm", 1e-3, 3e-3)):
        wanted = series(configs["fp8"].run_dir, metric)
        assert worst_difference(series(configs["bf16"].run_dir, metric), wanted) > costs
        for name in ("fsdp", "zero3"):
            assert worst_difference(series(configs[name].run_dir, metric), wanted) < tolerance, (name, metric)
