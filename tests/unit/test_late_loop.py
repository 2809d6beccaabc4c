"""The loop as it is on a GPU, where a step's loss, norm and votes are read a step late; here the lag is asked for."""

import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_dist.checkpoint.format import read_snapshot
from qlora_dist.checkpoint.manifest import list_checkpoints
from qlora_dist.track.metrics import read_metrics
from qlora_dist.train import loop as loop_module
from qlora_dist.train.arrivals import Arrivals, seconds_between
from tests.distributed.group import series
from tests.single import small_config, train_here
from tests.unit.test_train import spoil


def test_what_is_due_and_what_is_asked_for() -> None:
    late: Arrivals[int] = Arrivals(torch.device("cpu"), late=1)
    at_once: Arrivals[int] = Arrivals(torch.device("cpu"))
    for step in (1, 2):
        late.send(step, torch.tensor([step, 0.5]))
        at_once.send(step, torch.tensor([step, 0.5]))
        assert [taken[:2] for taken in at_once.take()] == [(step, [float(step), 0.5])]
        assert [known for known, *_ in late.take()] == ([] if step == 1 else [1])
    assert [known for known, *_ in late.take(everything=True)] == [2]
    assert late.take(everything=True) == at_once.take(everything=True) == []


def test_a_step_has_its_own_seconds_however_late_it_is_read() -> None:
    late: Arrivals[int] = Arrivals(torch.device("cpu"), late=1)
    start = late.now()
    for step in (1, 2):
        time.sleep(0.05)
        late.send(step, torch.zeros(1))
    time.sleep(0.5)
    stamps = [start, *(stamp for *_, stamp in late.take(everything=True))]
    for before, after in pairwise(stamps):
        assert 0.05 <= seconds_between(before, after) < 0.4


@pytest.fixture
def read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "Arrivals", partial(Arrivals, late=1))


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_run_read_late_is_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging_steps: int
) -> None:
    sections = {
        "train": {"logging_steps": logging_steps}, "eval": {"eval_steps": 3},
        "data": {"eval": "bundled:home_commands", "max_eval_rows": 4},
    }  # fmt: skip
    plain = small_config(tmp_path / "plain", tiny_model, **sections)
    assert train_here(plain)["state"] == "finished"
    monkeypatch.setattr(loop_module, "Arrivals", partial(Arrivals, late=1))
    late = small_config(tmp_path / "late", tiny_model, **sections)
    assert train_here(late)["state"] == "finished"
    for metric in ("loss", "grad_norm", "learning_rate", "eval_loss", "skipped_steps"):
        assert series(late.run_dir, metric) == series(plain.run_dir, metric)
        assert set(series(late.run_dir, "loss")) == set(range(1, 7))
    ours, theirs = (load_file(c.run_dir / "adapter" / "adapter_model.safetensors") for c in (late, plain))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_checkpoints_know_of_every_step_that_was_skipped(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_late: None
) -> None:
    """Step 4 is due for saving and is skipped: saving waits for what is known of it, and leaves it to step 6."""
    spoil(monkeypatch, {1, 4})
    config = small_config(tmp_path, tiny_model, checkpoint={"keep_last": 9})
    assert train_here(config)["state"] == "finished"
    assert [c.step for c in list_checkpoints(tmp_path)] == [6, 2]
    saved = {c.step: read_snapshot(c.path) for c in list_checkpoints(tmp_path)}
    assert saved[6].state["progress"]["skipped_steps"] == 2
    assert saved[2].state["progress"]["skipped_steps"] == 1
    # The optimizer has taken four steps, of which one before the first checkpoint.
    assert set(saved[2].optimizer_scalars.values()) == {1}
    assert set(saved[6].optimizer_scalars.values()) == {4}


def test_too_many_bad_steps_stop_the_run_a_step_late(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_late: None
) -> None:
    spoil(monkeypatch, {3, 4, 5, 6})
    outcome = train_here(small_config(tmp_path, tiny_model, train={"max_bad_steps": 3}))
    assert outcome["exit_code"] == 2
    assert "not finite in 3 steps in a row, up to step 5" in outcome["message"]
    assert [r["step"] for r in read_metrics(tmp_path) if "loss" in r] == [1, 2, 3, 4, 5]
