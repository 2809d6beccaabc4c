"""Offload where it matters: the same steps as without, and less memory on the GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_dist.config.schema import AdapterConfig, ModelConfig, TrainConfig
from qlora_dist.model.adapter import attach_adapter, trainable_parameters
from qlora_dist.model.base import load_base
from qlora_dist.model.host_store import store_of
from qlora_dist.optim.on_host import CONSTANT_KEYS
from qlora_dist.optim.optimizers import (
    build_optimizer,
    init_optimizer_state,
    load_optimizer_state,
    optimizer_state,
)
from qlora_dist.shard.activations import offload_activations
from tests.distributed.group import series
from tests.gpu.test_cuda import train_on_gpu
from tests.single import small_config
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
LARGE, SMALL = "q.lora_A.weight", "q.lora_B.weight"
ON_HOST = {"shard": {"offload": ["optimizer", "activations"]}}


def named(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = {LARGE: (1024, 1024), SMALL: (10,)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, device="cuda")) for name, shape in shapes.items()
    }


def take_steps(optimizer: Any, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator("cuda").manual_seed(step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator, device="cuda")
        optimizer.step()


def assert_on_host(optimizer: Any, parameters: dict[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor) and value.dim() and key not in CONSTANT_KEYS:
                assert value.is_pinned(), key


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adamw_torch"])
def test_optimizer_state_on_the_host_takes_the_same_steps(optim: str) -> None:
    config = TrainConfig(optim=optim, learning_rate=1e-2, weight_decay=0.01, loraplus_lr_ratio=4.0)
    plain, ours = named(), named()
    first = build_optimizer(plain, config)
    second = build_optimizer(ours, config, on_host=True)
    init_optimizer_state(second, ours, {LARGE: True, SMALL: False})
    if optim != "adamw_torch":
        assert_on_host(second, ours)
    take_steps(first, plain, range(3))
    take_steps(second, ours, range(3))
    assert_on_host(second, ours)

    torch.cuda.synchronize()
    tensors, numbers = optimizer_state(second, ours)
    resumed = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in ours.items()}
    third = build_optimizer(resumed, config, on_host=True)
    load_optimizer_state(third, resumed, {k: v.cpu().clone() for k, v in tensors.items()}, dict(numbers))
    assert_on_host(third, resumed)
    take_steps(first, plain, range(3, 6))
    take_steps(second, ours, range(3, 6))
    take_steps(third, resumed, range(3, 6))
    torch.cuda.synchronize()
    for name, parameter in plain.items():
        assert torch.equal(parameter, ours[name])
        assert torch.equal(parameter, resumed[name])


def test_a_step_holds_one_parameters_state_at_a_time() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    parameters = {f"{n}": nn.Parameter(torch.randn(1024, 1024, generator=generator, device="cuda")) for n in range(16)}
    optimizer = build_optimizer(parameters, TrainConfig(optim="adamw_torch"), on_host=True)
    take_steps(optimizer, parameters, range(2))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    # Two fp32 moments and what torch's update needs beside them; those of all sixteen are 128 MiB.
    assert torch.cuda.max_memory_allocated() - before < 32 * 2**20


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_come_back_as_they_were_and_leave_room(tmp_path: Path, checkpointing: bool) -> None:
    base_folder = make_tiny_model(tmp_path / "base", hidden_size=512, num_layers=12)
    device = torch.device("cuda", 0)
    ids = torch.randint(3, 300, (8, 512), generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for away in (False, True):
        base = load_base(ModelConfig(name=str(base_folder), compute_dtype="bf16"), base_folder, device)
        model: Any = attach_adapter(base, AdapterConfig(r=8, lora_dropout=0.1), seed=0).train()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        if away:
            offload_activations(model, min_bytes=2**18)
        for _ in range(2):
            for parameter in trainable_parameters(model).values():
                parameter.grad = None
            torch.manual_seed(1)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, logits_to_keep=1).logits.float().square().mean()
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated() - before
            loss.backward()
        grads = {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}
        found.append((loss.detach(), grads, held))
        del model, base, loss, parameter
    store = store_of(device)
    (loss, grads, held), (away_loss, away_grads, away_held) = found
    assert torch.equal(loss, away_loss)
    assert all(torch.equal(grads[name], gradient) for name, gradient in away_grads.items())
    # Two layers' worth may be on its way, and what comes after the last layer stays.
    told = {"away": away_held, "here": held, "moved": store.moved, "largest": store.largest_group}
    assert held - away_held > 0.6 * (held - 8 * 512 * 512 * 8), told


@pytest.mark.parametrize("train", [{}, {"gradient_checkpointing": True}])
def test_a_whole_run_is_the_same(tiny_model: Path, tmp_path: Path, train: dict[str, Any]) -> None:
    """CUDA kernels may add in another order from run to run, which is far below 1e-3 relative here."""
    sections = {"model": {"compute_dtype": "bf16"}, "train": {"optim": "paged_adamw_8bit"} | train}
    plain = small_config(tmp_path / "plain", tiny_model, **sections)
    away = small_config(tmp_path / "away", tiny_model, **sections, **ON_HOST)
    assert train_on_gpu(plain)["state"] == train_on_gpu(away)["state"] == "finished"
    for metric in ("loss", "grad_norm"):
        assert series(away.run_dir, metric) == pytest.approx(series(plain.run_dir, metric), rel=1e-3)


@pytest.mark.parametrize("offload", [[], ["shards"], ["optimizer"], ["optimizer", "activations"]])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_strategies_on_one_gpu(tiny_model: Path, tmp_path: Path, strategy: str, offload: list[str]) -> None:
    if strategy == "ddp" and "shards" in offload:
        pytest.skip("ddp has no shards")
    sections = {"model": {"compute_dtype": "bf16"}, "train": {"optim": "adamw_8bit"}}
    plain = small_config(tmp_path / "plain", tiny_model, **sections)
    ours = small_config(tmp_path / "ours", tiny_model, **sections, shard={"strategy": strategy, "offload": offload})
    assert train_on_gpu(plain)["state"] == train_on_gpu(ours)["state"] == "finished"
    for metric in ("loss", "grad_norm"):
        assert series(ours.run_dir, metric) == pytest.approx(series(plain.run_dir, metric), rel=1e-2)
