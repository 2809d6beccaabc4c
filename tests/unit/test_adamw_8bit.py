"""AdamW with bitsandbytes' state, against bitsandbytes itself and against the definition of its 8-bit codes.

Under TRITON_INTERPRET=1 the same tests see the kernels (test_adamw_triton.py). bitsandbytes decays a
weight after the update on CUDA, as here, and before it on a CPU: the two differ by lr * weight_decay of the update.
"""

import pytest
import torch
from torch import Tensor

from qlora_dist.kernels.adamw_8bit import AdamW, Moment, adamw_8bit_, adamw_32bit_, map_of

BETAS, EPS = (0.9, 0.999), 1e-8
# A last block of 40 elements; and more blocks than a program of the kernel has.
SIZE = 9 * 256 + 40


def maps() -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=True), create_dynamic_map(signed=False)


def moments(size: int = SIZE) -> tuple[Moment, Moment]:
    blocks = -(-size // 256)
    first, second = (Moment(torch.zeros(size, dtype=torch.uint8), torch.zeros(blocks), map_of(code)) for code in maps())
    return first, second


def hyper(step: int, weight_decay: float = 0.0, lr: float = 1e-2, scale: float | None = None, skip: bool | None = None):
    return AdamW(
        lr, *BETAS, EPS, weight_decay, torch.tensor([1 - beta**step for beta in BETAS]),
        None if scale is None else torch.tensor(scale), None if skip is None else torch.tensor(skip),
    )  # fmt: skip


def dequantized(moment: Moment) -> Tensor:
    return moment.map.code[moment.codes.int()] * moment.absmax.repeat_interleave(256)[: len(moment.codes)]


def random(size: int = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("size", [SIZE, 4096])
def test_steps_are_those_of_bitsandbytes_8bit(size: int, weight_decay: float) -> None:
    """From the same state at each step: the parameter within rounding, the new state within a step of its grid.

    On a CPU bitsandbytes looks codes up in a table of even steps, 2e-5 of a block's maximum wide: 3 % of the codes are
    the one beside the nearest, and near 0, where entries are denser, up to seven off. Gradients here vary by a factor
    of a thousand, and so the second moments by a million.
    """
    from bitsandbytes.optim import AdamW8bit

    theirs = torch.nn.Parameter(random(size))
    optimizer = AdamW8bit([theirs], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=weight_decay, min_8bit_size=0)
    ours, (first, second) = theirs.detach().clone(), moments(size)
    for step in range(1, 6):
        grad = random(size, seed=step) * 10 ** random(size, seed=100 + step).clamp(-1.5, 1.5)
        theirs.grad = grad.clone()
        before = theirs.detach().clone()
        optimizer.step()
        adamw_8bit_(ours, grad, first, second, hyper(step, weight_decay))
        moved = (theirs.detach() - before).abs().max().item()
        torch.testing.assert_close(ours, theirs.detach(), rtol=3e-7, atol=(1e-6 + 2e-2 * weight_decay) * moved)
        state = optimizer.state[theirs]
        for moment, number in ((first, "1"), (second, "2")):
            torch.testing.assert_close(moment.absmax, state[f"absmax{number}"], rtol=1e-6, atol=0)
            other = moment._replace(codes=state[f"state{number}"], absmax=state[f"absmax{number}"])
            scale = moment.absmax.repeat_interleave(256)[:size]
            apart = (dequantized(moment) - dequantized(other)).abs() / scale
            codes_apart = (moment.codes.int() - other.codes.int()).abs()
            assert ((codes_apart <= 1) | (apart <= 2.5e-5)).all()
            assert ((codes_apart > 0) & (apart > 2.5e-5)).float().mean() < 0.06
            moment.codes.copy_(other.codes)
            moment.absmax.copy_(other.absmax)
        ours.copy_(theirs.detach())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_bitsandbytes_32bit(weight_decay: float) -> None:
    from bitsandbytes.optim import AdamW32bit

    theirs = torch.nn.Parameter(random())
    optimizer = AdamW32bit([theirs], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=weight_decay)
    ours, first, second = theirs.detach().clone(), torch.zeros(SIZE), torch.zeros(SIZE)
    for step in range(1, 6):
        theirs.grad = random(seed=step)
        optimizer.step()
        adamw_32bit_(ours, theirs.grad, first, second, hyper(step, weight_decay))
    # Five updates of 1e-2 at most, each with a difference of lr * weight_decay of it.
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7 + 5e-2 * 1e-2 * weight_decay)
    torch.testing.assert_close(first, optimizer.state[theirs]["state1"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(second, optimizer.state[theirs]["state2"], rtol=1e-5, atol=1e-9)


def nearest(x: Tensor, code: Tensor) -> Tensor:
    """By exhaustion, in float64: the nearest entry, of two equally near ones (as fp32 has it) the even one."""
    middle = ((code[1:] + code[:-1]) * 0.5).double()
    below = (x[:, None].double() > middle).sum(1)
    at_or_below = (x[:, None].double() >= middle).sum(1)
    return torch.where(below % 2 == 0, below, at_or_below)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_at_and_around_every_border(signed: bool) -> None:
    """Also at both ends, at zero, and on values of every size; a negative value never becomes 0."""
    code = maps()[0 if signed else 1]
    middle = (code[1:] + code[:-1]) * 0.5
    decades = 10 ** torch.linspace(-9, 0, 4000)
    edges = 10.0 ** torch.arange(-8, 1)
    values = torch.cat([middle, edges, decades, torch.zeros(1), code.abs()])
    values = torch.cat([torch.nextafter(values, torch.full_like(values, to)) for to in (-9, 9)] + [values])
    values = torch.cat([values, -values]) if signed else values.abs()
    values = values[values.abs() <= 1]
    # A block of which the first element is 1, so that nothing is scaled; no gradient, and so betas of 1 in effect.
    rows = torch.nn.functional.pad(values, (0, -len(values) % 255)).view(-1, 255)
    block = torch.cat([torch.ones(len(rows), 1), rows], dim=1).reshape(-1)
    first, second = moments(len(block))
    # From an empty state one step makes s1 = (1 - beta1) g and s2 = (1 - beta2) g g. With betas of 0: g and g g.
    step = AdamW(0.0, 0.0, 0.0, EPS, 0.0, torch.ones(2))
    if signed:
        adamw_8bit_(torch.zeros(len(block)), block, first, second, step)
        expected = nearest(block, code)
        expected -= ((code[expected] == 0) & (block < 0)).int()
        found = first.codes
    else:
        root = block.sqrt()
        adamw_8bit_(torch.zeros(len(block)), root, first, second, step)
        expected = nearest(root * root, code)
        found = second.codes
    assert torch.equal(found.long(), expected)
    assert len(found.unique()) >= 255


def test_zero_gradients_leave_a_state_of_zeros_and_no_nan() -> None:
    param, (first, second) = random(), moments()
    before = param.clone()
    for step in (1, 2):
        adamw_8bit_(param, torch.zeros(SIZE), first, second, hyper(step))
    assert torch.equal(param, before)
    assert not dequantized(first).any()
    assert not dequantized(second).any()


def test_padding_to_whole_blocks_changes_nothing() -> None:
    """What flat parameters rest on: a weight followed by zeros has the state that it has alone."""
    short, padded = SIZE, -(-SIZE // 256) * 256
    results = []
    for size in (short, padded):
        param = torch.zeros(size)
        param[:short] = random()
        first, second = moments(size)
        for step in range(1, 4):
            grad = torch.zeros(size)
            grad[:short] = random(seed=step)
            adamw_8bit_(param, grad, first, second, hyper(step, 0.1))
        assert not param[short:].any()
        results.append([t[:short] for t in (param, first.codes, second.codes)] + [first.absmax, second.absmax])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_gradient_is_scaled_and_a_step_is_left_out_by_what_the_device_holds() -> None:
    scaled, plain = [(random(), *moments(), torch.zeros(SIZE), torch.zeros(SIZE)) for _ in range(2)]
    small_scaled, small_plain = random(seed=9), random(seed=9)
    for number in (1, 2):
        grad = random(seed=number)
        for (param, first, second, *fp32), small, scale, factor in (
            (scaled, small_scaled, 0.25, 1.0), (plain, small_plain, None, 0.25),
        ):  # fmt: skip
            adamw_8bit_(param, grad * factor, first, second, hyper(number, 0.1, scale=scale, skip=False))
            adamw_32bit_(small, grad * factor, fp32[0], fp32[1], hyper(number, 0.1, scale=scale, skip=False))
    assert torch.equal(scaled[0], plain[0])
    assert torch.equal(scaled[1].codes, plain[1].codes)
    assert torch.equal(small_scaled, small_plain)

    before = [t.clone() for t in (scaled[0], *scaled[1][:2], *scaled[2][:2], scaled[3], scaled[4], small_scaled)]
    bad = torch.full((SIZE,), torch.nan)
    adamw_8bit_(scaled[0], bad, scaled[1], scaled[2], hyper(3, 0.1, skip=True))
    adamw_32bit_(small_scaled, bad, scaled[3], scaled[4], hyper(3, 0.1, skip=True))
    after = [scaled[0], *scaled[1][:2], *scaled[2][:2], scaled[3], scaled[4], small_scaled]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
