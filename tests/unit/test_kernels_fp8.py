"""The FP8 ops and the sum that goes with them, against float64. As test_kernels.py these run the references on a CPU,

and the Triton kernels in Triton's interpreter under TRITON_INTERPRET=1.
"""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qlora_dist.kernels.fp8 import E4M3, Scaled, quantize_rows, scaled_product, weight_into, weight_scales
from qlora_dist.kernels.low_rank import add_low_rank_
from qlora_dist.kernels.nf4 import Packed, pack
from tests.unit.test_kernels import INTERPRETED, assert_near, nested_state, random, strided


def values_of(scaled: Scaled) -> Tensor:
    return scaled.values_RC.double() * scaled.scale_R.double()[:, None]


def assert_rounded(found: Tensor, x: Tensor, scale: Tensor) -> None:
    """Each number is the nearest of e4m3's over the scale of its row, of all there are; but for ties in fp32."""
    every = torch.arange(256, dtype=torch.uint8).view(E4M3).double()
    every = every[every.isfinite()]
    ratio, found = x.double() / scale.double()[:, None], found.double()
    distance = (ratio[..., None] - every).abs()
    if not INTERPRETED:
        assert ((found - ratio).abs() <= distance.amin(-1) + 1e-6 * ratio.abs()).all()
        return
    # Triton's interpreter rounds by a step of an eighth at most, and loses what is carried into the exponent.
    wanted = every[distance.argmin(-1)]
    carried = (2 * found - ratio).abs() <= ratio.abs() / 16
    assert (carried | ((found - wanted).abs() <= wanted.abs() / 8 + 2**-9)).all()


def packed_weight(rows: int, columns: int, nested: bool, blocksize: int = 64) -> tuple[Packed, Tensor]:
    """A weight in 4 bits, and its values in fp32."""
    weight = random(rows, columns) * torch.logspace(-2, 0, rows)[:, None]
    values, state = bnb.quantize_4bit(
        weight.view(1, -1), blocksize=blocksize, quant_type="nf4", compress_statistics=nested
    )
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    nibbles = torch.stack((values >> 4, values & 15), dim=-1).view(-1).int()
    exact = state.code[nibbles] * absmax.repeat_interleave(blocksize)[: weight.numel()]
    return pack(values, state.absmax, state.code, blocksize, nested_state(state)), exact.view(rows, columns)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_rounded_to_the_nearest_of_their_own_scale(dtype: torch.dtype) -> None:
    """Rows of very different size, one of zeros, from a strided view; the interpreter's rounding is its own."""
    x, _ = strided(7, 208, dtype)
    x.copy_(random(7, 208) * torch.logspace(-9, 9, 7)[:, None])
    x[3] = 0
    made = quantize_rows(x)
    assert made.values_RC.is_contiguous()
    largest = x.double().abs().amax(1)
    rows = [0, 1, 2, 4, 5, 6]
    assert_near(made.scale_R[rows], largest[rows] / 448, 1e-6)
    assert values_of(made)[3].count_nonzero() == 0
    assert_rounded(made.values_RC[rows], x[rows], made.scale_R[rows])
    assert torch.equal(made.values_RC.double().abs().amax(1)[rows], torch.full((6,), 448.0, dtype=torch.float64))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's e4m3 has no NaN")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_in_the_product(bad: float) -> None:
    x = random(3, 32)
    x[1, 5] = bad
    product = scaled_product(quantize_rows(x), quantize_rows(random(16, 32)), torch.empty(3, 16))
    assert product.isfinite().all(1).tolist() == [True, False, True]


def test_a_row_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(2, 208)
    whole = quantize_rows(x)
    monkeypatch.setattr("qlora_dist.kernels.fp8.LONGEST_BLOCK", 64)
    parts = quantize_rows(x)
    assert torch.equal(whole.scale_R, parts.scale_R)
    assert torch.equal(whole.values_RC.view(torch.uint8), parts.values_RC.view(torch.uint8))


