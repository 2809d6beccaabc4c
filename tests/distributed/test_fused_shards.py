"""Fused layers over shards: what one worker trains through transformers and PEFT, they train too.

Tolerance as in test_strategies.py. With one plan what a layer keeps outlives the gathering of its weights, with the
other it is made again from weights that were gathered anew.
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

CASES = [("ddp", "keep"), ("fsdp", "keep"), ("fsdp", "recompute"), ("zero3", "keep")]


@pytest.mark.timeout(300)
def test_fused_layers_over_shards_train_what_stock_layers_train_on_one_worker(tmp_path: Path) -> None:
    base = make_odd_model(tmp_path / "base")
    adapter, data = make_first_adapter(base, tmp_path / "adapter"), write_rows(tmp_path / "rows.jsonl")
    stock = matrix_config(tmp_path / "stock", base, adapter, data, "none", 1, model={"fused": "never"})
    assert train_here(stock)["state"] == "finished"
    configs = {
        (strategy, activations): matrix_config(
            tmp_path / f"{strategy}-{activations}", base, adapter, data, strategy, 2,
            model={"fused": "always"}, train={"activations": activations},
        )
        for strategy, activations in CASES
    }  # fmt: skip
    outcomes = train_in_group(list(configs.values()), 2)
    assert all(outcome["state"] == "finished" for outcome in outcomes), outcomes
    for case, config in configs.items():
        for metric in ("loss", "grad_norm"):
            found, wanted = series(config.run_dir, metric), series(stock.run_dir, metric)
            assert worst_difference(found, wanted) < 1e-4, (case, metric)
            assert found != wanted, case
