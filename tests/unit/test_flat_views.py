"""Parameters over flat buffers: to everybody else they are what they were, and so is their optimizer's state."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import AdapterConfig, ModelConfig, TrainConfig
from qlora_dist.model.adapter import attach_adapter, trainable_parameters
from qlora_dist.model.base import load_base
from qlora_dist.optim.optimizers import build_optimizer, optimizer_state
from qlora_dist.shard import ddp, views
from qlora_dist.shard.none import Unsharded

OPTIMS = ["adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adamw_torch", "sgd"]
# Weights above and below the 4,096 elements from which state has 8 bits, and none a multiple of 256.
ADAPTER = AdapterConfig(r=33, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])


class InGroups(Unsharded):
    """As ddp lays out, without its process group."""

    _groups = ddp.DataParallel._groups


def adapted(base: Path, adapter: AdapterConfig = ADAPTER) -> nn.Module:
    loaded = load_base(ModelConfig(name=str(base), compute_dtype="fp32"), base, torch.device("cpu"))
    return attach_adapter(loaded, adapter, seed=0).train()


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in trainable_parameters(model).items()}


def take(strategy: Unsharded, model: nn.Module, steps: range) -> None:
    for step in steps:
        for name, grad in gradients(model, step).items():
            trainable_parameters(model)[name].grad += grad  # type: ignore[operator]
        strategy.clip(0.0, 1.0)
        strategy.step(torch.tensor(False))


def applied(base: Path, kind: type[Unsharded], config: TrainConfig) -> tuple[Unsharded, nn.Module]:
    strategy, model = kind(), adapted(base)
    strategy.apply(model, partial(build_optimizer, config=config, notice=lambda text: None))
    return strategy, model


@pytest.mark.parametrize("ratio", [None, 8.0])
@pytest.mark.parametrize("kind", [Unsharded, InGroups])
@pytest.mark.parametrize("optim", OPTIMS)
def test_steps_and_state_are_those_of_an_optimizer_over_the_weights_alone(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, optim: str, kind: type[Unsharded], ratio: float | None
) -> None:
    """Bit for bit: names, shapes, dtypes and values; and a second strategy takes the state up and goes on alike."""
    monkeypatch.setattr(views, "SEGMENT_ELEMENTS", 8000)
    monkeypatch.setattr(ddp, "BUCKET_BYTES", 40_000)
    config = TrainConfig(optim=optim, learning_rate=1e-2, weight_decay=0.01, loraplus_lr_ratio=ratio)
    strategy, model = applied(tiny_model, kind, config)
    assert len(strategy.flat.segments) > 4
    assert (len(strategy.flat.groups) > 1) == (kind is InGroups)
    take(strategy, model, range(3))

    plain = adapted(tiny_model)
    alone = trainable_parameters(plain)
    optimizer = build_optimizer(alone, config, lambda text: None)
    for step in range(3):
        for name, grad in gradients(plain, step).items():
            alone[name].grad = grad
        optimizer.step()
    tensors, numbers = optimizer_state(optimizer, alone)
    state = strategy.full_state()
    assert list(state.adapter) == list(alone)
    assert all(torch.equal(state.adapter[name], parameter) for name, parameter in alone.items())
    assert state.optimizer_scalars == numbers
    assert state.optimizer.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (state.optimizer[name].dtype, state.optimizer[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(state.optimizer[name], tensor), name

    second, other = applied(tiny_model, Unsharded, config)
    second.load_full_state(state)
    for each, its in ((strategy, model), (second, other)):
        take(each, its, range(3, 5))
    ours, theirs = strategy.full_state(), second.full_state()
    assert all(torch.equal(tensor, theirs.adapter[name]) for name, tensor in ours.adapter.items())
    assert all(torch.equal(tensor, theirs.optimizer[name]) for name, tensor in ours.optimizer.items())


def test_a_backward_adds_to_the_buffer_and_a_step_clears_it(tiny_model: Path) -> None:
    strategy, model = applied(tiny_model, Unsharded, TrainConfig(optim="sgd", learning_rate=0.1))
    ids = torch.arange(20)[None]
    plain = adapted(tiny_model)
    for _ in range(2):
        strategy.backward(model(input_ids=ids).logits.square().mean(), last_micro_batch=False)
        plain(input_ids=ids).logits.square().mean().backward()
    expected = torch.cat([p.grad.reshape(-1) for p in trainable_parameters(plain).values() if p.grad is not None])
    norm = strategy.clip(1e-3, 4.0)
    torch.testing.assert_close(norm, expected.norm() / 4)
    assert norm > 1e-2
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    strategy.step(skip=False)
    factor = 0.1 * 1e-3 / (norm + 1e-6) / 4
    for name, parameter in trainable_parameters(plain).items():
        moved = before[name] - trainable_parameters(model)[name].detach()
        # A weight of 1 rounds to 6e-8.
        torch.testing.assert_close(moved, factor * parameter.grad, rtol=1e-3, atol=2e-8)
    assert not strategy.flat.grad_N.any()
    assert all(p.grad is not None and not p.grad.any() for p in trainable_parameters(model).values())


def test_peft_saves_and_loads_it_as_ever(tiny_model: Path, tmp_path: Path) -> None:
    strategy, model = applied(tiny_model, Unsharded, TrainConfig(optim="adamw_8bit", learning_rate=1e-2))
    take(strategy, model, range(2))
    saver: Any = model
    saver.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path)
    theirs = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, theirs[name]), name


def test_state_that_does_not_fit(tiny_model: Path) -> None:
    config = TrainConfig(optim="adamw_8bit", learning_rate=1e-2)
    strategy, model = applied(tiny_model, Unsharded, config)
    take(strategy, model, range(2))
    state = strategy.full_state()
    name = next(key for key in state.optimizer if key.endswith("|absmax1")).removesuffix("|absmax1")
    of_one = {key: value for key, value in state.optimizer.items() if key.startswith(name + "|")}
    state.optimizer["elsewhere|state1"] = next(iter(of_one.values()))
    with pytest.raises(UserError, match="optimizer state"):
        strategy.load_full_state(state)
    del state.optimizer["elsewhere|state1"]

    # As a checkpoint has it in which no step had used the weight.
    for key in of_one:
        del state.optimizer[key]
    del state.optimizer_scalars[f"{name}|step"]
    fresh, _ = applied(tiny_model, Unsharded, config)
    fresh.load_full_state(state)
    again = fresh.full_state()
    assert all(torch.equal(tensor, again.optimizer[key]) for key, tensor in state.optimizer.items())
    # An empty state: nothing but zeros, whatever byte stands for them.
    assert not again.optimizer[f"{name}|absmax1"].any()
    assert set(again.optimizer_scalars.values()) == {2}

    state.optimizer.update(of_one)
    state.optimizer[f"{name}|state1"] = state.optimizer[f"{name}|state1"].float()
    with pytest.raises(UserError, match="optimizer state"):
        fresh.load_full_state(state)
    of_torch, _ = applied(tiny_model, Unsharded, TrainConfig(optim="adamw_torch"))
    with pytest.raises(UserError, match="optimizer state"):
        of_torch.load_full_state(strategy.full_state())