@pytest.mark.parametrize("turned", [False, True], ids=["as it lies", "turned"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("single", (32, 128)),
        ("double", (32, 128)),
        ("double", (48, 80)),  # rows end inside blocks, and inside tiles
        ("blocks of 4096", (144, 544)),  # more than one tile each way
        ("bf16", (48, 80)),
        ("fp32", (16, 544)),
    ],
)
def test_weights_over_given_scales(kind: str, shape: tuple[int, int], turned: bool) -> None:
    if kind in ("bf16", "fp32"):
        exact = random(*shape, dtype=torch.bfloat16).float()
        source: Packed | Tensor = exact.to(torch.bfloat16) if kind == "bf16" else exact
    else:
        source, exact = packed_weight(*shape, nested=kind == "double", blocksize=4096 if "4096" in kind else 64)
    scales = weight_scales(exact)
    for found, dim in zip(scales, (1, 0), strict=True):
        assert_near(found, exact.double().abs().amax(dim) / 448, 1e-6)
    scale = scales[1] if turned else scales[0]
    buffer = torch.zeros(*(shape[::-1] if turned else shape), dtype=torch.uint8)
    framed = torch.full((buffer.shape[0], buffer.shape[1] + 32), 7, dtype=torch.uint8)
    out = weight_into(framed.view(E4M3)[:, : buffer.shape[1]], source, scale, turned)
    assert_rounded(out, exact.t() if turned else exact, scale)
    assert (framed[:, buffer.shape[1] :] == 7).all()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's e4m3 overflows where a GPU's is cut")
def test_a_scale_that_is_too_small_cuts_and_does_not_overflow() -> None:
    weight = torch.full((16, 16), 2.0)
    out = weight_into(torch.empty(16, 16, dtype=E4M3), weight, torch.full((16,), 1e-3), turned=False)
    assert (out.float() == 448).all()


@pytest.mark.parametrize(("rows", "columns", "message"), [(16, 24, "multiples of 16"), (16, 48, "do not fill")])
def test_sizes_that_do_not_fit_are_refused(rows: int, columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weight_into(torch.empty(rows, columns, dtype=E4M3), torch.ones(16, 32), torch.ones(16), turned=False)


def test_the_product_is_that_of_the_rounded_numbers() -> None:
    a, b = random(5, 64, dtype=torch.float64), random(48, 64, dtype=torch.float64)
    qa, qb = quantize_rows(a), quantize_rows(b)
    out, untouched = strided(5, 48, torch.float64)
    scaled_product(qa, qb, out)
    untouched()
    assert_near(out, values_of(qa) @ values_of(qb).t(), 1e-12)
    # What FP8 costs: two roundings of 4 bits, 2.7 % in norm each, in sums of random sign.
    error = (out - a @ b.t()).norm() / (a @ b.t()).norm()
    assert 0.01 < error < 0.06


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 5, 16, 96])
@pytest.mark.parametrize("extras", [False, True], ids=["alone", "bias and residual"])
def test_low_rank_sum(rank: int, dtype: torch.dtype, extras: bool) -> None:
    """As the forward has it, B by rows, and as the backward, where A lies the other way round."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bf16 as integers")
    tokens, outputs = 130, 72
    for turned in (False, True):
        y, untouched = strided(tokens, outputs, dtype)
        y.copy_(random(tokens, outputs))
        p = random(tokens, rank + 8, dtype=dtype, seed=1)[:, :rank]
        b = random(rank, outputs, dtype=dtype, seed=2).t() if turned else random(outputs, rank, dtype=dtype, seed=2)
        bias, residual = random(outputs, dtype=dtype, seed=3), random(tokens, outputs, dtype=dtype, seed=4)
        wanted = y.double() + p.double() @ b.double().t()
        if extras:
            wanted += bias.double() + residual.double()
        assert add_low_rank_(y, p, b, *((bias, residual) if extras else ())) is y
        assert_near(y, wanted)
        untouched()
