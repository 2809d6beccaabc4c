"""The default optimizer and half precision where they belong: on a GPU."""

from pathlib import Path

import pytest
import torch

from qlora_dist.checkpoint.manifest import list_checkpoints
from qlora_dist.config.load import to_yaml
from qlora_dist.config.schema import TrainConfig
from qlora_dist.coordinate.client import DirectClient
from qlora_dist.coordinate.rundir import open_run
from qlora_dist.coordinate.state import Coordinator
from qlora_dist.optim.optimizers import build_optimizer, load_optimizer_state, optimizer_state
from qlora_dist.track.metrics import read_metrics
from qlora_dist.train import loop as loop_module
from qlora_dist.train.context import Worker
from qlora_dist.train.worker import train
from tests.distributed.group import series
from tests.single import small_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
OPTIMS = ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch"]


def train_on_gpu(config) -> dict:
    info = open_run(config.run_dir, to_yaml(config))
    client = DirectClient(Coordinator(config.run_dir))
    client.call("start_job")
    train(config, Worker(0, 1, 0, torch.device("cuda", 0), client, config.run_dir, info.nonce))
    return client.call("outcome")


@pytest.mark.parametrize("optim", OPTIMS)
def test_optimizer_state_comes_back_bit_for_bit_and_goes_on_alike(optim: str) -> None:
    """Above 1e5 elements bitsandbytes' paged state is managed memory; the update itself is deterministic."""

    def parameters(values: dict[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
        return {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}

    def step(optimizer, named, number: int) -> None:
        generator = torch.Generator("cuda").manual_seed(number)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator, device="cuda")
        optimizer.step()

    config = TrainConfig(optim=optim, learning_rate=1e-2)
    start = {"large": torch.randn(512, 512, device="cuda"), "small": torch.randn(10, device="cuda")}
    first = parameters(start)
    before = build_optimizer(first, config)
    for number in range(3):
        step(before, first, number)
    tensors, numbers = optimizer_state(before, first)
    second = parameters({name: parameter.detach() for name, parameter in first.items()})
    after = build_optimizer(second, config)
    load_optimizer_state(after, second, {k: v.cpu().clone() for k, v in tensors.items()}, dict(numbers))
    torch.cuda.synchronize()
    again, _ = optimizer_state(after, second)
    assert all(torch.equal(tensors[name].cpu(), again[name].cpu()) for name in tensors)
    for number in range(3, 6):
        step(before, first, number)
        step(after, second, number)
    torch.cuda.synchronize()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_run_repeats_the_later_steps(tiny_model: Path, tmp_path: Path) -> None:
    """bf16 and paged 8-bit AdamW; CUDA kernels may add in another order, which is far below 1e-3 relative here."""
    sections = {
        "model": {"compute_dtype": "bf16"},
        "train": {"optim": "paged_adamw_8bit"},
        "checkpoint": {"keep_last": 9},
    }
    whole = small_config(tmp_path / "whole", tiny_model, **sections)
    assert train_on_gpu(whole)["state"] == "finished"
    start = next(c.path for c in list_checkpoints(whole.run_dir) if c.step == 2)
    resumed = small_config(tmp_path / "resumed", tiny_model, **sections, run={"resume": str(start)})
    assert train_on_gpu(resumed)["state"] == "finished"
    expected = {step: value for step, value in series(whole.run_dir, "loss").items() if step > 2}
    assert series(resumed.run_dir, "loss") == pytest.approx(expected, rel=1e-3)


def test_an_fp16_overflow_is_skipped_and_lowers_the_scale(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    """A scale that overflows at once is halved until it fits; the steps it cost are counted, and training goes on."""
    monkeypatch.setattr(
        loop_module.Loop, "run", lambda loop, run=loop_module.Loop.run: (set_scale(loop, 2.0**40), run(loop))[1]
    )
    config = small_config(
        tmp_path, tiny_model, model={"compute_dtype": "fp16"}, train={"max_steps": 60, "max_bad_steps": 3}
    )
    assert train_on_gpu(config)["state"] == "finished"
    records = [record for record in read_metrics(tmp_path) if "loss" in record]
    assert records[-1]["skipped_steps"] > 3, "overflows that the scale answers for are not the run's bad steps"
    assert records[-1]["grad_norm"] is not None
    assert records[-1]["loss"] < records[0]["loss"]


def set_scale(loop, scale: float) -> None:
    loop.progress.loss_scale.scale = scale
