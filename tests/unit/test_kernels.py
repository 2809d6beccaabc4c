"""The ops of the fused path against float64 autograd, transformers and bitsandbytes, strided as the blocks use them.

On a CPU these run the references. Under TRITON_INTERPRET=1 (test_kernels_triton.py does so) the same tests run the
Triton kernels in Triton's interpreter, except in float64, which is the references' alone.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from qlora_dist.kernels import factors, nf4, rmsnorm, rope, swiglu
from qlora_dist.kernels import linear_cross_entropy as head
from qlora_dist.kernels.factors import Factors, place_factors
from qlora_dist.kernels.launch import Kernel
from qlora_dist.kernels.linear_cross_entropy import chunk_rows, linear_cross_entropy
from qlora_dist.kernels.nf4 import NestedAbsmax, dequantize_4bit_into
from qlora_dist.kernels.rmsnorm import rms_norm, rms_norm_backward
from qlora_dist.kernels.rope import join_heads, rotate_
from qlora_dist.kernels.swiglu import swiglu as swiglu_
from qlora_dist.kernels.swiglu import swiglu_backward

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Relative errors in norm. fp32: a few roundings and the order of sums. bf16: one or two roundings of 2^-9 each, twice
# that in the interpreter, which cuts mantissas off where the GPU rounds them.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)
FRAME = 7.0


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def strided(rows: int, columns: int, dtype: torch.dtype, pad: int = 24) -> tuple[Tensor, Callable[[], None]]:
    """The first columns of a wider buffer, and a check that nothing was written beside them."""
    buffer = torch.full((rows, columns + pad), FRAME, dtype=dtype)

    def untouched() -> None:
        assert (buffer[:, columns:] == FRAME).all()

    return buffer[:, :columns], untouched


def assert_near(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= (tolerance or TOLERANCE[actual.dtype]), f"relative error {error:.2e}"


def leaf(x: Tensor) -> Tensor:
    return x.detach().double().clone().requires_grad_()


def nested_state(state: Any) -> NestedAbsmax | None:
    if not state.nested:
        return None
    return NestedAbsmax(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("quant_type", "blocksize", "shape"),
    [
        ("nf4", 64, (24, 128)),
        ("fp4", 64, (24, 128)),
        ("nf4", 64, (37, 72)),  # a last block of 40 values, rows that end inside blocks
        ("nf4", 64, (31, 33)),  # an odd number of values: half of the last byte is nobody's, rows end inside bytes
        ("nf4", 4096, (33, 200)),
        ("nf4", 128, (530, 64)),  # more than one program, and nested blocks of 256 that end inside
    ],
)
def test_weights_come_back_bit_for_bit_as_from_bitsandbytes(
    quant_type: str, blocksize: int, shape: tuple[int, int], nested: bool
) -> None:
    # The interpreter cuts bf16 off; fp32 shows every bit of the arithmetic there, and CUDA's rounding has its own test.
    for dtype in (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16):
        weight = random(*shape, dtype=dtype).view(1, -1)
        packed, state = bnb.quantize_4bit(
            weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
        )
        out, untouched = strided(*shape, dtype=dtype)
        dequantize_4bit_into(out, packed, state.absmax, state.code, blocksize, nested_state(state))
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
        nibbles = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1)[: weight.numel()].int()
        values = state.code[nibbles] * absmax.repeat_interleave(blocksize)[: weight.numel()]
        assert torch.equal(out, values.to(dtype).view(shape))
        if blocksize < 2048 and weight.numel() % 2 == 0:  # else bitsandbytes compiles the formula above, for 20 s
            # As one row: in rows that end inside blocks bitsandbytes 0.50.2 reads other blocks' scales on a CPU.
            assert torch.equal(out, bnb.dequantize_4bit(packed, state).view(shape))
        untouched()


def test_every_byte_of_values_and_of_scales() -> None:
    """Against numpy's float32, where each operation rounds by itself; a fused multiply-add would show."""
    generator = np.random.default_rng(0)
    code = bnb.get_4bit_type("nf4", device="cpu").numpy()
    code2 = bnb.create_dynamic_map().numpy()
    values = np.tile(np.arange(256, dtype=np.uint8), 32)  # 256 blocks of 64: each scale byte meets 32 values
    scales = generator.permutation(256).astype(np.uint8)
    absmax2 = generator.random(4, dtype=np.float32) + 0.5
    offset = np.float32(2.6017)

    product = code2[scales] * absmax2.repeat(64)
    absmax = product + offset
    fused = (code2[scales].astype(np.float64) * absmax2.repeat(64) + offset).astype(np.float32)
    assert (fused != absmax).any()
    nibbles = np.stack((values >> 4, values & 15), axis=1).reshape(256, 64)
    expected = code[nibbles] * absmax[:, None]
    assert expected.dtype == np.float32

    out, untouched = strided(128, 128, torch.float32)
    nested = NestedAbsmax(torch.from_numpy(absmax2), torch.from_numpy(code2), torch.tensor(offset), 64)
    dequantize_4bit_into(out, torch.from_numpy(values), torch.from_numpy(scales), torch.from_numpy(code), 64, nested)
    assert np.array_equal(out.numpy(), expected.reshape(128, 128))
    untouched()


