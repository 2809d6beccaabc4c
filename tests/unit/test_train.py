"""The loop with one worker: exact resumption, what stops a run, what is saved, what must not change."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_dist.checkpoint.manifest import list_checkpoints
from qlora_dist.coordinate.client import Fenced
from qlora_dist.coordinate.report import read_status
from qlora_dist.track.metrics import read_metrics
from qlora_dist.train import loop as loop_module
from qlora_dist.train import worker as worker_module
from qlora_dist.train.step import LossScale, draw_seed
from tests.distributed.group import series
from tests.single import small_config, train_here


def test_a_resumed_run_repeats_every_later_step_exactly(tiny_model: Path, tmp_path: Path) -> None:
    """Dropout on, 8-bit optimizer, fp32: from each checkpoint on, equal to the last bit."""
    held_out = {"eval": "bundled:home_commands", "max_eval_rows": 6}
    whole = small_config(
        tmp_path / "whole", tiny_model, data=held_out, eval={"eval_steps": 2}, checkpoint={"keep_last": 9}
    )
    train_here(whole)
    for step in (2, 4):
        config = small_config(
            tmp_path / f"from{step}", tiny_model, data=held_out, eval={"eval_steps": 2},
            run={"resume": str(next(c.path for c in list_checkpoints(whole.run_dir) if c.step == step))},
        )  # fmt: skip
        outcome = train_here(config)
        assert outcome["state"] == "finished"
        for metric in ("loss", "grad_norm", "eval_loss", "learning_rate"):
            expected = {s: v for s, v in series(whole.run_dir, metric).items() if s > step}
            assert series(config.run_dir, metric) == expected
    first, second = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "from2")
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_dropout_is_at_work_and_drawn_anew_each_step(tiny_model: Path, tmp_path: Path) -> None:
    """The control of the test above: another dropout gives other losses."""
    losses = []
    for dropout in (0.0, 0.1):
        config = small_config(tmp_path / str(dropout), tiny_model, adapter={"lora_dropout": dropout})
        train_here(config)
        losses.append(series(config.run_dir, "loss"))
    # Step 1 has B = 0, so dropout cannot show in its loss.
    assert losses[0][1] == losses[1][1]
    assert all(losses[0][step] != losses[1][step] for step in range(2, 7))
    assert len({draw_seed(1, step, pack) for step in range(30) for pack in range(30)}) == 900


def test_the_same_command_again_goes_on_where_it_was(tiny_model: Path, tmp_path: Path) -> None:
    short = small_config(tmp_path / "run", tiny_model, train={"max_steps": 4, "lr_scheduler_type": "constant"})
    train_here(short)
    longer = small_config(tmp_path / "run", tiny_model, train={"max_steps": 6, "lr_scheduler_type": "constant"})
    train_here(longer)
    whole = small_config(tmp_path / "whole", tiny_model, train={"max_steps": 6, "lr_scheduler_type": "constant"})
    train_here(whole)
    assert series(tmp_path / "run", "loss") == series(tmp_path / "whole", "loss")
    assert {r["attempt"] for r in read_metrics(tmp_path / "run")} == {1, 2}


def test_steps_past_the_checkpoint_are_superseded_in_the_metrics(tiny_model: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, tiny_model, checkpoint={"save_steps": 4, "keep_last": 5})
    train_here(config)
    before = series(tmp_path, "loss")
    shutil.rmtree(next(c.path for c in list_checkpoints(tmp_path) if c.step == 6))
    train_here(config)
    assert series(tmp_path, "loss") == before
    attempts = {record["step"]: record["attempt"] for record in read_metrics(tmp_path)}
    assert [attempts[step] for step in range(1, 7)] == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"run": {"seed": 43}}, "seed"),
        ({"train": {"global_batch_size": 6}}, "train.global_batch_size"),
        ({"data": {"max_rows": 29}}, "data.train"),
        ({"model": {"double_quant": False}}, "model.quantization"),
        ({"adapter": {"lora_alpha": 16}}, "adapter.lora_alpha"),
        ({"adapter": {"r": 8}}, "adapter.r"),
    ],
)
def test_what_must_not_change_between_checkpoint_and_resumption(
    tiny_model: Path, tmp_path: Path, sections: dict, name: str
) -> None:
    train_here(small_config(tmp_path, tiny_model))
    before = {c.path.name: (c.path / "manifest.json").read_bytes() for c in list_checkpoints(tmp_path)}
    outcome = train_here(small_config(tmp_path, tiny_model, **sections))
    assert (outcome["exit_code"], outcome["kind"]) == (2, "user")
    assert f"different {name}" in outcome["message"]
    assert {c.path.name: (c.path / "manifest.json").read_bytes() for c in list_checkpoints(tmp_path)} == before


def test_non_finite_steps_are_skipped_and_counted(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    spoil(monkeypatch, {3})
    config = small_config(tmp_path, tiny_model)
    assert train_here(config)["state"] == "finished"
    records = {r["step"]: r for r in read_metrics(tmp_path) if "loss" in r}
    assert records[3]["grad_norm"] is None
    assert records[6]["skipped_steps"] == 1
    assert all(records[step]["grad_norm"] is not None for step in (4, 5, 6))
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values())


def test_too_many_bad_steps_in_a_row_stop_the_run_and_leave_the_last_good_checkpoint(
    tiny_model: Path, tmp_path: Path, monkeypatch
) -> None:
    spoil(monkeypatch, {4, 5, 6})
    outcome = train_here(small_config(tmp_path, tiny_model, train={"max_bad_steps": 2}))
    assert outcome["exit_code"] == 2
    assert "not finite in 2 steps in a row, up to step 5" in outcome["message"]
    assert [c.step for c in list_checkpoints(tmp_path)] == [2]


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make a gradient of these steps overflow, as a real loss spike does; the loss itself stays finite."""
    accumulate = loop_module.accumulate_gradients
    taken = [0]

    def spoiled(model, *args, **kwargs):
        taken[0] += 1
        share = accumulate(model, *args, **kwargs)
        if taken[0] in steps:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return share

    monkeypatch.setattr(loop_module, "accumulate_gradients", spoiled)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_learns_and_fp16_scales_its_loss(tiny_model: Path, tmp_path: Path, dtype: str) -> None:
    """The loss curve follows fp32's: bf16 rounds to 1e-2 relative, fp16 to 1e-3, and a wrong scale is a factor."""
    curves = {}
    for name in ("fp32", dtype):
        config = small_config(tmp_path / name, tiny_model, model={"compute_dtype": name}, adapter={"lora_dropout": 0.0})
        assert train_here(config)["state"] == "finished"
        curves[name] = {m: series(config.run_dir, m) for m in ("loss", "grad_norm")}
    for metric, tolerance in (("loss", 0.01), ("grad_norm", 0.1)):
        for step, value in curves["fp32"][metric].items():
            assert curves[dtype][metric][step] == pytest.approx(value, rel=tolerance)


