"""The arithmetic of the islands' benchmarks; the runs themselves are no tests."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.islands_docs import BLOCKS, PAGE, fill
from benchmarks.islands_figures import mean_curve, summarise, table, times_fewer, verdicts
from benchmarks.islands_overhead import round_overhead
from benchmarks.islands_slow_link import shares
from benchmarks.islands_tldr import TIMES, Point, points

PARAMETERS = 4_884_480


def record(point: Point, loss: float, bits_moved: float = 0.0) -> dict[str, Any]:
    """A record whose islands send and receive so many bits an element in each round."""
    moved = point.islands * point.steps / point.sync_every * PARAMETERS * bits_moved / 8
    made = {"name": point.name, "label": point.label, **asdict(point), "batch": 2, "parameters": PARAMETERS}
    made |= {"held_out_loss": loss, "curve": [[0.0, 4.0], [1.0, loss]]}
    return made if point.method == "ddp" else made | {"summary": {"bytes_sent": moved, "bytes_received": moved}}


def test_points_are_told_apart_and_resume_by_name():
    names = [point.name for point in points([0, 1, 2])]
    assert len(set(names)) == len(names)
    assert {point.method for point in points([0])} == {"ddp", "diloco", "mean", "svd"}
    assert all(point.steps % point.sync_every == 0 for point in points([0]))


def test_ddp_takes_the_batch_of_all_islands_in_as_many_steps():
    ddp, island = Point("ddp", 4, 400, 40, 0), Point("svd", 4, 400, 40, 0)
    assert {"train.global_batch_size=8", "train.max_steps=400"} <= set(ddp.settings(2))
    assert {"train.global_batch_size=2", "train.max_steps=400"} <= set(island.settings(2))


@pytest.mark.parametrize(("islands", "factor"), [(2, 1.0), (4, 1.5)])
def test_bytes_by_both_counts(islands: int, factor: float):
    # An island that moves as much as the gradients once up and once down, every 50 of 500 steps.
    moved = 10 * 2 * 4 * PARAMETERS
    strict, both = times_fewer(moved, PARAMETERS, islands, 500, torch.float32)
    assert strict == pytest.approx(factor * 25)
    assert both == pytest.approx(factor * 50)
    assert times_fewer(moved, PARAMETERS, islands, 500, torch.bfloat16)[0] == pytest.approx(strict / 2)


@pytest.mark.parametrize("islands", TIMES)
def test_planned_exchange_meets_the_stricter_count_with_room_for_headers(islands: int):
    steps, sync = TIMES[islands]
    point = Point("diloco", islands, steps, sync, 0, bits=4)
    rows = [record(Point("ddp", islands, steps, sync, 0), 1.7), record(point, 1.71, 4.13)]
    assert summarise(rows)[1]["fewer_bf16"][0] > 115


def test_losses_are_compared_within_their_seed():
    steps, sync = TIMES[2]
    ddp = [Point("ddp", 2, steps, sync, seed) for seed in (0, 1)]
    diloco = [Point("diloco", 2, steps, sync, seed) for seed in (0, 1)]
    other_rate = Point("ddp", 2, steps, sync, 0, overrides=("train.learning_rate=1",))
    rows = [record(ddp[0], 1.0), record(ddp[1], 2.0), record(diloco[0], 1.1, 32), record(diloco[1], 2.0, 32)]
    row = summarise([*rows, record(other_rate, 9.0)])[-1]
    assert row["method"] == "diloco"
    assert row["over_ddp"] == pytest.approx(1.05)
    assert row["worst_over_ddp"] == pytest.approx(1.1)
    assert list(verdicts(rows).values()) == [
        {
            "loss at most 1.01 of DDP's": False,
            "20 times fewer bytes than DDP sends in fp32": True,
            "20 times fewer bytes than DDP sends and receives in fp32": True,
        }
    ]
    assert table(rows).count("\n") == 3


def test_curves_are_averaged_where_all_have_a_point():
    assert mean_curve([[[0, 4.0], [0.5, 3.0], [1, 2.0]], [[0, 2.0], [1, 1.0]]]) == ([0, 1], [3.0, 1.5])


def test_overhead_is_what_a_round_takes_beyond_its_steps():
    clock, records = 0.0, []
    for step in range(1, 25):
        # A slow first step, an exchange of 1.5 s before steps 7, 13 and 19, and a step's jitter.
        clock += 2.0 + (30.0 if step == 1 else 0.0) + (1.5 if step % 6 == 1 and step > 1 else 0.0)
        records += [{"step": step, "time": clock + (0.01 if step % 4 == 0 else 0.0), "loss": 1.0}]
        records += [{"step": step, "time": clock + 0.5, "exchange_seconds": 1.0}] if step % 6 == 0 else []
    found = round_overhead(records, 6)
    assert found["seconds_per_step"] == pytest.approx(2.0, abs=0.011)
    assert found["overhead_s"] == pytest.approx(1.5, abs=0.08)
    assert len(found["overheads_s"]) == 3
    assert found["overhead_in_steps"] == pytest.approx(0.75, abs=0.05)


def test_walls_are_compared_with_ddps():
    sides = [{"name": "ddp", "wall_s": 100.0}, {"name": "islands", "wall_s": 20.0}]
    assert shares(sides) == {"islands": 0.2}
    assert shares(sides[1:]) == {}


def test_page_has_one_place_for_each_result():
    page = (Path(__file__).parents[2] / PAGE).read_text(encoding="utf-8")
    for name in BLOCKS:
        once = fill(page, name, "| 1 |")
        assert fill(once, name, "| 2 |") == fill(page, name, "| 2 |")
        assert "| 1 |\n<!-- end -->" in once