def test_packed_bytes_may_be_stored_as_another_type() -> None:
    """FSDP wants floating storage; bitsandbytes' quant_storage views the same bytes so."""
    packed, state = bnb.quantize_4bit(random(16, 64), quant_type="nf4")
    out = torch.empty(16, 64)
    dequantize_4bit_into(out, packed.view(-1).view(torch.bfloat16), state.absmax, state.code, 64)
    assert torch.equal(out, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(out=torch.empty(16, 66)), "do not fill a 16 x 66"),
        (dict(out=torch.empty(64, 16).t()), "contiguous"),
        (dict(blocksize=48), "power of two"),
        (dict(absmax=torch.zeros(16, dtype=torch.uint8)), "uint8 absmax"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    packed, state = bnb.quantize_4bit(random(16, 64), quant_type="nf4")
    given = dict(out=torch.empty(16, 64), absmax=state.absmax, blocksize=64) | change
    with pytest.raises(ValueError, match=message):
        dequantize_4bit_into(given["out"], packed, given["absmax"], state.code, given["blocksize"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [64, 200, 2304])
def test_rms_norm_and_its_gradient(features: int, dtype: torch.dtype) -> None:
    """With and without the residual, from and into strided views, against float64 autograd."""
    rows, eps = 5, 1e-3
    x, residual, dout, dresidual = (random(rows, features, dtype=dtype, seed=seed) for seed in range(4))
    weight = 1 + 0.1 * random(features, dtype=dtype)
    stats = torch.empty(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for added in (None, residual):
        out, untouched = strided(rows, features, dtype)
        kept = None if added is None else torch.empty_like(x)
        rms_norm(x, weight, eps, out, stats, added, kept)
        untouched()
        if added is not None and kept is not None:
            assert_near(kept, x.double() + added.double())
        # What was normalised is the rounded sum: so is it in transformers, and the backward reads it.
        h = leaf(x if kept is None else kept)
        expected = weight.double() * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        assert_near(out, expected)
        (gradient,) = torch.autograd.grad(expected, h, dout.double())
        dx, untouched = strided(rows, features, dtype)
        source = x if kept is None else kept
        rms_norm_backward(dout, source, weight, stats, None if added is None else dresidual, dx)
        assert_near(dx, gradient if added is None else gradient + dresidual.double())
        untouched()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_transformers(dtype: torch.dtype) -> None:
    """Bit for bit in the reference: the normalised value is rounded before the weight, as Llama's."""
    x, residual = random(6, 96, dtype=dtype), random(6, 96, dtype=dtype, seed=1)
    stock = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    stock.weight.data = 1 + 0.1 * random(96, dtype=dtype)
    out, kept = torch.empty_like(x), torch.empty_like(x)
    rms_norm(x, stock.weight.data, 1e-5, out, torch.empty(6), residual, kept)
    expected = stock(x + residual).detach()
    if INTERPRETED:
        assert_near(out, expected)
    else:
        assert torch.equal(kept, x + residual)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_each_head_in_a_wider_buffer(dtype: torch.dtype) -> None:
    """Qwen3's: queries and keys lie beside the values, which stay as they are; in place, then backward."""
    tokens, heads, dim, total = 7, 3, 32, 5
    buffer = random(tokens, total, dim, dtype=dtype)
    x = buffer[:, :heads]
    before = buffer.clone()
    weight = 1 + 0.1 * random(dim, dtype=dtype)
    stats = torch.empty(tokens * heads, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    rms_norm(x, weight, 1e-6, x, stats)
    assert torch.equal(buffer[:, heads:], before[:, heads:])
    h = leaf(before[:, :heads])
    expected = weight.double() * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
    assert_near(x, expected)

    dout = random(tokens, total, dim, dtype=dtype, seed=1)
    (gradient,) = torch.autograd.grad(expected, h, dout[:, :heads].double())
    rms_norm_backward(dout[:, :heads], before[:, :heads], weight, stats, None, dout[:, :heads])
    assert_near(dout[:, :heads], gradient)
    assert torch.equal(dout[:, heads:], random(tokens, total, dim, dtype=dtype, seed=1)[:, heads:])


def test_rms_norm_may_keep_the_sum_in_the_residual_and_the_gradient_in_its_input() -> None:
    x, residual, weight = random(4, 64), random(4, 64, seed=1), random(64)
    out, kept, stats = torch.empty(4, 64), torch.empty(4, 64), torch.empty(4)
    rms_norm(x, weight, 1e-5, out, stats, residual, kept)
    again, stream = torch.empty(4, 64), residual.clone()
    rms_norm(x, weight, 1e-5, again, stats, stream, stream)
    assert torch.equal(again, out)
    assert torch.equal(stream, kept)
    dx, stream = torch.empty(4, 64), residual.clone()
    rms_norm_backward(x, kept, weight, stats, residual, dx)
    rms_norm_backward(x, kept, weight, stats, stream, stream)
    assert torch.equal(stream, dx)
    with pytest.raises(ValueError, match="residual"):
        rms_norm(x, weight, 1e-5, out, stats, residual)


def angles(positions: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, dim], by transformers."""
    config = LlamaConfig(hidden_size=dim * 4, num_attention_heads=4, head_dim=dim)
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0, dtype=dtype), positions[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 48])
def test_rotation_equals_transformers_and_its_inverse_is_the_gradient(dim: int, dtype: torch.dtype) -> None:
    """Two sequences of 5 in one batch share the table; queries and keys are turned in one call, values are not."""
    length, batch, queries, keys = 5, 2, 3, 2
    cos, sin = angles(torch.arange(length) + 100, dim, dtype)
    buffer = random(batch * length, (queries + 2 * keys) * dim, dtype=dtype)
    before = leaf(buffer.view(batch, length, -1, dim).transpose(1, 2))
    x = buffer.view(batch * length, -1, dim)[:, : queries + keys]
    expected = torch.cat(
        apply_rotary_pos_emb(
            before[:, :queries], before[:, queries : queries + keys], cos[None].double(), sin[None].double()
        ),
        dim=1,
    )
    rotate_(x, cos, sin)
    assert_near(x, expected.transpose(1, 2).reshape(x.shape))
    values = buffer.view(batch, length, -1, dim).transpose(1, 2)[:, queries + keys :]
    assert torch.equal(values.double(), before[:, queries + keys :])

    dout = random(*x.shape, dtype=dtype, seed=1)
    grad = dout.double().view(batch, length, queries + keys, dim).transpose(1, 2)
    (gradient,) = torch.autograd.grad(expected, before, grad)
    rotate_(dout, cos, sin, inverse=True)
    assert_near(dout, gradient[:, : queries + keys].transpose(1, 2).reshape(x.shape))


def test_rotation_of_a_packed_row_of_a_part_of_each_head_by_a_scaled_table() -> None:
    """One row of angles a token (positions restart at documents), and YaRN's factor; the transpose, not the inverse."""
    positions = torch.tensor([0, 1, 2, 0, 1, 0, 1])
    cos, sin = (1.5 * table for table in angles(positions, 32, torch.float32))
    x = random(7, 2, 48)
    before = x.clone().requires_grad_()
    expected = before[None, ..., :32].transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(expected, expected, cos[None], sin[None])
    rotate_(x[..., :32], cos, sin)
    assert_near(x[..., :32], expected[0].transpose(0, 1))
    assert torch.equal(x[..., 32:], before[..., 32:])
    dout = random(7, 2, 32, seed=1)
    (gradient,) = torch.autograd.grad(expected, before, dout.transpose(0, 1)[None])
    assert_near(rotate_(dout, cos, sin, inverse=True), gradient[..., :32])
    with pytest.raises(ValueError, match="multiple"):
        rotate_(x, cos[:3], sin[:3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_join_into_rows_and_some_turn_on_their_way(dtype: torch.dtype) -> None:
    """Three tensors of other strides each, as the backward of an attention gives them; against doing it in steps."""
    batch, length, dim = 2, 5, 48
    q = random(batch, length, 4, dim, dtype=dtype).transpose(1, 2)
    k, v = random(batch, 2, length, dim, dtype=dtype), random(batch, 2, dim, length, dtype=dtype).mT.contiguous()
    cos, sin = angles(torch.arange(length), dim, torch.float32)
    for parts, table, inverse in (((q, k, v), (cos, sin), True), ((q, k, v), (cos, sin), False), ((q,), None, False)):
        expected = torch.cat([part.transpose(1, 2).reshape(batch * length, -1) for part in parts], dim=1)
        if table is not None:
            rotate_(expected[:, : 6 * dim].unflatten(1, (-1, dim)), *table, inverse)
        out, untouched = strided(batch * length, expected.shape[1], dtype)
        join_heads(out, *parts, angles=table, inverse=inverse)
        assert torch.equal(out, expected)
        untouched()
    with pytest.raises(ValueError, match="do not fill"):
        join_heads(out, q, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [(7,), (4, 9), (3, 5, 2)])
def test_factors_are_joined_scaled_and_padded_with_zeros(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs, outputs, padded = 72, (40, 16, 24)[: len(ranks)], 24
    parts, row, rank = [], 0, 2
    for number, (r, n) in enumerate(zip(ranks, outputs, strict=True)):
        single = torch.float64 if dtype == torch.float64 else torch.float32
        a, b = random(r, inputs, dtype=single, seed=number), random(n, r, dtype=single, seed=9 + number)
        parts.append(Factors(a, b, row, rank, 0.5 + number))
        row, rank = row + n, rank + r
    a_PK, beside_a = strided(padded, inputs, dtype)
    b_NP, beside_b = strided(row, padded, dtype)
    place_factors(parts, a_PK, b_NP)
    expected_a, expected_b = torch.zeros(padded, inputs).double(), torch.zeros(row, padded).double()
    for part in parts:
        expected_a[part.rank : part.rank + len(part.a_rK)] = part.a_rK
        block = expected_b[part.row : part.row + len(part.b_Nr)]
        block[:, part.rank : part.rank + part.b_Nr.shape[1]] = part.b_Nr.double() * part.scale
    for actual, expected in ((a_PK, expected_a), (b_NP, expected_b)):
        assert_near(actual, expected)
        assert torch.equal(actual == 0, expected == 0)
    beside_a()
    beside_b()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [40, 1100])
def test_swiglu_and_its_gradient(features: int, dtype: torch.dtype) -> None:
    rows = 3
    both = 3 * random(rows, 2 * features, dtype=dtype)
    gate, up = both[:, :features], both[:, features:]
    out, untouched = strided(rows, features, dtype)
    swiglu_(gate, up, out)
    g, u = leaf(gate), leaf(up)
    expected = silu(g) * u
    assert_near(out, expected)
    untouched()

    dh = random(rows, features, dtype=dtype, seed=1)
    dgate, dup = torch.autograd.grad(expected, (g, u), dh.double())
    grads, untouched = strided(rows, 2 * features, dtype)
    again = torch.empty_like(out)
    swiglu_backward(dh, gate, up, grads[:, :features], grads[:, features:], again)
    assert_near(grads[:, :features], dgate)
    assert_near(grads[:, features:], dup)
    assert torch.equal(again, out)
    untouched()
    swiglu_backward(dh, gate, up, gate, up)
    assert torch.equal(both, grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [None, 4, 100])
def test_loss_and_gradient_of_the_head(chunk: int | None, dtype: torch.dtype) -> None:
    """Chunks that divide the rows and that do not; a target of -100 counts for nothing; a scaled loss."""
    rows, hidden_size, vocabulary = 11, 16, 300
    hidden = random(rows, hidden_size, dtype=dtype).requires_grad_()
    weight = random(vocabulary, hidden_size, dtype=dtype, seed=1)
    targets = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(0))
    targets[3] = -100
    targets[5] = vocabulary - 1
    loss = linear_cross_entropy(hidden, weight, targets, chunk)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (loss / 3).backward()

    h = leaf(hidden)
    expected = cross_entropy(h @ weight.double().t(), targets, reduction="sum")
    (expected / 3).backward()
    assert_near(loss, expected, TOLERANCE[dtype] * 10 if dtype == torch.float64 else TOLERANCE[dtype])
    assert h.grad is not None
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype
    assert (hidden.grad[3] == 0).all()
    # In bf16 the logits are rounded (by 2^-9 of about 4), and so are the probabilities made from them.
    assert_near(hidden.grad, h.grad, 3e-2 if dtype == torch.bfloat16 else 10 * TOLERANCE[dtype])


def test_a_vocabulary_of_several_blocks_a_row() -> None:
    """The kernel goes through a row of logits in blocks; targets lie in the first, the last and at an edge."""
    logits, targets = 4 * random(4, 20000), torch.tensor([0, 19999, 8191, 8192])
    expected = leaf(logits)
    loss = cross_entropy(expected, targets, reduction="none")
    loss.sum().backward()
    each = torch.empty(4)
    head.cross_entropy_(logits, targets, each, gradient=True)
    assert_near(each, loss)
    assert expected.grad is not None
    assert_near(logits, expected.grad)


def test_the_gradient_is_scaled_in_fp32() -> None:
    """1/3 is not a bf16 number: rounded to one it would bend every gradient of a step by the same 0.1 %."""
    hidden, weight = random(64, 32, dtype=torch.bfloat16).requires_grad_(), random(50, 32, dtype=torch.bfloat16)
    targets = torch.arange(64) % 50
    (whole,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden)
    (third,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets) / 3, hidden)
    assert torch.equal(third, (whole.float() / 3).bfloat16())


def test_no_trained_token_means_no_loss_and_a_zero_gradient() -> None:
    hidden, weight = random(3, 8).requires_grad_(), random(10, 8)
    loss = linear_cross_entropy(hidden[:0], weight, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()


def test_a_gathered_head_is_asked_for_once_and_not_kept() -> None:
    asked: list[int] = []
    weight, targets = random(10, 8), torch.arange(9)

    def gather() -> Tensor:
        asked.append(1)
        return gathered

    gathered = weight.clone()
    hidden = random(9, 8).requires_grad_()
    loss = linear_cross_entropy(hidden, gather, targets, chunk=4)
    gathered.zero_()
    loss.backward()
    expected = hidden.detach().clone().requires_grad_()
    cross_entropy(expected @ weight.t(), targets, reduction="sum").backward()
    assert asked == [1]
    assert hidden.grad is not None
    assert expected.grad is not None
    assert_near(hidden.grad, expected.grad)


class Sizes(TorchDispatchMode):
    """The sizes of what every operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.matmuls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.seen.append(result.numel())
        self.matmuls += "mm" in str(func)
        return result


def test_logits_are_never_held_whole_and_evaluation_makes_no_gradient() -> None:
    rows, vocabulary, chunk = 64, 500, 16
    hidden, weight, targets = random(rows, 8).requires_grad_(), random(vocabulary, 8), torch.arange(rows)
    with Sizes() as training:
        linear_cross_entropy(hidden, weight, targets, chunk)
    if not INTERPRETED:  # which copies what it works on, byte by byte
        assert max(training.seen) == chunk * vocabulary
    with torch.no_grad(), Sizes() as evaluation:
        loss = linear_cross_entropy(hidden, weight, targets, chunk)
    assert not loss.requires_grad
    assert (training.matmuls, evaluation.matmuls) == (8, 4)


@pytest.mark.parametrize("vocabulary", [32000, 49152, 128256, 151936, 262144])
@pytest.mark.parametrize("rows", [1, 128, 2047, 2048, 16384, 131072])
def test_a_chunk_holds_half_a_gibibyte(vocabulary: int, rows: int) -> None:
    chunk = chunk_rows(rows, vocabulary, 2)
    assert chunk % 128 == 0
    assert chunk * vocabulary * 2 <= 2**30
    chunks = -(-rows // chunk)
    assert chunks * chunk - rows < 128 * chunks  # the last chunk is as full as the others
    if chunks > 1:
        assert chunk * vocabulary * 2 >= 2**28


def test_on_a_cpu_the_reference_runs_and_under_the_interpreter_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[str] = set()
    launch = Kernel.__getitem__

    def note(kernel: Kernel, grid: tuple[int, ...]) -> Callable[..., Any]:
        launched.add(f"{kernel.function.__module__.split('.')[-1]}.{kernel.function.__name__}")
        return launch(kernel, grid)

    monkeypatch.setattr(Kernel, "__getitem__", note)
    for dtype in (torch.float32, torch.float64):
        x, weight, stats = random(2, 64, dtype=dtype), random(64, dtype=dtype), torch.empty(2, dtype=dtype)
        out, other = torch.empty_like(x), torch.empty_like(x)
        packed, state = bnb.quantize_4bit(x.float(), quant_type="nf4")
        dequantize_4bit_into(out, packed, state.absmax, state.code, 64)
        rms_norm(x, weight, 1e-5, out, stats)
        rms_norm_backward(x, x, weight, stats, None, out)
        rotate_(out.view(2, 1, 64), x, x)
        join_heads(out, x.view(1, 1, 2, 64))
        place_factors([Factors(x[:1], x[:, :1].contiguous(), 0, 0, 1.0)], out[:1], other[:, :1])
        swiglu_(x, x, out)
        swiglu_backward(x, x, x, out, other)
        linear_cross_entropy(x, x, torch.tensor([0, 1]))
        every = {
            f"{module.__name__.split('.')[-1]}.{name}"
            for module in (nf4, rmsnorm, rope, swiglu, factors, head)
            for name, value in vars(module).items()
            if isinstance(value, Kernel)
        }
        assert len(every) == 9
        assert launched == (every if INTERPRETED and dtype == torch.float32 else set())
        launched.clear()


def test_triton_is_imported_only_for_a_kernel() -> None:
    modules = ("nf4", "rmsnorm", "rope", "swiglu", "factors", "linear_cross_entropy")
    code = "import sys, torch; before = 'triton' in sys.modules; import "
    code += ", ".join(f"qlora_dist.kernels.{name}" for name in modules)
    code += "; assert before or 'triton' not in sys.modules, 'triton was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
