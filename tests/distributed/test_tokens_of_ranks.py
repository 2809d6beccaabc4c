"""Throughput by node and by rank: each rank's own tokens, by the same seconds, so that they add up to the total."""

import os
from pathlib import Path

import numpy as np
import pytest

from qlora_dist.bench.tables import workers_table
from qlora_dist.bench.throughput import of_ranks
from qlora_dist.coordinate.report import read_status
from qlora_dist.data.collate import tokens_of_ranks
from qlora_dist.data.order import micro_batches
from qlora_dist.track.metrics import read_metrics
from tests.distributed.group import train_in_group
from tests.single import small_config


class Table:
    """What of a token table is asked for."""

    pack_tokens = np.random.default_rng(0).integers(1, 500, 1000)


@pytest.mark.parametrize(("packs", "batch", "world_size"), [(12, 2, 3), (7, 2, 3), (5, 8, 2), (1, 1, 4), (64, 3, 8)])
def test_tokens_are_counted_where_they_are_dealt(packs: int, batch: int, world_size: int) -> None:
    chosen = np.random.default_rng(1).permutation(1000)[:packs]
    dealt = [
        sum(int(Table.pack_tokens[pack]) for part in micro_batches(chosen, batch, rank, world_size) for pack in part)
        for rank in range(world_size)
    ]
    assert tokens_of_ranks(Table(), chosen, batch, world_size).tolist() == dealt  # type: ignore[arg-type]


def two_hosts(rank: int) -> None:
    """A host of its own for each rank, as Slurm names them."""
    os.environ["SLURMD_NODENAME"] = f"node-{rank}"


@pytest.mark.timeout(120)
def test_ranks_and_nodes_of_a_real_run_add_up(tiny_model: Path, tmp_path: Path) -> None:
    """3 packs a step: rank 0 has two of them."""
    config = small_config(
        tmp_path, tiny_model, shard={"strategy": "ddp"}, launch={"backend": "torchrun", "num_workers": 2},
        train={"max_steps": 6, "global_batch_size": 3, "per_device_train_batch_size": 1, "logging_steps": 2},
        checkpoint={"save_steps": 100}, track={"tensorboard": False},
    )  # fmt: skip
    train_in_group([config], 2, two_hosts)
    records = [record for record in read_metrics(tmp_path) if "loss" in record]
    for record in records:
        nodes = [record[f"tokens_per_second/node-{rank}"] for rank in range(2)]
        assert sum(nodes) == pytest.approx(record["tokens_per_second"], rel=1e-12)
        assert nodes[0] > nodes[1] > 0
    status = read_status(tmp_path)
    assert [rank["host"] for rank in status["ranks"]] == ["node-0", "node-1"]
    # Each rank's own clock, here: they logged the last two steps at nearly the same time.
    assert status["tokens_per_second"] == pytest.approx(records[-1]["tokens_per_second"], rel=0.5)
    told = of_ranks(status["ranks"], records[2:])
    total = sum(r["tokens_per_second"] * r["seconds_per_step"] for r in records[2:])
    assert told["mean_tokens_per_second"] == total / sum(r["seconds_per_step"] for r in records[2:])
    for rows in (status["ranks"], told["ranks"], told["nodes"]):
        assert rows[0]["tokens_per_second"] > 1.2 * rows[1]["tokens_per_second"]
    for rows in (told["ranks"], told["nodes"]):
        assert sum(row["tokens_per_second"] for row in rows) == pytest.approx(told["mean_tokens_per_second"], rel=1e-9)


def test_only_steps_that_every_rank_told_of_are_counted() -> None:
    steps = [{"step": step, "tokens_per_second": 300.0, "seconds_per_step": 0.5} for step in range(1, 5)]
    ranks = [
        {"rank": 0, "host": "a", "memory_bytes": 1 << 30, "busy_s": 0.3, "step_tokens": [[n, 100] for n in (2, 3, 4)]},
        {"rank": 1, "host": "a", "memory_bytes": 2 << 30, "busy_s": 0.4, "step_tokens": [[n, 50] for n in (1, 3, 4)]},
    ]
    told = of_ranks(ranks, steps)
    assert [row["tokens_per_second"] for row in told["ranks"]] == [200.0, 100.0]
    assert told["mean_tokens_per_second"] == 300.0
    assert told["nodes"] == [{"host": "a", "ranks": [0, 1], "tokens_per_second": 300.0, "busy_s": 0.4, "peak_gib": 2.0}]
    table = workers_table([{"name": "x", **told}, {"name": "failed", "outcome": "failed"}])
    assert "| x | a | 1 | 100.0 | 0.400 | 2.0 |" in table
    assert "failed" not in table
    assert workers_table([{"name": "alone", **of_ranks(ranks[:1], steps)}]) == ""
    nothing = of_ranks([{**ranks[0], "step_tokens": None}], steps)
    assert nothing == {"mean_tokens_per_second": None, "ranks": [], "nodes": []}
