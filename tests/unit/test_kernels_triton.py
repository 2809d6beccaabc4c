"""The Triton kernels without a GPU: their values in Triton's interpreter, and that they compile for what people own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_dist.kernels import factors, fp8, linear_cross_entropy, low_rank, nf4, rmsnorm, rope, swiglu
from qlora_dist.kernels.launch import Kernel

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

# A100; RTX 4090, L4 and L40S (99 KB of shared memory a program, the least of the three); H100 and H200.
ARCHITECTURES = [80, 89, 90]
SHARED_BYTES = 99 * 1024
MODULES = [factors, fp8, low_rank, nf4, rmsnorm, rope, swiglu, linear_cross_entropy]


def test_values_in_the_interpreter() -> None:
    """The tests of the references once more, in a process whose public functions take the kernels instead."""
    tests = [Path(__file__).with_name(name) for name in ("test_kernels.py", "test_kernels_fp8.py")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "not imported_only",
        *map(str, tests),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr


class Architecture:
    """As much of a driver as compiling needs: what it compiles for. A device's number keeps compiled kernels apart."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


Compiled = dict[str, Any]


@pytest.fixture(params=ARCHITECTURES, ids=lambda capability: f"sm_{capability}")
def compiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[int, Compiled]:
    """The public functions take meta tensors and compile what they would launch: (architecture, name -> the last)."""
    made: Compiled = {}

    def compile_only(kernel: Kernel, grid: tuple[int, ...]) -> Callable[..., None]:
        def check(*args: Any, **options: Any) -> None:
            compiled = kernel.jit.warmup(*args, grid=grid, **options)
            name = f"{kernel.function.__module__.split('.')[-1]}.{kernel.function.__name__}"
            assert compiled.metadata.shared <= SHARED_BYTES, f"{name}: {compiled.metadata.shared} bytes shared"
            assert compiled.metadata.target.arch == request.param
            assert f".target sm_{request.param}" in compiled.asm["ptx"]
            made[name] = compiled

        return check

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(Kernel, "__getitem__", compile_only)
    for module in MODULES:
        monkeypatch.setattr(module, "runs_on_triton", lambda x: True)
    monkeypatch.setattr(driver, "_active", Architecture(request.param))
    return request.param, made


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm(features: int, dtype: torch.dtype, residual: bool, backward: bool) -> None:
    x, out = empty(4096, features, dtype=dtype), empty(4096, features + 64, dtype=dtype)[:, :features]
    stats, weight, added = empty(4096, dtype=torch.float32), empty(features, dtype=dtype), x if residual else None
    if backward:
        rmsnorm.rms_norm_backward(x, x, weight, stats, added, out)
    else:
        rmsnorm.rms_norm(x, weight, 1e-5, out, stats, added, added)


