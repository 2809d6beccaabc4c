"""FP8 on a real card: kernels against their references, a model's gradients against float64, and how fast it all is.

The times of the kernels and GEMMs at Llama 8B's shapes go to $OUT/fp8.json where OUT is set.
"""

import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from qlora_dist.kernels.fp8 import E4M3, Scaled, quantize_rows, scaled_product, weight_into, weight_scales
from qlora_dist.kernels.low_rank import add_low_rank_
from qlora_dist.kernels.nf4 import NestedAbsmax, Packed, dequantize_4bit_into, pack
from qlora_dist.model.block import KEEP_ALL, RECOMPUTE_ALL, Plan
from qlora_dist.model.fused import fuse, set_plan
from tests.unit.test_fp8_block import by_hand
from tests.unit.test_fused_block import ADAPTERS, adapted, losses, with_float64_norms

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CAPABLE, reason="needs CUDA and FP8")]

H, F, PAD = 4096, 14336, 64
BF16 = torch.bfloat16


def random(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def packed(rows: int, columns: int, nested: bool = True) -> Packed:
    bnb = pytest.importorskip("bitsandbytes.functional")
    values, state = bnb.quantize_4bit(random(rows, columns, scale=0.02), quant_type="nf4", compress_statistics=nested)
    twice = None
    if nested:
        twice = NestedAbsmax(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    return pack(values, state.absmax, state.code, 64, twice)


def on_cpu(source: Packed) -> Packed:
    nested = None
    if source.nested is not None:
        absmax2, code2, offset, blocksize2 = source.nested
        nested = NestedAbsmax(absmax2.cpu(), code2.cpu(), offset.cpu(), blocksize2)
    return Packed(source.packed_B.cpu(), source.absmax.cpu(), source.code.cpu(), source.blocksize, nested)


def assert_same_e4m3(found: Tensor, wanted: Tensor) -> None:
    """Bit for bit; before sm_90 Triton rounds to fp16 first, so a few numbers are one step off."""
    if torch.cuda.get_device_capability() >= (9, 0):
        assert torch.equal(found.view(torch.uint8).cpu(), wanted.view(torch.uint8).cpu())
        return
    differ = found.cpu().float() != wanted.cpu().float()
    assert differ.float().mean() < 0.01
    assert error(found.cpu().float(), wanted.cpu().float()) < 0.01


@pytest.mark.parametrize("columns", [64, 4096, 6144, 14336, 28672, 57344])
def test_rows_equal_the_reference(columns: int) -> None:
    x = random(37, columns + PAD)[:, :columns] * torch.logspace(-12, 6, 37, device="cuda")[:, None].to(BF16)
    x[5] = 0
    found, wanted = quantize_rows(x), quantize_rows(x.cpu())
    assert torch.equal(found.scale_R.cpu(), wanted.scale_R)
    assert_same_e4m3(found.values_RC, wanted.values_RC)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_seen_in_the_product(bad: float) -> None:
    x = random(64, 256)
    x[3, 7] = bad
    product = scaled_product(quantize_rows(x), quantize_rows(random(128, 256)), random(64, 128))
    finite = product.isfinite()
    assert not finite[3].any()
    assert finite[:3].all()
    assert finite[4:].all()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", ["single", "double", "bf16"])
@pytest.mark.parametrize("shape", [(6144, 4096), (1024, 4096), (4096, 14336), (48, 80), (144, 528)])
def test_weights_equal_the_reference(shape: tuple[int, int], kind: str, turned: bool) -> None:
    """Into columns or rows of a wider buffer, as the parts of a projection lie in theirs."""
    source: Packed | Tensor = random(*shape) if kind == "bf16" else packed(*shape, nested=kind == "double")
    plain = dequantize_4bit_into(random(*shape), *source) if isinstance(source, Packed) else source
    scale = weight_scales(plain)[turned]
    rows, columns = shape[::-1] if turned else shape
    buffer = torch.zeros(rows, columns + 32, dtype=torch.uint8, device="cuda")
    found = weight_into(buffer.view(E4M3)[:, 16 : 16 + columns], source, scale, turned)
    reference = on_cpu(source) if isinstance(source, Packed) else source.cpu()
    wanted = weight_into(torch.empty(rows, columns, dtype=E4M3), reference, scale.cpu(), turned)
    assert_same_e4m3(found, wanted)
    assert not buffer[:, :16].any()
    assert not buffer[:, 16 + columns :].any()


@pytest.mark.parametrize("tokens", [1, 77, 300, 4096])
@pytest.mark.parametrize("wide", [False, True], ids=["contiguous", "inside wider rows"])
def test_the_product_of_the_rounded_numbers(tokens: int, wide: bool) -> None:
    """FP8's fast accumulation keeps some 13 bits; a wrong scale or stride is off by all."""
    a, b = quantize_rows(random(tokens, H)), quantize_rows(random(6144, H, scale=0.02))
    buffer = torch.zeros(tokens, 6144 + PAD, dtype=BF16, device="cuda")
    out = buffer[:, :6144] if wide else random(tokens, 6144)
    assert scaled_product(a, b, out).data_ptr() == out.data_ptr()
    exact = (a.values_RC.double() * a.scale_R[:, None]) @ (b.values_RC.double() * b.scale_R[:, None]).t()
    assert error(out, exact) < 1e-2
    assert not buffer[:, 6144:].any()


@pytest.mark.parametrize(("rank", "outputs"), [(64, 28672), (192, 6144), (64, 4096), (16, 80)])
def test_low_rank_sum_against_float64(rank: int, outputs: int) -> None:
    tokens = 515
    for turned in (False, True):
        p = random(tokens, rank + PAD)[:, :rank]
        b = random(rank, outputs).t() if turned else random(outputs, rank)
        bias, residual = random(outputs), random(tokens, outputs)
        for extras in ((), (bias, residual), (None, residual), (bias,)):
            buffer = random(tokens, outputs + PAD)
            y, beside = buffer[:, :outputs], buffer[:, outputs:].clone()
            wanted = y.double() + p.double() @ b.double().t()
            for added in extras:
                wanted += 0 if added is None else added.double()
            assert error(add_low_rank_(y, p, b, *extras), wanted) < 2e-3
            assert torch.equal(buffer[:, outputs:], beside)


PLANS = {"keep": KEEP_ALL, "recompute": RECOMPUTE_ALL, "weights kept": Plan(weights=True)}


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_are_as_far_from_float64_as_the_arithmetic_makes_them(plan: str) -> None:
    """Two layers in bf16 and FP8 on the GPU, and the same roundings by hand in float64, against neither."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=64, attn_implementation="sdpa",
    )  # fmt: skip
    rounded = adapted(config, BF16, ADAPTERS["all linear"])
    exact = with_float64_norms(deepcopy(rounded).double())
    torch.manual_seed(4)
    inputs = {"input_ids": torch.randint(0, 61, (2, 11))}
    _, wanted, wanted_dx = losses(exact, inputs, fused=False)
    _, emulated, emulated_dx = losses(by_hand(exact), inputs, fused=False)
    model = rounded.cuda()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    set_plan(fuse(model, compute="fp8"), PLANS[plan])
    with torch.device("cuda"):
        for _ in range(2):
            _, grads, dx = losses(model, {"input_ids": inputs["input_ids"].cuda()}, fused=True)

    def together(found: dict[str, Tensor]) -> Tensor:
        return torch.cat([found[name].double().cpu().flatten() for name in wanted])

    budget = 1.5 * error(together(emulated), together(wanted))
    assert 0.01 < budget < 0.3
    assert error(together(grads), together(wanted)) < budget
    assert error(dx.cpu(), wanted_dx) < 1.5 * error(emulated_dx, wanted_dx)


def test_nothing_waits_for_the_device() -> None:
    x, source, residual = random(256, H), packed(H, H), random(256, H)
    scales = weight_scales(random(H, H))
    out = torch.empty(H, H, dtype=E4M3, device="cuda")
    scaled_product(quantize_rows(x), Scaled(out, scales[0]), residual)  # cuBLAS makes its workspace
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = quantize_rows(x)
        for turned in (False, True):
            weight_into(out, source, scales[turned], turned)
            y = scaled_product(rows, Scaled(out, scales[turned]), x)
        add_low_rank_(y, x[:, :64], random(H, 64), residual_MN=residual)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def milliseconds(run: Callable[[], Any]) -> float:
    testing = pytest.importorskip("triton.testing")
    return testing.do_bench(run, warmup=50, rep=300, return_mode="median")


# Of a layer, outputs and inputs of each projection and the padded rank of its adapters.
LAYER = {"qkv": (6144, H, 192), "output": (H, H, 64), "gate_up": (2 * F, H, 128), "down": (H, F, 64)}
TOKENS = 16384


def copy_speed() -> float:
    """GB/s of a copy of 1 GiB."""
    both = torch.empty(2**30, dtype=BF16, device="cuda")
    return 4 * 2**29 / milliseconds(lambda: both[: 2**29].copy_(both[2**29 :])) / 1e6


def timed_product(n: int, k: int, rank: int, turned: bool, residual_added: bool, copied: float) -> dict[str, Any]:
    """One projection one way: bf16's dequantisation and GEMM with the LoRA branch in it, and all that FP8 has instead.

    turned: the backward.
    """
    inputs, outputs = (n, k) if turned else (k, n)
    source, given, result = packed(n, k), random(TOKENS, inputs + rank), random(TOKENS, outputs)
    plain = torch.empty(n, k, dtype=BF16, device="cuda")
    scale = weight_scales(dequantize_4bit_into(plain, *source))[turned]
    weight = torch.empty(outputs, inputs, dtype=E4M3, device="cuda")
    rows, scaled = quantize_rows(given[:, :inputs]), Scaled(weight_into(weight, source, scale, turned), scale)
    low, factor = given[:, inputs:], random(rank, outputs).t() if turned else random(outputs, rank)
    wide = random(inputs + rank, outputs) if turned else random(outputs, inputs + rank).t()
    residual = random(TOKENS, outputs) if residual_added else None
    passes: dict[str, tuple[Callable[[], Any], float]] = {
        "nf4_to_bf16": (lambda: dequantize_4bit_into(plain, *source), 2.52 * n * k),
        "quantise": (lambda: quantize_rows(given[:, :inputs]), 3.0 * TOKENS * inputs),
        "nf4_to_fp8": (lambda: weight_into(weight, source, scale, turned), 1.52 * n * k),
        "add_low_rank": (
            lambda: add_low_rank_(result, low, factor, residual_MN=residual),
            2.0 * TOKENS * ((3 if residual_added else 2) * outputs + rank),
        ),
        "addmm": (lambda: torch.addmm(result, low, factor.t(), out=result), 2.0 * TOKENS * (2 * outputs + rank)),
    }
    found: dict[str, Any] = {}
    for what, (run, moved) in passes.items():
        ms = milliseconds(run)
        found[what] = {"ms": ms, "gb_s": moved / ms / 1e6, "of_copy": moved / ms / 1e6 / copied}
    found["bf16_gemm_ms"] = milliseconds(lambda: torch.mm(given, wide, out=result))
    found["fp8_gemm_ms"] = milliseconds(lambda: scaled_product(rows, scaled, result))
    found["fp8_tflops"] = 2e-9 * TOKENS * n * k / found["fp8_gemm_ms"]
    quantised = found["fp8_gemm_ms"] + found["quantise"]["ms"]
    found["bf16_all_ms"] = found["bf16_gemm_ms"] + found["nf4_to_bf16"]["ms"]
    found["fp8_all_ms"] = quantised + found["nf4_to_fp8"]["ms"] + found["add_low_rank"]["ms"]
    found["speedup_with_quantisation"] = found["bf16_gemm_ms"] / quantised
    found["speedup_of_all"] = found["bf16_all_ms"] / found["fp8_all_ms"]
    return found


@pytest.mark.slow
def test_how_fast_it_is_at_llama_8b() -> None:
    """16,384 tokens: each pass in ms and GB/s, each GEMM beside bf16's, and what a layer's GEMMs come to."""
    copied = copy_speed()
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "tokens": TOKENS, "copy_gb_s": copied,
        "forward": {}, "backward": {},
    }  # fmt: skip
    for name, (n, k, rank) in LAYER.items():
        for way in ("forward", "backward"):
            residual_added = way == "forward" and name in ("output", "down")
            record[way][name] = timed_product(n, k, rank, way == "backward", residual_added, copied)
    parts = [part for way in ("forward", "backward") for part in record[way].values()]
    record["layer"] = {key: sum(part[key] for part in parts) for key in parts[0] if key.endswith("_ms")}
    record["layer"]["speedup_of_all"] = record["layer"]["bf16_all_ms"] / record["layer"]["fp8_all_ms"]
    print(json.dumps(record, indent=1))
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "fp8.json").write_text(json.dumps(record, indent=1) + "\n")
    assert record["layer"]["speedup_of_all"] > 1.2
