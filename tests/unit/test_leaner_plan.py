"""A run that meets an out-of-memory error goes on with a leaner plan and loses nothing.

The error is raised where a GPU's allocator would raise it: in the middle of a step, with some gradients made. A leaner
plan computes the same numbers again, so in fp32 on a CPU nothing differs.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_dist.coordinate.rundir import open_run
from qlora_dist.coordinate.state import MOST_LEANER, Coordinator
from qlora_dist.model import block as block_module
from qlora_dist.train import loop as loop_module
from qlora_dist.train.leaner_plan import OutOfRoom
from tests.distributed.group import series, train_in_group
from tests.single import small_config, train_here

FUSED: dict[str, Any] = {"model": {"fused": "always", "compute_dtype": "fp32"}, "adapter": {"lora_dropout": 0.0}}
METRICS = ("loss", "grad_norm")


def full_memory(keeping: int, calls: int) -> Callable[..., Any]:
    """The real micro-batches, out of memory from call number `calls` on while that many layers keep something."""
    accumulate, made = loop_module.accumulate_gradients, iter(range(10**6))

    def limited(model: Any, strategy: Any, batches: Any, *rest: Any) -> torch.Tensor:
        blocks = {id(c.block): c.block for c in closures(model)}
        if next(made) >= calls and sum(b.plan != block_module.RECOMPUTE_ALL for b in blocks.values()) >= keeping:
            accumulate(model, strategy, batches[:1], *rest)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return accumulate(model, strategy, batches, *rest)

    return limited


def told(run_dir: Path, kind: str) -> list[str]:
    """The messages of a kind in the coordinator's log."""
    events = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [event["message"] for event in events if event["kind"] == kind]


class Found:
    def __init__(self, block: Any):
        self.block = block


def closures(model: Any) -> list[Found]:
    """The fused layers behind the forwards of a model."""
    found = []
    for module in model.modules():
        for cell in getattr(module.__dict__.get("forward"), "__closure__", None) or ():
            if isinstance(cell.cell_contents, block_module.Block):
                found.append(Found(cell.cell_contents))
    return found


def test_one_worker_tries_the_step_again(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = small_config(tmp_path / "plain", tiny_model, **FUSED)
    assert train_here(plain)["state"] == "finished"
    monkeypatch.setattr(loop_module, "accumulate_gradients", full_memory(keeping=1, calls=2))
    ours = small_config(tmp_path / "ours", tiny_model, **FUSED)
    assert train_here(ours)["state"] == "finished"
    for metric in METRICS:
        assert series(ours.run_dir, metric) == series(plain.run_dir, metric)
    notices = told(ours.run_dir, "notice")
    assert any("out of memory at step 3" in message and "recomputed" in message for message in notices), notices


@pytest.mark.parametrize("strategy", ["none", "ddp", "fsdp", "zero2", "zero3"])
def test_an_error_in_the_middle_of_a_backward(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """What shards is in the middle of gathering and reducing then, and says so; the others go on."""
    backward, made = block_module.swiglu_backward, iter(range(10**6))

    def limited(*arguments: Any) -> None:
        if next(made) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        backward(*arguments)

    plain = small_config(tmp_path / "plain", tiny_model, **FUSED, shard={"strategy": strategy})
    assert train_here(plain)["state"] == "finished"
    monkeypatch.setattr(block_module, "swiglu_backward", limited)
    ours = small_config(tmp_path / "ours", tiny_model, **FUSED, shard={"strategy": strategy})
    if strategy in ("none", "ddp"):
        assert train_here(ours)["state"] == "finished"
        for metric in METRICS:
            assert series(ours.run_dir, metric) == series(plain.run_dir, metric)
        return
    with pytest.raises(OutOfRoom):
        train_here(ours)
    outcome = Coordinator(ours.run_dir).outcome()
    assert (outcome["kind"], outcome["exit_code"]) == ("memory", 2)
    assert "per_device_train_batch_size" in outcome["message"]


@pytest.mark.parametrize("activations", ["auto", "recompute"])
def test_where_nothing_is_left_to_give_up_a_person_hears_what_to_change(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: str
) -> None:
    monkeypatch.setattr(loop_module, "accumulate_gradients", full_memory(keeping=0, calls=2))
    config = small_config(tmp_path / "run", tiny_model, **FUSED | {"train": {"activations": activations}})
    outcome = train_here(config)
    assert (outcome["kind"], outcome["exit_code"]) == ("user", 2)
    assert "ran out of memory" in outcome["message"]
    assert "per_device_train_batch_size" in outcome["message"]


def full_on_rank_1(rank: int) -> None:
    if rank == 1:
        loop_module.accumulate_gradients = full_memory(keeping=2, calls=2)


@pytest.mark.timeout(240)
def test_ranks_that_share_collectives_start_again_together(tiny_model: Path, tmp_path: Path) -> None:
    """Both ranks of the second group begin with a leaner plan, from the last checkpoint, and end as if undisturbed."""
    launch = {"launch": {"backend": "torchrun", "num_workers": 2}, "shard": {"strategy": "ddp"}}
    plain, ours = (small_config(tmp_path / name, tiny_model, **FUSED, **launch) for name in ("plain", "ours"))
    (outcome,) = train_in_group([plain], 2)
    assert outcome["state"] == "finished"
    with pytest.raises(AssertionError):
        train_in_group([ours], 2, full_on_rank_1)
    coordinator = Coordinator(ours.run_dir)
    outcome = coordinator.outcome()
    assert outcome["kind"] == "memory"
    assert outcome["out_of_memory"] == 1
    assert coordinator.should_restart("rank 1 ended", step=outcome["step"])["restart"]
    (outcome,) = train_in_group([ours], 2, full_on_rank_1)
    assert outcome["state"] == "finished"
    lines = told(ours.run_dir, "memory")
    assert len(lines) == 2
    assert lines[0] != lines[1]
    for metric in METRICS:
        assert series(ours.run_dir, metric) == pytest.approx(series(plain.run_dir, metric), rel=1e-6)


def test_a_run_that_no_plan_can_help_ends(tmp_path: Path) -> None:
    open_run(tmp_path, "name: run\n")
    coordinator = Coordinator(tmp_path)
    coordinator.start_job()
    for number in range(MOST_LEANER + 1):
        attempt = f"attempt-{number}"
        generation = coordinator.join(attempt, 0, 1, "host", 1)["generation"]
        coordinator.fail(generation, 0, "memory", "rank 0 ran out of memory; lower the batch", step=3)
        # A second rank of the same group is not a second time.
        coordinator.fail(generation, 1, "memory", "rank 1 ran out of memory; lower the batch", step=3)
        assert coordinator.should_restart("ended")["restart"] == (number < MOST_LEANER)
    outcome = coordinator.outcome()
    assert (outcome["state"], outcome["exit_code"]) == ("failed", 2)
    assert "lower the batch" in outcome["message"]
