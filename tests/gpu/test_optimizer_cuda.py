"""AdamW's kernels on a real card: the reference's bits, bitsandbytes' steps, paged state, no waiting, and the speed."""

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_dist.config.schema import TrainConfig
from qlora_dist.kernels import adamw_8bit
from qlora_dist.kernels.adamw_8bit import AdamW, Moment, adamw_8bit_, adamw_32bit_, map_of
from qlora_dist.optim.optimizers import build_optimizer, init_optimizer_state, optimizer_state, take_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

BETAS, EPS, LR = (0.9, 0.999), 1e-8, 1e-2
SIZE = 4001 * 256 + 40
KEYS = ("state1", "state2", "absmax1", "absmax2")


def random(size: int = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def gradient(size: int, step: int) -> Tensor:
    """Of magnitudes that differ by a thousand, so that codes of every decade occur."""
    return random(size, seed=step) * 10 ** random(size, seed=100 + step).clamp(-1.5, 1.5)


def moments(size: int) -> tuple[Moment, Moment]:
    from bitsandbytes.functional import create_dynamic_map

    first, second = (
        Moment(
            torch.zeros(size, dtype=torch.uint8, device="cuda"),
            torch.zeros(-(-size // 256), device="cuda"),
            map_of(create_dynamic_map(signed=signed).cuda()),
        )
        for signed in (True, False)
    )
    return first, second


def hyper(step: int, weight_decay: float = 0.1, scale: Tensor | None = None, skip: Tensor | None = None) -> AdamW:
    corrections = torch.tensor([1 - beta**step for beta in BETAS], device="cuda")
    return AdamW(LR, *BETAS, EPS, weight_decay, corrections, scale, skip)


def test_the_kernels_give_the_references_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both round every product and sum by itself, and divide and take roots as IEEE 754 has it."""
    found = []
    for on_triton in (True, False):
        monkeypatch.setattr(adamw_8bit, "runs_on_triton", lambda x, on_triton=on_triton: on_triton)
        param, small = random(), random(seed=7)
        first, second = moments(SIZE)
        fp32 = torch.zeros(SIZE, device="cuda"), torch.zeros(SIZE, device="cuda")
        for step in range(1, 5):
            scale, skip = torch.tensor(0.3, device="cuda"), torch.tensor(step == 3, device="cuda")
            adamw_8bit_(param, gradient(SIZE, step), first, second, hyper(step, scale=scale, skip=skip))
            adamw_32bit_(small, gradient(SIZE, step), *fp32, hyper(step, scale=scale, skip=skip))
        found.append([param, *first[:2], *second[:2], small, *fp32])
    for name, ours, theirs in zip(("param", *KEYS, "param32", "state1", "state2"), *found, strict=True):
        assert torch.equal(ours, theirs), f"{name}: {(ours != theirs).sum().item()} of {ours.numel()} differ"


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("size", [SIZE, 2**20])
def test_steps_are_those_of_bitsandbytes_8bit(size: int, weight_decay: float) -> None:
    """From bitsandbytes' state at each step.

    Its kernel takes 1 - beta in fp32 (5e-5 off for 0.999), powers and quotients from approximate instructions: up to
    1e-3 of an update. Where the difference crosses a border between codes they differ by one.
    """
    from bitsandbytes.optim import AdamW8bit

    theirs = nn.Parameter(random(size))
    optimizer = AdamW8bit([theirs], lr=LR, betas=BETAS, eps=EPS, weight_decay=weight_decay, min_8bit_size=0)
    ours, (first, second) = theirs.detach().clone(), moments(size)
    for step in range(1, 7):
        theirs.grad = gradient(size, step)
        before = theirs.detach().clone()
        optimizer.step()
        adamw_8bit_(ours, theirs.grad, first, second, hyper(step, weight_decay))
        moved = (theirs.detach() - before).abs()
        apart = (ours - theirs.detach()).abs()
        assert (apart <= 2e-3 * moved + 1e-6).all(), f"step {step}: {(apart / (moved + 1e-6)).max().item():.1e}"
        state = optimizer.state[theirs]
        for moment, number in ((first, "1"), (second, "2")):
            torch.testing.assert_close(moment.absmax, state[f"absmax{number}"], rtol=2e-4, atol=0)
            codes_apart = (moment.codes.int() - state[f"state{number}"].int()).abs()
            assert codes_apart.max() <= 1, f"state{number}, step {step}: {codes_apart.max().item()} apart"
            assert (codes_apart > 0).float().mean() < 0.02
            moment.codes.copy_(state[f"state{number}"])
            moment.absmax.copy_(state[f"absmax{number}"])
        ours.copy_(theirs.detach())


def test_steps_are_those_of_bitsandbytes_32bit() -> None:
    from bitsandbytes.optim import AdamW32bit

    theirs = nn.Parameter(random())
    optimizer = AdamW32bit([theirs], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.1)
    ours, first, second = theirs.detach().clone(), torch.zeros(SIZE).cuda(), torch.zeros(SIZE).cuda()
    for step in range(1, 6):
        theirs.grad = random(seed=step)
        optimizer.step()
        adamw_32bit_(ours, theirs.grad, first, second, hyper(step))
    # Five updates of LR at most, each with an error as above.
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=5 * 2e-3 * LR)
    torch.testing.assert_close(first, optimizer.state[theirs]["state1"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(second, optimizer.state[theirs]["state2"], rtol=1e-4, atol=1e-9)


PAIRS = [("paged_adamw_8bit", "adamw_8bit"), ("paged_adamw_32bit", "paged_adamw_32bit"),
         ("adamw_torch", "adamw_torch"), ("sgd", "sgd")]  # fmt: skip


@pytest.mark.parametrize(("optim", "other"), PAIRS)
def test_a_step_waits_for_nothing_and_is_left_out_by_a_flag(optim: str, other: str) -> None:
    """Paged state is managed memory; it takes the same steps, none of which the host waits for."""
    size, flags = 2**20, [False, True, False, False]
    ours, theirs = nn.Parameter(random(size)), nn.Parameter(random(size))
    make: Any = lambda name, p: build_optimizer({"w": p}, TrainConfig(optim=name, learning_rate=LR, weight_decay=0.1))  # noqa: E731
    mine, plain = make(optim, ours), make(other, theirs)
    init_optimizer_state(mine, {"w": ours}, {"w": True})
    if optim.startswith("paged"):
        assert mine.state[ours]["state1"].is_paged
    scale = torch.tensor(0.25, device="cuda")
    grads = [gradient(size, step) for step in range(len(flags))]
    skips = [torch.tensor(flag, device="cuda") for flag in flags]
    for grad in grads[1::2]:
        grad[5] = torch.nan
    grads[3] = gradient(size, 9)
    for step, flag in enumerate(flags):
        ours.grad = grads[step].clone()
        torch.cuda.synchronize()
        if step:
            # The first step makes tables and state.
            torch.cuda.set_sync_debug_mode("error")
        try:
            take_step(mine, skips[step], scale)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if not flag:
            theirs.grad = grads[step] * 0.25
            take_step(plain)
    tensors, numbers = optimizer_state(mine, {"w": ours})
    expected, counts = optimizer_state(plain, {"w": theirs})
    assert numbers == counts
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        if tensor.dtype == torch.uint8:
            assert torch.equal(tensor.cpu(), expected[name].cpu()), name
        else:
            torch.testing.assert_close(tensor.cpu(), expected[name].cpu(), rtol=1e-5, atol=1e-7)


def milliseconds(work: Any, times: int = 20) -> float:
    work()
    taken = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def test_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """At the size of Llama 8B's adapter of rank 16, beside a copy that moves as many bytes in the same run."""
    size = 41_943_040
    param, grad, (first, second) = random(size), random(size, seed=1), moments(size)
    # Read: parameter, gradient and codes; written: all but the gradient; and two scales for each 256 either way.
    moved = size * (4 * 3 + 2 * 2) + 4 * 4 * size // 256
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    step = hyper(3, scale=torch.tensor(1.0, device="cuda"), skip=torch.tensor(False, device="cuda"))
    update = milliseconds(lambda: adamw_8bit_(param, grad, first, second, step))
    copy = milliseconds(lambda: target.copy_(source))
    with capsys.disabled():
        print(f"\nadamw_8bit: {update:.3f} ms, {moved / update / 1e6:.0f} GB/s, {copy / update:.2f} of a copy's speed")
    assert copy / update > 0.3
