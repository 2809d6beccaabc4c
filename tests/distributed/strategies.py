"""What the tests over strategies share: the strategies, a model on which sharding shows, and runs of ten steps."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.manifest import CHECKPOINTS
from tests.distributed.test_same_training import nf4_base, rows
from tests.tiny import make_tiny_model

STEPS, BATCH = 10, 5
# World size and what `shard` holds beside the strategy.
STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {}),
    # On GPUs `auto` would replicate a small base.
    "fsdp": (2, {"frozen": "shard"}),
    "hybrid": (4, {"hybrid_shard_size": 2, "frozen": "shard"}),
    "zero2": (2, {}),
    "zero3": (2, {}),
}
RESUMABLE = ("ddp", "fsdp", "zero2", "zero3")
LEARNING_RATE = {"sgd": 0.1, "adamw_torch": 1e-3, "adamw_8bit": 1e-3}


def make_odd_model(folder: Path) -> Path:
    """A base of hidden size 128; with r=33 its adapter has 4,224-element weights and 2,112-element ones.

    The first get 8-bit state and the second fp32 state; neither is a multiple of 256, bitsandbytes' block.
    """
    return make_tiny_model(folder, hidden_size=128)


def make_first_adapter(base: Path, folder: Path, **lora: Any) -> Path:
    """A PEFT adapter by stock PEFT in which neither factor is zero, so that both have gradients at once."""
    torch.manual_seed(5)
    settings = dict(r=33, lora_alpha=33, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(nf4_base(base), LoraConfig(**(settings | lora))).save_pretrained(folder)
    return folder


def write_rows(file: Path) -> Path:
    """Questions and answers of very different lengths, so that ranks hold unequal numbers of loss-bearing tokens."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return file


def matrix_config(
    run_dir: Path, base: Path, adapter: Path, data: Path, strategy: str, world_size: int, optim: str = "adamw_8bit",
    per_device: int = 2, /, **sections: dict[str, Any],
) -> RunConfig:  # fmt: skip
    """Ten steps of five packs in micro-batches of two, saved at steps 5 and 10.

    Keywords update a section each, `run` the top level.
    """
    values: dict[str, Any] = {
        "output_dir": run_dir,
        "model": {"name": str(base), "compute_dtype": "fp32"},
        "adapter": {"path": adapter},
        "data": {"train": str(data), "shuffle": False},
        "train": {
            "max_steps": STEPS, "global_batch_size": BATCH, "per_device_train_batch_size": per_device,
            "learning_rate": LEARNING_RATE[optim], "lr_scheduler_type": "linear", "warmup_steps": 2, "optim": optim,
            "weight_decay": 0.01 if optim.startswith("adamw") else 0.0, "max_grad_norm": 0.5,
        },
        "checkpoint": {"save_steps": 5, "keep_last": 9},
        "shard": {"strategy": strategy} | (STRATEGIES[strategy][1] if strategy in STRATEGIES else {}),
        "launch": {"backend": "none" if world_size == 1 else "torchrun", "num_workers": world_size},
        "track": {"report": False, "tensorboard": False},
    }  # fmt: skip
    values |= sections.pop("run", {})
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return RunConfig.model_validate(values)


def checkpoint_at(run_dir: Path, step: int) -> Path:
    """The committed checkpoint of `step`."""
    (found,) = (run_dir / CHECKPOINTS).glob(f"step-{step:08d}-*")
    return found


def worst_difference(ours: dict[int, float], reference: dict[int, float]) -> float:
    """The largest relative difference over the steps, which are to be the same ones."""
    assert ours.keys() == reference.keys()
    return max(abs(value - reference[step]) / abs(reference[step]) for step, value in ours.items())


def check_resumed_state(rank: int) -> None:
    """For `train_in_group`: what a resumed strategy holds is bit for bit what was saved."""
    from qlora_dist.checkpoint.format import read_snapshot
    from qlora_dist.train import worker

    resume = worker.resume

    def checked(checkpoint: Path, strategy: Any, *others: Any) -> Any:
        progress = resume(checkpoint, strategy, *others)
        saved, state = read_snapshot(checkpoint), strategy.full_state()
        assert_same_bits(state.adapter, saved.adapter)
        assert_same_bits(state.optimizer, saved.optimizer)
        assert state.optimizer_scalars == saved.optimizer_scalars
        return progress

    worker.resume = checked


def assert_same_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Every tensor equal to the last bit, NaNs included, and every number the same."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            mine, other = value.detach().cpu().contiguous(), theirs[name].cpu().contiguous()
            assert mine.dtype == other.dtype
            assert mine.shape == other.shape, name
            assert torch.equal(mine.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name
        else:
            assert value == theirs[name], name
