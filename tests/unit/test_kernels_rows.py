"""Rows of stored weights against bitsandbytes and float64, by the references and, interpreted, by the kernels."""

import os
import subprocess
import sys
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qlora_dist.kernels import rows
from qlora_dist.kernels.linear_cross_entropy import Slices, linear_cross_entropy
from qlora_dist.kernels.nf4 import NestedAbsmax
from qlora_dist.kernels.rows import dequantize_8bit_into, gather_rows, gather_rows_4bit, gather_rows_8bit

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def asked(vocabulary: int) -> Tensor:
    """First, last, twice the same, out of order."""
    return torch.tensor([vocabulary - 1, 0, 7, 7, 3, vocabulary - 2])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("hidden", [64, 100, 4099])
def test_rows_are_the_weights_own(dtype: torch.dtype, hidden: int) -> None:
    weight, index = random(37, hidden, dtype=dtype), asked(37)
    assert torch.equal(gather_rows(weight, index), weight[index])
    assert gather_rows(weight, index[:0]).shape == (0, hidden)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("hidden", [64, 100])
def test_int8_rows_are_products_in_fp32(dtype: torch.dtype, hidden: int) -> None:
    weight = torch.randint(-127, 128, (37, hidden), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale, index = random(37).abs(), asked(37)
    # Exact in float64, then rounded to fp32, as a product in fp32 is, and to what is asked for.
    wanted = rounded((weight.double() * scale.double()[:, None]).float(), dtype)
    assert torch.equal(gather_rows_8bit(weight, scale, index, dtype), wanted[index])
    assert torch.equal(
        dequantize_8bit_into(torch.empty(20, hidden, dtype=dtype), weight[11:31], scale[11:31]), wanted[11:31]
    )


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`; Triton's interpreter cuts mantissas off where the GPU and PyTorch round them."""
    if dtype == torch.bfloat16 and INTERPRETED:
        x = (x.view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("shape", "blocksize"), [((530, 64), 64), ((37, 100), 64), ((31, 33), 64), ((9, 1100), 128)])
def test_4bit_rows_are_bitsandbytes_bits(shape: tuple[int, int], blocksize: int, nested: bool) -> None:
    """Rows that begin inside blocks and inside bytes, and nested blocks that end inside; float32 as it comes."""
    weight, index = random(*shape), asked(shape[0])
    # bitsandbytes' CPU kernel needs whole blocks in a row.
    packed, state = bnb.quantize_4bit(
        weight.view(1, -1), blocksize=blocksize, compress_statistics=nested, quant_type="nf4"
    )
    wanted = dequantised(packed, state, shape)
    found = gather_rows_4bit(
        packed, state.absmax, state.code, blocksize, nested_state(state), index, shape[1], torch.float32
    )
    assert torch.equal(found, wanted[index])
    if shape[1] % blocksize == 0:
        assert torch.equal(found, bnb.dequantize_4bit(packed, state).view(shape)[index])


def nested_state(state: Any) -> NestedAbsmax | None:
    if not state.nested:
        return None
    return NestedAbsmax(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)


def dequantised(packed: Tensor, state: Any, shape: tuple[int, int]) -> Tensor:
    """By bitsandbytes' description: code[nibble] * absmax, in float32, the high nibble first."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    nibbles = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), 1).view(-1)[: shape[0] * shape[1]]
    return (state.code[nibbles.long()] * absmax.repeat_interleave(state.blocksize)[: nibbles.numel()]).view(shape)


@pytest.mark.skipif(not INTERPRETED, reason="the references raise IndexError, as PyTorch does")
def test_a_token_that_is_none_gives_nan_and_reads_nothing() -> None:
    weight = random(5, 64)
    beyond = torch.tensor([5, -1, 2**40])
    assert gather_rows(weight, beyond).isnan().all()
    assert gather_rows_8bit(weight.to(torch.int8), random(5), beyond, torch.float32).isnan().all()
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    assert gather_rows_4bit(packed, state.absmax, state.code, 64, None, beyond, 64, torch.float32).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [128, 50, 7])
def test_head_in_slices_is_the_head(dtype: torch.dtype, step: int) -> None:
    """Slices that end inside the vocabulary, over several chunks of rows; bf16 sums their products in fp32."""
    weight, targets = random(128, 32, dtype=dtype), torch.tensor([5, 127, 0, -100, 64, 9, 30])
    shared = torch.empty(step, 32, dtype=dtype)

    def make(first: int, last: int) -> Tensor:
        return shared[: last - first].copy_(weight[first:last])

    results = []
    for given in (weight, Slices(128, dtype, step, make), lambda: Slices(128, dtype, step, make)):
        hidden = random(7, 32, dtype=dtype).requires_grad_()
        loss = linear_cross_entropy(hidden, given, targets, chunk=3)
        loss.backward()
        results.append((loss.detach(), hidden.grad))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype]
    (loss, grad), *others = results
    for other_loss, other_grad in others:
        # The logits are the same products of the same rows.
        torch.testing.assert_close(other_loss, loss, rtol=min(tolerance, 1e-6), atol=0)
        assert (other_grad - grad).norm() <= tolerance * grad.norm()


def test_values_in_the_interpreter() -> None:
    if INTERPRETED:
        return
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "not compile"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "passed" in ran.stdout


if not INTERPRETED:
    pytest.importorskip("triton")
    from tests.unit.test_kernels_triton import compiles, empty  # noqa: F401

    def test_kernels_compile(compiles: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
        """At Llama 8B's shapes; weights are read and rows written 16 bytes at a time."""
        _, made = compiles
        monkeypatch.setattr(rows, "runs_on_triton", lambda x: True)
        index = empty(4096, dtype=torch.int64)
        scale = empty(128256, dtype=torch.float32)
        whole, whole8 = empty(128256, 4096), empty(128256, 4096, dtype=torch.int8)
        for launch in (
            lambda: gather_rows(whole, index),
            lambda: gather_rows_8bit(whole8, scale, index, torch.bfloat16),
            lambda: dequantize_8bit_into(whole, whole8, scale),
        ):
            launch()
            ptx = made["rows._rows"].asm["ptx"]
            assert "ld.global.v4.b32" in ptx
            assert "st.global.v4.b32" in ptx
        packed = empty(128256 * 2048, 1, dtype=torch.uint8)
        blocks = 128256 * 64
        absmax = empty(blocks, dtype=torch.uint8)
        nested = NestedAbsmax(*(empty(n, dtype=torch.float32) for n in (blocks // 256, 256, 1)), 256)
        gather_rows_4bit(packed, absmax, scale[:16], 64, nested, index, 4096, torch.bfloat16)
        assert "fma" not in made["rows._rows_4bit"].asm["ptx"]
        gather_rows_4bit(packed, scale, scale[:16], 64, None, index, 4096, torch.float16)