def dequantise(rows: int, columns: int, dtype: torch.dtype, nested: bool) -> None:
    packed = empty((rows * columns + 1) // 2, 1, dtype=torch.uint8)
    blocks, single = -(-rows * columns // 64), torch.float32
    absmax2, code2, offset = (empty(n, dtype=single) for n in (-(-blocks // 256), 256, 1))
    absmax = empty(blocks, dtype=torch.uint8 if nested else single)
    state = nf4.NestedAbsmax(absmax2, code2, offset, 256) if nested else None
    out = empty(rows, columns + 64, dtype=dtype)[:, :columns]
    nf4.dequantize_4bit_into(out, packed, absmax, empty(16, dtype=single), 64, state)


def is_vectorised(compiled: Any) -> bool:
    """Whether all bf16 data is read and written 16 bytes at a time."""
    ptx = compiled.asm["ptx"]
    return "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx and "st.global.b16" not in ptx


def test_the_kernels_of_a_block_compile(compiles: tuple[int, Compiled]) -> None:
    """At Llama 8B's shapes, strided as a fused block calls them, and what speed rests on holds."""
    _, made = compiles
    both = empty(4096, 2 * 14336)
    gate, up = both[:, :14336], both[:, 14336:]
    swiglu.swiglu(gate, up, empty(4096, 14336 + 64)[:, :14336])
    swiglu.swiglu_backward(gate, gate, up, gate, up, up)
    rope.rotate_(empty(4096, 48 * 128).view(4096, 48, 128)[:, :40], empty(2048, 128), empty(2048, 128))
    norm(4096, torch.bfloat16, residual=True, backward=False)
    norm(4096, torch.bfloat16, residual=True, backward=True)
    logits, targets = empty(2048, 128256), empty(2048, dtype=torch.int64)
    linear_cross_entropy.cross_entropy_(logits, targets, empty(2048, dtype=torch.float32), gradient=True)
    dequantise(4096, 4096, torch.bfloat16, nested=True)
    heads = [empty(2, 2048, count, 128).transpose(1, 2) for count in (32, 8, 8)]
    rope.join_heads(empty(4096, 6144 + 64)[:, :6144], *heads, angles=(empty(2048, 128), empty(2048, 128)), inverse=True)
    a, b = empty(16, 4096, dtype=torch.float32), empty(4096, 16, dtype=torch.float32)
    factors.place_factors([factors.Factors(a, b, 0, 0, 2.0)], empty(64, 4096), empty(4096, 4096 + 64)[:, 4096:])
    assert len(made) == 9
    for name, compiled in made.items():
        # Factors are small; they are read as they lie.
        assert is_vectorised(compiled) or name in ("nf4._dequantize", "factors._place"), name
    # No exchange between threads (no shared memory), whole 16-byte stores, and no product is fused into a sum.
    ptx = made["nf4._dequantize"].asm["ptx"]
    assert made["nf4._dequantize"].metadata.shared == 0
    assert "st.global.v4.b32" in ptx
    assert "st.global.b16" not in ptx
    assert "mul.rn.f32" in ptx or "mul.f32" in ptx
    assert "fma" not in ptx


def test_other_shapes_and_dtypes_compile(compiles: tuple[int, Compiled]) -> None:
    """What each branch and each block size of the dispatch gives: masked, unmasked, per head, half and single."""
    capability, _ = compiles
    dequantise(33, 31, torch.float32, nested=False)
    dequantise(4096, 4096, torch.float16, nested=False)
    rope.join_heads(empty(10, 2 * 80, dtype=torch.float16), empty(2, 2, 5, 80, dtype=torch.float16))
    parts = [
        factors.Factors(empty(r, 96, dtype=torch.float32), empty(64, r, dtype=torch.float32), 64 * i, 8 * i, 1.0)
        for i, r in enumerate((7, 8, 8))
    ]
    factors.place_factors(parts, empty(64, 96, dtype=torch.float16), empty(192, 64, dtype=torch.float16))
    rope.rotate_(empty(8, 2, 80, dtype=torch.float16), empty(8, 80), empty(8, 80), inverse=True)
    swiglu.swiglu_backward(*(empty(4, 100, dtype=torch.float32) for _ in range(5)))
    loss, targets = empty(4, dtype=torch.float32), empty(4, dtype=torch.int64)
    linear_cross_entropy.cross_entropy_(empty(4, 32000, dtype=torch.float16), targets, loss, gradient=False)
    heads = empty(4096, 40, 128)[:, :32]
    rmsnorm.rms_norm(heads, empty(128), 1e-6, heads, empty(4096 * 32, dtype=torch.float32))
    # Every block size of rms_norm once; on the architecture with the least shared memory all of them.
    sizes = (64, 200, 400, 896, 1536, 3072, 5120, 16384) if capability == 89 else (64, 5120, 16384)
    for features in sizes:
        norm(features, torch.float32 if features == 16384 else torch.bfloat16, residual=True, backward=True)
    for features in sizes[::2]:
        norm(features, torch.float32 if features == 16384 else torch.bfloat16, residual=True, backward=False)


def packed_fp8(rows: int, columns: int, nested: bool, turned: bool) -> None:
    blocks, single = rows * columns // 64, torch.float32
    absmax2, code2, offset = (empty(n, dtype=single) for n in (-(-blocks // 256), 256, 1))
    state = nf4.NestedAbsmax(absmax2, code2, offset, 256) if nested else None
    absmax = empty(blocks, dtype=torch.uint8 if nested else single)
    source = nf4.Packed(empty(rows * columns // 2, dtype=torch.uint8), absmax, empty(16, dtype=single), 64, state)
    shape = (columns, rows) if turned else (rows, columns)
    fp8.weight_into(empty(*shape, dtype=fp8.E4M3), source, empty(shape[0], dtype=single), turned)


def test_the_kernels_of_fp8_compile(compiles: tuple[int, Compiled]) -> None:
    """At the 8B and 70B shapes. An A100 has no FP8, so there only the sum beside the GEMM compiles."""
    capability, made = compiles
    y, p, b = empty(4096, 28672 + 64)[:, :28672], empty(4096, 4096 + 64)[:, 4096:], empty(28672, 64)
    low_rank.add_low_rank_(y, p, b, empty(28672), y)
    low_rank.add_low_rank_(empty(4096, 4096), empty(4096, 192), empty(192, 4096).t())
    if capability == 80:
        return
    # Triton goes by way of fp16 before sm_90.
    rounded = f"cvt.rn.satfinite.e4m3x2.f{32 if capability >= 90 else 16}"
    for columns in (4096, 14336, 28672, 57344):
        fp8.quantize_rows(empty(4096, columns + 64)[:, :columns])
        ptx = made["fp8._rows"].asm["ptx"]
        assert rounded in ptx
        assert "ld.global.v4.b32" in ptx
        assert "st.global.v4.b32" in ptx
    for turned in (False, True):
        for nested in (False, True):
            packed_fp8(6144, 4096, nested, turned)
            ptx = made["fp8._weight"].asm["ptx"]
            assert rounded in ptx
            assert "st.global.v4.b32" in ptx
            assert "st.global.b8" not in ptx
            assert "fma.rn.f32" not in ptx
        scale = empty(4096, dtype=torch.float32)
        fp8.weight_into(empty(4096, 4096, dtype=fp8.E4M3), empty(4096, 4096), scale, turned)
