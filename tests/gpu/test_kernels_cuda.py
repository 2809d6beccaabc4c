"""The kernels on a real card: values at Llama 8B's shapes, bitsandbytes' bits, no waiting, and how fast they are."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_dist.kernels import factors
from qlora_dist.kernels.factors import Factors, place_factors
from qlora_dist.kernels.linear_cross_entropy import cross_entropy_, linear_cross_entropy
from qlora_dist.kernels.nf4 import NestedAbsmax, dequantize_4bit_into
from qlora_dist.kernels.rmsnorm import rms_norm, rms_norm_backward
from qlora_dist.kernels.rope import join_heads, rotate_
from qlora_dist.kernels.swiglu import swiglu as swiglu_
from qlora_dist.kernels.swiglu import swiglu_backward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

M, H, F, V, PAD, QUERIES, KEYS, DIM = 4096, 4096, 14336, 128256, 64, 32, 8, 128
BF16 = torch.bfloat16


def random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)


def wide(rows: int, columns: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(rows, columns + PAD, dtype=dtype, device="cuda")[:, :columns]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 3e-3) -> None:
    """Relative error in norm: a rounding to bf16 costs 1.7e-3, a second one before it (RMSNorm's) as much again."""
    error = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
    assert error <= tolerance, f"relative error {error:.2e}"


def test_norms_against_float64() -> None:
    """float64 takes the references: the same calls once more."""
    x, residual, dout = random(M, H), random(M, H, seed=1), random(M, H, seed=2)
    weight = 1 + random(H, scale=0.1)
    kept, out, dx, stats = torch.empty_like(x), wide(M, H), wide(M, H), torch.empty(M, device="cuda")
    rms_norm(x, weight, 1e-5, out, stats, residual, kept)
    rms_norm_backward(dout, kept, weight, stats, residual, dx)
    out64, dx64, stats64 = wide(M, H, torch.float64), wide(M, H, torch.float64), stats.double()
    assert_near(kept, x.double() + residual.double())
    rms_norm(kept.double(), weight.double(), 1e-5, out64, stats64)
    rms_norm_backward(dout.double(), kept.double(), weight.double(), stats64, residual.double(), dx64)
    assert_near(stats, stats64, 1e-6)
    assert_near(out, out64)
    assert_near(dx, dx64)

    buffer = random(M, QUERIES + 2 * KEYS, DIM)
    heads, before, weight = buffer[:, : QUERIES + KEYS], buffer.double(), weight[:DIM]
    stats = torch.empty(M * (QUERIES + KEYS), device="cuda")
    rms_norm(heads, weight, 1e-6, heads, stats)
    after, stats64 = before[:, : QUERIES + KEYS].clone(), stats.double()
    rms_norm(after, weight.double(), 1e-6, after, stats64)
    assert_near(heads, after)
    assert torch.equal(buffer[:, QUERIES + KEYS :].double(), before[:, QUERIES + KEYS :])


@pytest.mark.parametrize("inverse", [False, True])
def test_rotation_against_float64(inverse: bool) -> None:
    buffer = random(M, (QUERIES + 2 * KEYS) * DIM + PAD)
    x = buffer[:, : (QUERIES + KEYS) * DIM].unflatten(1, (-1, DIM))
    angle = torch.arange(2048, device="cuda")[:, None] * 0.01 ** torch.linspace(0, 1, DIM // 2, device="cuda")
    cos, sin = angle.cos().repeat(1, 2).to(BF16), angle.sin().repeat(1, 2).to(BF16)
    before, others = x.double(), buffer[:, (QUERIES + KEYS) * DIM :].clone()
    rotate_(x, cos, sin, inverse)
    assert_near(x, rotate_(before, cos.double(), sin.double(), inverse))
    assert torch.equal(buffer[:, (QUERIES + KEYS) * DIM :], others)


def test_heads_join_into_rows_as_in_steps() -> None:
    """What cuDNN's backward gives has the strides of q, k and v, cut from one buffer."""
    q, k, v = (
        part.unflatten(2, (-1, DIM)).transpose(1, 2)
        for part in random(2, M // 2, (QUERIES + 2 * KEYS) * DIM).split([QUERIES * DIM, KEYS * DIM, KEYS * DIM], 2)
    )
    cos, sin = random(M // 2, DIM), random(M // 2, DIM)
    expected = torch.cat([part.transpose(1, 2).reshape(M, -1) for part in (q, k, v)], dim=1)
    rotate_(expected[:, : (QUERIES + KEYS) * DIM].unflatten(1, (-1, DIM)), cos, sin, inverse=True)
    out = wide(M, expected.shape[1])
    join_heads(out, q, k, v, angles=(cos, sin), inverse=True)
    assert_near(out, expected, 1e-3)
    assert out._base is not None
    assert not out._base[:, expected.shape[1] :].any()


def test_factors_are_placed_as_the_reference_places_them(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((4096, 16), (1024, 16), (1024, 7))
    parts, row, rank = [], 0, 0
    for n, r in shapes:
        parts.append(Factors(random(r, H, dtype=torch.float32), random(n, r, dtype=torch.float32), row, rank, 2.0))
        row, rank = row + n, rank + r
    placed = []
    for on_triton in (True, False):
        monkeypatch.setattr(factors, "runs_on_triton", lambda x, on_triton=on_triton: on_triton)
        a_PK, b_NP = random(64, H), wide(row, 64)
        b_NP.fill_(float("nan"))
        place_factors(parts, a_PK, b_NP)
        placed.append((a_PK, b_NP))
    assert torch.equal(placed[0][0], placed[1][0])
    assert torch.equal(placed[0][1], placed[1][1])


def test_a_kernel_launched_again_takes_what_it_is_given() -> None:
    """Kernels are kept by what they were compiled for: other sizes, alignments and strides get their own."""
    for rows, offset in ((64, 0), (64, 1), (1, 0), (33, 3), (64, 0), (1, 1)):
        x = random(rows, 3 * F + offset, scale=1.0)[:, offset:]
        gate, up, out = x[:, :F], x[:, F : 2 * F], x[:, 2 * F :]
        expected = torch.nn.functional.silu(gate.double()) * up.double()
        swiglu_(gate, up, out)
        assert_near(out, expected)


def test_swiglu_against_float64() -> None:
    both, dh = random(M, 2 * F), random(M, F, seed=1)
    gate, up = both[:, :F], both[:, F:]
    out, again, grads = wide(M, F), torch.empty_like(dh), wide(M, 2 * F)
    swiglu_(gate, up, out)
    swiglu_backward(dh, gate, up, grads[:, :F], grads[:, F:], again)
    out64, dgate64, dup64 = (torch.empty(M, F, dtype=torch.float64, device="cuda") for _ in range(3))
    swiglu_backward(dh.double(), gate.double(), up.double(), dgate64, dup64, out64)
    assert torch.equal(out, again)
    assert_near(out, out64)
    assert_near(grads[:, :F], dgate64)
    assert_near(grads[:, F:], dup64)


def test_loss_of_the_head_against_float64() -> None:
    """The logits of one chunk are the largest thing it makes."""
    hidden, weight = random(M, H).requires_grad_(), random(V, H, scale=0.02)
    targets = torch.randint(0, V, (M,), device="cuda")
    targets[7] = -100
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_cross_entropy(hidden, weight, targets)
    (loss / M).backward()
    assert torch.cuda.max_memory_allocated() - before < 0.8 * 2**30
    hidden64 = hidden.detach().double().requires_grad_()
    loss64 = linear_cross_entropy(hidden64, weight.double(), targets, chunk=512)
    (loss64 / M).backward()
    assert_near(loss, loss64, 1e-4)
    assert hidden.grad is not None
    assert hidden64.grad is not None
    # The logits are rounded to bf16 before the exponential, as in a stock head.
    assert_near(hidden.grad, hidden64.grad, 1e-2)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("quant_type", "blocksize", "shape"),
    [
        ("nf4", 64, (H, H)),
        ("nf4", 64, (KEYS * DIM, H)),
        ("nf4", 64, (F, H)),
        ("nf4", 64, (H, F)),
        ("nf4", 64, (37, 72)),
        ("nf4", 64, (31, 33)),
        ("nf4", 128, (530, 64)),
        ("nf4", 4096, (33, 200)),
        ("fp4", 64, (KEYS * DIM, H)),
    ],
)
def test_weights_are_bitsandbytes_bit_for_bit(
    quant_type: str, blocksize: int, shape: tuple[int, int], dtype: torch.dtype, nested: bool
) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    packed, state = bnb.quantize_4bit(
        random(*shape, dtype=dtype), blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    out = wide(*shape, dtype=dtype)
    dequantize_4bit_into(out, packed, state.absmax, state.code, blocksize, nested_state(state))
    assert torch.equal(out, bnb.dequantize_4bit(packed, state))


def nested_state(state: Any) -> NestedAbsmax | None:
    if not state.nested:
        return None
    return NestedAbsmax(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_every_byte_of_values_and_of_scales_equals_the_reference(dtype: torch.dtype) -> None:
    """The CPU's reference against the kernel, on the same state: each scale byte meets each byte of values."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(1024)
    absmax = torch.arange(256, dtype=torch.uint8).repeat_interleave(32)
    generator = torch.Generator().manual_seed(0)
    code = torch.randn(16, generator=generator)
    absmax2, code2 = torch.rand(32, generator=generator) + 0.5, torch.randn(256, generator=generator)
    offset = torch.tensor(2.6017)
    expected, out = torch.empty(512, 1024, dtype=dtype), wide(512, 1024, dtype)
    dequantize_4bit_into(expected, packed, absmax, code, 64, NestedAbsmax(absmax2, code2, offset, 256))
    nested = NestedAbsmax(absmax2.cuda(), code2.cuda(), offset.cuda(), 256)
    dequantize_4bit_into(out, packed.cuda(), absmax.cuda(), code.cuda(), 64, nested)
    assert torch.equal(out.cpu(), expected)


def test_rows_more_than_two_billion_values_apart() -> None:
    stride = 2**30 + 64
    far = torch.empty(2 * stride + 2 * H, dtype=BF16, device="cuda").as_strided((3, 2 * H), (stride, 1))
    near = random(3, 2 * H)
    far.copy_(near)
    weight, stats, table = random(H), torch.empty(3, device="cuda"), random(3, DIM)
    targets, losses = torch.tensor([0, 5, H], device="cuda"), torch.empty(3, device="cuda")
    for x in (near, far):
        rms_norm(x[:, :H], weight, 1e-5, x[:, :H], stats)
        rms_norm_backward(x[:, :H], x[:, H:], weight, stats, None, x[:, H:])
        rotate_(x.unflatten(1, (-1, DIM)), table, table)
        swiglu_(x[:, :H], x[:, H:], x[:, :H])
        swiglu_backward(x[:, :H], x[:, H:], x[:, :H], x[:, :H], x[:, H:])
        cross_entropy_(x, targets, losses, gradient=True)
    assert torch.equal(near, far)
    packed, code = (
        torch.arange(256, dtype=torch.uint8, device="cuda").repeat(3 * H // 512),
        random(16, dtype=torch.float32),
    )
    absmax = torch.ones(3 * H // 64, device="cuda")
    for x in (near, far):
        dequantize_4bit_into(x[:, :H], packed, absmax, code, 64)
    assert torch.equal(near, far)


def test_nothing_waits_for_the_device() -> None:
    hidden, weight = random(256, H).requires_grad_(), random(1000, H)
    targets, stats = torch.zeros(256, dtype=torch.int64, device="cuda"), torch.empty(256, device="cuda")
    packed, code = torch.zeros(128 * H, dtype=torch.uint8, device="cuda"), random(256, dtype=torch.float32)
    absmax, x = torch.zeros(256 * H // 64, dtype=torch.uint8, device="cuda"), random(256, H)
    table = random(256, DIM)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dequantize_4bit_into(x, packed, absmax, code[:16], 64, NestedAbsmax(code, code, code[0], 256))
        rms_norm(x, x[0], 1e-5, x, stats, x, x)
        rms_norm_backward(x, x, x[0], stats, x, x)
        rotate_(x.unflatten(1, (-1, DIM)), table, table)
        swiglu_(x, x, x)
        swiglu_backward(x, x, x, x, x)
        join_heads(x, x.view(1, 256, -1, DIM).transpose(1, 2), angles=(table, table))
        place_factors([Factors(x[:16], x[:, :16].contiguous(), 0, 0, 2.0)], x[:64], x[:, :64])
        (linear_cross_entropy(hidden, lambda: weight, targets) / 3).backward()
        linear_cross_entropy(hidden[:0], weight, targets[:0]).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
