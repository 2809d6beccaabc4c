"""Optimizer state survives a round trip bit for bit; schedules are transformers'."""

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import TrainConfig
from qlora_dist.optim.optimizers import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
    take_step,
)
from qlora_dist.optim.schedules import build_schedule

OPTIMS = ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit", "lion_8bit", "adamw_torch", "sgd"]


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    # One above and one below the 4,096 elements from which bitsandbytes keeps 8-bit state.
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in
            {"large": (64, 96), "q.lora_B.weight": (96, 64), "small": (10,)}.items()}  # fmt: skip


def take_steps(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("ratio", [None, 16.0])
@pytest.mark.parametrize("optim", OPTIMS)
def test_resumed_steps_equal_uninterrupted_ones_exactly(optim: str, ratio: float | None) -> None:
    config = TrainConfig(optim=optim, learning_rate=1e-2, weight_decay=0.01, loraplus_lr_ratio=ratio)
    whole = parameters()
    take_steps(build_optimizer(whole, config), whole, range(6))

    first = parameters()
    before = build_optimizer(first, config)
    take_steps(before, first, range(3))
    tensors, numbers = optimizer_state(before, first)
    second = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    after = build_optimizer(second, config)
    load_optimizer_state(after, second, {k: v.clone() for k, v in tensors.items()}, numbers)
    take_steps(after, second, range(3, 6))

    for name, parameter in whole.items():
        assert torch.equal(parameter, second[name]), name


def test_without_its_state_a_resumed_adam_differs() -> None:
    """The control of the test above: dropping the state is seen."""
    config = TrainConfig(optim="adamw_8bit", learning_rate=1e-2)
    whole = parameters()
    take_steps(build_optimizer(whole, config), whole, range(6))
    first = parameters()
    take_steps(build_optimizer(first, config), first, range(3))
    take_steps(build_optimizer(first, config), first, range(3, 6))
    assert not torch.equal(whole["large"], first["large"])


def test_8bit_state_is_8bit_and_paged_ones_say_once_that_a_cpu_cannot_page() -> None:
    notices: list[str] = []
    named = parameters()
    optimizer = build_optimizer(named, TrainConfig(optim="paged_adamw_8bit"), notices.append)
    take_steps(optimizer, named, range(1))
    assert optimizer.state[named["large"]]["state1"].dtype == torch.uint8
    assert optimizer.state[named["small"]]["state1"].dtype == torch.float32
    assert notices == ["train.optim: paged_adamw_8bit runs as adamw_8bit on a CPU, which has no memory to page from"]


@pytest.mark.parametrize(("saved", "loaded"), [("adamw_8bit", "adamw_torch"), ("adamw_torch", "adamw_8bit"),
                                               ("paged_adamw_32bit", "adamw_8bit")])  # fmt: skip
def test_state_of_another_optimizer_is_refused(saved: str, loaded: str) -> None:
    named = parameters()
    optimizer = build_optimizer(named, TrainConfig(optim=saved))
    take_steps(optimizer, named, range(1))
    tensors, numbers = optimizer_state(optimizer, named)
    with pytest.raises(UserError, match=r"optimizer state of .* is not whole"):
        load_optimizer_state(build_optimizer(named, TrainConfig(optim=loaded)), named, tensors, numbers)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
                                  "constant_with_warmup", "inverse_sqrt"])  # fmt: skip
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_are_transformers_own(name: str, warmup: int) -> None:
    config = TrainConfig(lr_scheduler_type=name, warmup_steps=warmup, learning_rate=3e-4)
    rate = build_schedule(config, 20)
    optimizer = torch.optim.SGD(parameters().values(), lr=3e-4)
    scheduler = get_scheduler(name, optimizer, warmup, 20)
    ours = build_optimizer(parameters(), config)
    for step in range(20):
        set_learning_rate(ours, rate(step))
        assert ours.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


def test_warmup_ratio_counts_all_steps() -> None:
    rate = build_schedule(
        TrainConfig(warmup_ratio=0.25, learning_rate=1.0, lr_scheduler_type="constant_with_warmup"), 20
    )
    assert [rate(step) for step in (0, 1, 5)] == [0.0, 0.2, 1.0]