def test_loss_scale_halves_on_overflow_and_doubles_after_good_steps() -> None:
    scale = LossScale.for_dtype(torch.float16)
    assert (scale.scale, LossScale.for_dtype(torch.bfloat16).enabled) == (65536.0, False)
    assert scale.update(overflowed=True)
    assert scale.scale == 32768.0
    scale.growth_interval = 3
    for _ in range(3):
        assert not scale.update(overflowed=False)
    assert scale.scale == 65536.0
    scale.scale = 1.0
    assert not scale.update(overflowed=True), "at 1 the overflow is the run's own"


def test_early_stopping_and_the_best_adapter_at_the_end(tiny_model: Path, tmp_path: Path) -> None:
    """A learning rate far too high makes the held-out loss rise at once."""
    config = small_config(
        tmp_path, tiny_model,
        data={"eval": "bundled:home_commands", "max_eval_rows": 6},
        train={"max_steps": 40, "learning_rate": 0.3, "lr_scheduler_type": "constant", "max_grad_norm": 0},
        eval={"eval_steps": 1, "early_stopping_patience": 3, "load_best_model_at_end": True},
        checkpoint={"save_steps": 100, "keep_last": 1, "keep_best": 1},
    )  # fmt: skip
    outcome = train_here(config)
    losses = series(tmp_path, "eval_loss")
    best_step = min((loss, step) for step, loss in losses.items() if step > 0)[1]
    assert outcome["summary"]["stopped_early"]
    assert outcome["step"] < 40
    assert outcome["summary"]["best_step"] == best_step < outcome["step"]
    best = next(c.path for c in list_checkpoints(tmp_path) if c.step == best_step)
    kept, final = (load_file(f / "adapter_model.safetensors") for f in (best, tmp_path / "adapter"))
    assert all(torch.equal(tensor, final[name]) for name, tensor in kept.items())


