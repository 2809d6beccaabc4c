"""A rank that finds a mistake alone: the others, already waiting for it in a collective, end with it and at once."""

import time
from pathlib import Path

from qlora_dist.config.errors import UserError
from tests.distributed.group import train_in_group
from tests.single import small_config


def rank_one_lacks_the_data(rank: int) -> None:
    from qlora_dist.train import worker

    def missing(*args):
        raise UserError("source-missing", field="data.train", place="rows.jsonl", kinds="a file")

    if rank == 1:
        worker.prepare_data = missing


def rank_zero_has_a_full_disk(rank: int) -> None:
    from qlora_dist.checkpoint import writer

    def full(*args):
        raise OSError(28, "No space left on device")

    if rank == 0:
        writer.write_snapshot = full


def config_of_two(run_dir: Path, base: Path):
    return small_config(
        run_dir, base, launch={"backend": "torchrun", "num_workers": 2, "collective_timeout_s": 120},
        train={"max_steps": 400}, checkpoint={"save_steps": 2},
    )  # fmt: skip


def test_in_setup(tiny_model: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    (outcome,) = train_in_group([config_of_two(tmp_path, tiny_model)], 2, rank_one_lacks_the_data)
    assert (outcome["exit_code"], outcome["rank"]) == (2, 1)
    assert "rows.jsonl does not exist" in outcome["message"]
    assert time.monotonic() - started < 100, "the other rank did not wait for its collective to time out"


def test_at_a_save(tiny_model: Path, tmp_path: Path) -> None:
    (outcome,) = train_in_group([config_of_two(tmp_path, tiny_model)], 2, rank_zero_has_a_full_disk)
    assert (outcome["exit_code"], outcome["rank"]) == (2, 0)
    assert "no space left" in outcome["message"]
    assert "committed checkpoints are untouched" in outcome["message"]