def test_loraplus_raises_the_rate_of_b_matrices_alone() -> None:
    """SGD without momentum moves a weight by rate x gradient: the ratio of the moves is that of the rates."""
    named = parameters()
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = build_optimizer(named, TrainConfig(optim="sgd", loraplus_lr_ratio=8.0))
    set_learning_rate(optimizer, 0.25)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (before[name] - parameter.detach()) for name, parameter in named.items()}
    for name, expected in (("large", 0.25), ("q.lora_B.weight", 2.0), ("small", 0.25)):
        torch.testing.assert_close(moved[name], torch.full_like(moved[name], expected))


def test_checkpoint_state_is_the_same_with_and_without_loraplus() -> None:
    states = []
    for ratio in (None, 4.0):
        named = parameters()
        optimizer = build_optimizer(named, TrainConfig(optim="adamw_8bit", loraplus_lr_ratio=ratio))
        take_steps(optimizer, named, range(2))
        states.append(optimizer_state(optimizer, named))
    (plain, plain_numbers), (raised, raised_numbers) = states
    assert plain_numbers == raised_numbers
    assert list(plain) == list(raised)
    # Adam's state follows the gradients alone, so not even its values know the learning rate.
    assert all(torch.equal(plain[key], raised[key]) for key in plain)


def test_lion_steps_are_the_papers() -> None:
    """Lion (https://arxiv.org/abs/2302.06675) in float64; a small tensor has fp32 state, so only rounding differs."""
    named = parameters()
    config = TrainConfig(optim="paged_lion_8bit", learning_rate=1e-2, weight_decay=0.1, adam_beta2=0.99)
    optimizer = build_optimizer(named, config, lambda text: None)
    weight, momentum = named["small"].detach().double(), torch.zeros(10, dtype=torch.float64)
    for step in range(4):
        take_steps(optimizer, named, range(step, step + 1))
        grad = named["small"].grad
        assert grad is not None
        update = torch.sign(0.9 * momentum + 0.1 * grad.double())
        weight = weight * (1 - 1e-2 * 0.1) - 1e-2 * update
        momentum = 0.99 * momentum + 0.01 * grad.double()
    torch.testing.assert_close(named["small"].detach().double(), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_step_left_out_by_a_flag_never_was(optim: str) -> None:
    """Parameters, state and step counts are those of the other steps alone, and gradients are scaled as asked."""
    config = TrainConfig(optim=optim, learning_rate=1e-2, weight_decay=0.01)
    states = []
    for flags in ([False, True, False, True, False], [False, False, False]):
        named = parameters()
        optimizer = build_optimizer(named, config, lambda text: None)
        taken = 0
        for flag in flags:
            generator = torch.Generator().manual_seed(taken)
            for parameter in named.values():
                grad = torch.randn(parameter.shape, generator=generator)
                parameter.grad = torch.full_like(grad, torch.nan) if flag else grad * (1 if len(flags) == 5 else 0.5)
            # As a flag of the device's, and as the host's.
            skip = torch.tensor(flag) if len(flags) == 5 else flag
            take_step(optimizer, skip, torch.tensor(0.5) if len(flags) == 5 else None)
            taken += not flag
        states.append((named, *optimizer_state(optimizer, named)))
    (named, tensors, numbers), (plain, plain_tensors, plain_numbers) = states
    assert all(torch.equal(named[name], plain[name]) for name in named)
    assert numbers == plain_numbers
    assert tensors.keys() == plain_tensors.keys()
    assert all(torch.equal(tensors[name], plain_tensors[name]) for name in tensors)


def test_torchs_fused_optimizers_take_the_flag_too() -> None:
    """What `adamw_torch` and `sgd` are on a GPU, here on the CPU."""
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        named = parameters()
        optimizer = kind(named.values(), lr=1e-2, fused=True)
        plain = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in named.items()}
        other = kind(plain.values(), lr=1e-2)
        for step, flag in enumerate([False, True, False]):
            for mine, theirs in zip(named.values(), plain.values(), strict=True):
                grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(step))
                mine.grad, theirs.grad = grad * 4 if not flag else grad + torch.nan, grad
            take_step(optimizer, torch.tensor(flag), torch.tensor(0.25))
            if not flag:
                other.step()
        for name, parameter in named.items():
            # The fused ones compute in another order.
            torch.testing.assert_close(parameter, plain[name], rtol=1e-6, atol=1e-6)