def test_gradient_checkpointing_changes_no_gradient(tiny_model: Path, tmp_path: Path) -> None:
    curves = []
    for on in (False, True):
        config = small_config(tmp_path / str(on), tiny_model, train={"gradient_checkpointing": on})
        train_here(config)
        curves.append(series(config.run_dir, "grad_norm"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_epochs_count_short_last_batches(tiny_model: Path, tmp_path: Path) -> None:
    config = small_config(
        tmp_path, tiny_model, train={"max_steps": None, "num_train_epochs": 1.5}, data={"max_rows": 10}
    )
    assert train_here(config)["step"] == 5  # 10 rows in batches of 4: 3 steps an epoch, 1.5 epochs


def test_the_adapter_gives_the_runs_own_logits_in_stock_peft_on_the_stock_loaded_cache(
    tiny_model: Path, tmp_path: Path, monkeypatch
) -> None:
    """Of the model that the run ended with: within twice the difference between two batch splits of it."""
    cache = tmp_path / "nf4"
    config = small_config(
        tmp_path / "run", tiny_model, model={"cache_quantized": cache}, adapter={"modules_to_save": None},
        data={"eval": "bundled:home_commands", "max_eval_rows": 8},
    )  # fmt: skip
    kept = {}
    finish = worker_module.finish
    monkeypatch.setattr(
        worker_module, "finish", lambda loop, *rest: (kept.update(model=loop.model), finish(loop, *rest))
    )
    assert train_here(config)["state"] == "finished"
    own = kept["model"]
    stock_base = AutoModelForCausalLM.from_pretrained(cache, device_map={"": "cpu"})
    stock = PeftModel.from_pretrained(stock_base, config.run_dir / "adapter")
    ids = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    own.train(), stock.train()  # in evaluation stock bitsandbytes computes in bf16 on CPUs that have it
    for module in [*own.modules(), *stock.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        ours, theirs = own(input_ids=ids).logits, stock(input_ids=ids).logits
        split = torch.cat([own(input_ids=ids[:1]).logits, own(input_ids=ids[1:]).logits])
    assert (ours - theirs).abs().max() <= 2 * (ours - split).abs().max()
    assert json.loads((config.run_dir / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_a_threshold_for_stopping_does_not_decide_what_is_best(tiny_model: Path, tmp_path: Path) -> None:
    """Every evaluation improves by less than the threshold: patience runs out, and the best is still the best."""
    config = small_config(
        tmp_path, tiny_model,
        data={"eval": "bundled:home_commands", "max_eval_rows": 4},
        train={"max_steps": 8, "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        eval={"eval_steps": 1, "early_stopping_patience": 4, "early_stopping_threshold": 1.0,
              "load_best_model_at_end": True},
        checkpoint={"keep_last": 1, "keep_best": 1},
    )  # fmt: skip
    outcome = train_here(config)
    losses = series(tmp_path, "eval_loss")
    assert outcome["summary"]["stopped_early"]
    assert outcome["step"] == 5  # the first sets the mark, four more do not beat it by enough
    assert outcome["summary"]["best_step"] == min((loss, step) for step, loss in losses.items() if step)[1]


def test_a_requested_stop_ends_after_a_checkpoint_and_the_same_command_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch
) -> None:
    config = small_config(tmp_path, tiny_model, train={"max_steps": 6}, checkpoint={"save_steps": 100})
    take_step = loop_module.Loop.take_step

    def ask_at_three(loop):
        if loop.progress.step == 2:
            loop.heartbeat.client.call("request_stop", reason="the queue wants its nodes back")
            loop.heartbeat.beat()
        take_step(loop)

    monkeypatch.setattr(loop_module.Loop, "take_step", ask_at_three)
    outcome = train_here(config)
    assert (outcome["state"], outcome["step"], outcome["exit_code"]) == ("stopped", 3, 0)
    assert not outcome["summary"]["complete"]
    assert [c.step for c in list_checkpoints(tmp_path)] == [3]
    monkeypatch.undo()
    outcome = train_here(config)
    assert (outcome["state"], outcome["summary"]["complete"]) == ("finished", True)
    whole = small_config(tmp_path / "whole", tiny_model)
    train_here(whole)
    assert series(tmp_path, "loss") == series(whole.run_dir, "loss")


def test_an_attempt_that_is_over_publishes_no_adapter(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    """It stood still after its last step; meanwhile another attempt began. It wakes up and ends without a trace."""
    config = small_config(tmp_path, tiny_model)
    finish = worker_module.finish

    def overtaken(loop, worker, tokenizer, generation):
        worker.client.call("join", attempt="another", rank=0, world_size=1, host="elsewhere", pid=1)
        finish(loop, worker, tokenizer, generation)

    monkeypatch.setattr(worker_module, "finish", overtaken)
    with pytest.raises(Fenced):
        train_here(config)
    assert not (tmp_path / "adapter").exists()
    assert read_status(tmp_path)["state"] == "running", "the living attempt is not said to have failed"


def test_running_out_of_memory_is_one_sentence(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(loop_module, "accumulate_gradients", full)
    outcome = train_here(small_config(tmp_path, tiny_model))
    assert outcome["exit_code"] == 2
    assert "lower train.per_device_train_batch_size (2)" in outcome["message"]
    assert "\n" not in outcome["message"]
