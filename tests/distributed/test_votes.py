"""Ranks that read their votes a step late, as on GPUs, still stop after the same step."""

from pathlib import Path

import pytest

from tests.distributed.group import series, train_in_group
from tests.single import small_config


def ask_on_one_rank_in_step_3(rank: int) -> None:
    from functools import partial

    from qlora_dist.train import heartbeat
    from qlora_dist.train import loop as loop_module
    from qlora_dist.train.arrivals import Arrivals

    loop_module.Arrivals = partial(Arrivals, late=1)  # type: ignore[assignment,misc]
    if rank == 1:
        asked = property(lambda self: self.step >= 3, lambda self, value: None)
        heartbeat.Heartbeat.stop_asked = asked  # type: ignore[assignment]


@pytest.mark.timeout(120)
def test_a_vote_is_counted_a_step_late_by_all(tiny_model: Path, tmp_path: Path) -> None:
    config = small_config(
        tmp_path, tiny_model, shard={"strategy": "ddp"}, launch={"backend": "torchrun", "num_workers": 2},
        checkpoint={"save_steps": 100},
    )  # fmt: skip
    (outcome,) = train_in_group([config], 2, ask_on_one_rank_in_step_3, timeout_s=100)
    assert (outcome["state"], outcome["step"]) == ("finished", 4)
    assert set(series(tmp_path, "loss")) == {1, 2, 3, 4}
