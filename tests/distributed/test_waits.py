"""What a rank counts as its own time, under every strategy: the rank that is slow in its layers has all of it."""

import json
import os
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.group import train_in_group
from tests.single import small_config

SLEEP_S, LAYERS, STEPS = 0.05, 2, 8
FOLDER_VARIABLE = "QLORA_DIST_TEST_BUSY"


def slow_layers(rank: int) -> None:
    """Rank 1 sleeps in each layer's forward; every rank leaves behind what it has counted after each step."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    from qlora_dist.train.loop import Loop

    forward, take_step = LlamaMLP.forward, Loop.take_step

    def sleeping(self: Any, *arguments: Any) -> Any:
        time.sleep(SLEEP_S if rank == 1 else 0)
        return forward(self, *arguments)

    def take_step_and_leave(self: Any) -> None:
        take_step(self)
        assert self.heartbeat.busy == self.strategy.waits.busy
        with (Path(os.environ[FOLDER_VARIABLE]) / f"{self.config.strategy}-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(self.heartbeat.busy) + "\n")

    LlamaMLP.forward = sleeping  # type: ignore[method-assign]
    Loop.take_step = take_step_and_leave  # type: ignore[method-assign]


def usual_step(file: Path) -> tuple[float, float]:
    """The median step's seconds outside collectives, and the positions of all steps."""
    counts = [json.loads(line) for line in file.read_text().splitlines()]
    assert [steps for _, steps, _ in counts] == list(range(1, STEPS + 1))
    return statistics.median(later[0] - earlier[0] for earlier, later in pairwise(counts)), counts[-1][2]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("strategies", [["ddp", "fsdp"], pytest.param(["zero2", "zero3"], marks=pytest.mark.slow)])
def test_the_slow_rank_is_busy_and_the_other_waits(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategies: list[str]
) -> None:
    """Two sleeps of 50 ms a step are rank 1's own, and not rank 0's: nearly, as the machine is shared."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    configs = [
        small_config(
            tmp_path / strategy, tiny_model, shard={"strategy": strategy},
            launch={"backend": "torchrun", "num_workers": 2},
            train={"max_steps": STEPS, "global_batch_size": 4}, checkpoint={"save_steps": 100},
            track={"tensorboard": False},
        )
        for strategy in strategies
    ]  # fmt: skip
    train_in_group(configs, 2, slow_layers)
    for strategy in strategies:
        quick, slow = [usual_step(tmp_path / f"{strategy}-{rank}.jsonl") for rank in (0, 1)]
        assert quick[1] > 100 * STEPS
        assert slow[0] > LAYERS * SLEEP_S
        assert slow[0] - quick[0] > 0.7 * LAYERS * SLEEP_S, strategy
