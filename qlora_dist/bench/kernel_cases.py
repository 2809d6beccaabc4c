"""What each kernel is timed at: its launch, what it must move or compute, and the peers' way to the same result.

M: tokens  H: hidden size  F: intermediate size  V: vocabulary; sizes are a model's own (`Shape`), tokens are given.
Each generator holds its tensors only while its cases are timed.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from qlora_dist.bench.bound import HEAD_ROWS, Shape
from qlora_dist.bench.timing import random
from qlora_dist.kernels.adamw_8bit import AdamW, Moment, adamw_8bit_, map_of
from qlora_dist.kernels.linear_cross_entropy import cross_entropy_, linear_cross_entropy
from qlora_dist.kernels.nf4 import NestedAbsmax, dequantize_4bit_into
from qlora_dist.kernels.rmsnorm import rms_norm, rms_norm_backward
from qlora_dist.kernels.rope import join_heads, rotate_
from qlora_dist.kernels.swiglu import swiglu, swiglu_backward
from qlora_dist.model.projection import Projection

# Columns beside a matrix that rows of a fused layer's buffers have room for: the padded LoRA rank.
ROOM = 64
BF16 = 2
NOT_INSTALLED = "not installed"
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A kernel at a size.

    Attributes:
        moved: bytes that must be read and written; None where computing is what takes time.
        gemms: m, k, n of the GEMMs in it, each with whether it is a forward one; their FLOP and their own times are
            what the kernel is held against.
        peers: who else does it, and how; or why not.
    """

    name: str
    shape: str
    run: Run
    moved: int | None = None
    gemms: list[tuple[int, int, int, bool]] = field(default_factory=list)
    peers: dict[str, Run | str] = field(default_factory=dict)


def from_package(package: str, make: Callable[[], Run]) -> Run | str:
    """The peer's run, made when it is first called (names are asked for on a CPU too), if its package is there."""
    if importlib.util.find_spec(package) is None:
        return NOT_INSTALLED
    once = cache(make)
    return lambda: once()()


def room(rows: int, columns: int, device: str) -> Tensor:
    """A matrix inside wider rows, as the fused layers have them."""
    return torch.zeros(rows, columns + ROOM, dtype=torch.bfloat16, device=device)[:, :columns]


def dequantisation(shape: Shape, tokens: int, device: str) -> Iterator[Case]:
    """NF4 to bf16 with and without double quantisation, gate and up together."""
    for nested in (True, False):
        yield dequantisation_case(2 * shape.intermediate, shape.hidden, nested, device)


def dequantisation_case(rows: int, columns: int, nested: bool, device: str) -> Case:
    """One of them, at a size."""
    import bitsandbytes.functional as bnb

    out = room(rows, columns, device)
    weight = random(rows, columns, device=device, scale=0.02)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    twice = None
    if nested:
        twice = NestedAbsmax(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    return Case(
        "nf4 dequantisation" + (", nested" if nested else ""), f"{rows} x {columns}",
        lambda: dequantize_4bit_into(out, packed, state.absmax, state.code, 64, twice),
        rows * columns // 2 + rows * columns // 64 * (1 if nested else 4) + rows * columns * BF16,
        peers={"bitsandbytes": lambda: bnb.dequantize_4bit(packed, state)},
    )  # fmt: skip


def norms(shape: Shape, tokens: int, device: str) -> Iterator[Case]:
    """RMSNorm, with the residual add, and backward."""
    size, hidden, at = tokens * shape.hidden, shape.hidden, f"{tokens} x {shape.hidden}"
    x, y, total = (random(tokens, hidden, device=device) for _ in range(3))
    out, weight, rstd = room(tokens, hidden, device), random(hidden, device=device), torch.ones(tokens, device=device)

    def liger_forward() -> Run:
        from liger_kernel.ops.rms_norm import rms_norm_forward

        return lambda: rms_norm_forward(x, weight, 1e-5, 0.0, "llama", None)

    def liger_added() -> Run:
        from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

        return lambda: fused_add_rms_norm_forward(x, y, weight, 1e-5, 0.0, "llama")

    def liger_backward() -> Run:
        from liger_kernel.ops.rms_norm import rms_norm_backward as backward
        from liger_kernel.ops.rms_norm import rms_norm_forward

        _, _, stats, block, warps, mode = rms_norm_forward(x, weight, 1e-5, 0.0, "llama", None)
        return lambda: backward(y, x, weight, stats, 0.0, mode, block, warps, True, None, False)

    yield Case(
        "rms_norm", at, lambda: rms_norm(x, weight, 1e-5, out, rstd), 2 * size * BF16,
        peers={"Liger": from_package("liger_kernel", liger_forward)},
    )  # fmt: skip
    yield Case(
        "rms_norm, residual added", at, lambda: rms_norm(x, weight, 1e-5, out, rstd, y, total), 4 * size * BF16,
        peers={"Liger": from_package("liger_kernel", liger_added)},
    )  # fmt: skip
    yield Case(
        "rms_norm_backward, residual added", at, lambda: rms_norm_backward(x, y, weight, rstd, total, out),
        4 * size * BF16, peers={"Liger, nothing added": from_package("liger_kernel", liger_backward)},
    )  # fmt: skip


def rotations(shape: Shape, tokens: int, device: str) -> Iterator[Case]:
    """RoPE of queries and keys in place, and the joining of heads with RoPE on the way."""
    length = min(tokens, 2048)
    heads, kv, dim = shape.heads, shape.kv_heads, shape.head_dim
    joined = random(tokens, (heads + 2 * kv) * dim, device=device)
    both = joined.unflatten(1, (-1, dim))[:, : heads + kv]
    angle = torch.arange(length, device=device)[:, None] * 0.01 ** torch.linspace(0, 1, dim // 2, device=device)
    cos, sin = (part.repeat(1, 2).to(torch.bfloat16) for part in (angle.cos(), angle.sin()))
    q, k, v = (random(tokens // length, length, count, dim, device=device).transpose(1, 2) for count in (heads, kv, kv))

    def liger() -> Run:
        from liger_kernel.ops.rope import rope_forward

        return lambda: rope_forward(q, k, cos[None], sin[None])

    moved = 2 * tokens * dim * BF16
    yield Case(
        "rotate_", f"{tokens} x {heads + kv} x {dim}", lambda: rotate_(both, cos, sin), moved * (heads + kv),
        peers={"Liger": from_package("liger_kernel", liger)},
    )  # fmt: skip
    out = room(tokens, (heads + 2 * kv) * dim, device)
    yield Case(
        "join_heads, rotated", f"{tokens} x {heads + 2 * kv} x {dim}",
        lambda: join_heads(out, q, k, v, angles=(cos, sin), inverse=True), moved * (heads + 2 * kv),
    )  # fmt: skip


def activations(shape: Shape, tokens: int, device: str) -> Iterator[Case]:
    """SwiGLU and its backward, which makes h anew."""
    features, at = shape.intermediate, f"{tokens} x {shape.intermediate}"
    size = tokens * features
    both, dh = random(tokens, 2 * features, device=device), random(tokens, features, device=device)
    gate, up, out = both[:, :features], both[:, features:], room(tokens, features, device)
    grads = room(tokens, 2 * features, device)
    alone = gate.contiguous(), up.contiguous()

    def liger(backward: bool) -> Run:
        from liger_kernel.ops.swiglu import swiglu_backward as theirs_backward
        from liger_kernel.ops.swiglu import swiglu_forward

        return (lambda: theirs_backward(*alone, dh)) if backward else (lambda: swiglu_forward(*alone))

    yield Case(
        "swiglu", at, lambda: swiglu(gate, up, out), 3 * size * BF16,
        peers={"Liger": from_package("liger_kernel", lambda: liger(False))},
    )  # fmt: skip
    yield Case(
        "swiglu_backward, h too", at,
        lambda: swiglu_backward(dh, gate, up, grads[:, :features], grads[:, features:], out), 6 * size * BF16,
        peers={"Liger, without h": from_package("liger_kernel", lambda: liger(True))},
    )  # fmt: skip


def losses(shape: Shape, tokens: int, device: str) -> Iterator[Case]:
    """The loss of a chunk of logits, with its gradient in their place."""
    rows = min(tokens, HEAD_ROWS)
    logits, targets = random(rows, shape.vocabulary, device=device), labels(shape, rows, device)
    each = torch.empty(rows, device=device)

    def liger() -> Run:
        from liger_kernel.ops.cross_entropy import cross_entropy_forward

        return lambda: cross_entropy_forward(logits, targets, None, -100, 0.0, 0.0, "sum", None, False)

    yield Case(
        "cross_entropy_", f"{rows} x {shape.vocabulary}", lambda: cross_entropy_(logits, targets, each, True),
        # Read and written once; the second time that a row is read it may be in the cache.
        2 * logits.numel() * BF16, peers={"Liger": from_package("liger_kernel", liger)},
    )  # fmt: skip


def heads(shape: Shape, tokens: int, device: str) -> Iterator[Case]:
    """Head and loss in one, with the gradient of the hidden states."""
    rows, vocabulary, hidden = min(tokens, HEAD_ROWS), shape.vocabulary, shape.hidden
    states, targets = random(tokens, hidden, device=device).requires_grad_(), labels(shape, tokens, device)
    weight = random(vocabulary, hidden, device=device, scale=0.02)

    def liger() -> Run:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda: loss(weight, states, targets)

    chunk = (rows, hidden, vocabulary)
    yield Case(
        "linear_cross_entropy", f"{tokens} x {hidden} x {vocabulary}",
        lambda: linear_cross_entropy(states, weight, targets),
        gemms=[(*chunk, True), (*chunk, False)] * (tokens // rows),
        peers={"Liger": from_package("liger_kernel", liger)},
    )  # fmt: skip


def labels(shape: Shape, tokens: int, device: str) -> Tensor:
    """Random token ids."""
    return torch.randint(0, shape.vocabulary, (tokens,), device=device)


class _Layers(nn.Module):
    """4-bit linear layers by their names in a decoder layer, for PEFT to find."""

    def __init__(self, names: dict[str, tuple[int, int]], device: str):
        super().__init__()
        from bitsandbytes.nn import Linear4bit

        for name, (inputs, outputs) in names.items():
            layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            # Layers start as fp32; 4 bits are made when they move.
            self.add_module(name, layer.to(torch.bfloat16).to(device))


def projections(shape: Shape, tokens: int, device: str) -> Iterator[Case]:
    """Linear layers with their LoRA branch as one augmented GEMM, dequantisation included; backward for dx, dA, dB."""
    hidden, inner, features = shape.hidden, shape.heads * shape.head_dim, shape.intermediate
    kv = shape.kv_heads * shape.head_dim
    groups = {
        "qkv": {"q_proj": (hidden, inner), "k_proj": (hidden, kv), "v_proj": (hidden, kv)},
        "o": {"o_proj": (inner, hidden)},
        "gate_up": {"gate_proj": (hidden, features), "up_proj": (hidden, features)},
        "down": {"down_proj": (features, hidden)},
    }
    for name, names in groups.items():
        yield from projection_cases(name, names, tokens, device)


def projection_cases(name: str, names: dict[str, tuple[int, int]], tokens: int, device: str) -> Iterator[Case]:
    """Forward and backward of the layers `names` (inputs and outputs of each) over one input."""
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(cast(Any, _Layers(names, device)), LoraConfig(r=16, target_modules=list(names)))
    layers = [adapted.base_model.model.get_submodule(part) for part in names]
    projection = Projection(*layers)
    factors = [factor.detach() for factor in projection.factors()]
    x = projection.room(tokens, torch.empty(0, dtype=torch.bfloat16, device=device)).normal_()
    y = projection.output_room(tokens, x).normal_()
    low_rank = random(tokens, projection.R, device=device)
    x_alone = random(tokens, projection.K, device=device).requires_grad_()
    trained = [x_alone, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]

    def peft() -> list[Tensor]:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return [layer(x_alone) for layer in layers]

    def backward() -> list[Tensor]:
        dx = projection.input_gradient(y, factors)
        return [dx, *projection.factor_gradients(y, x[:, : projection.K], low_rank)]

    outs = peft()
    gradients = [torch.randn_like(out) for out in outs]
    gemm = (tokens, projection.K, projection.N)
    at = " x ".join(map(str, gemm))
    yield Case(
        f"projection {name}", at, lambda: projection.forward(x, factors, out_MN=y[:, : projection.N]),
        gemms=[(*gemm, True)], peers={"PEFT": torch.no_grad()(peft)},
    )  # fmt: skip
    yield Case(
        f"projection {name}, backward", at, backward, gemms=[(*gemm, False)],
        peers={"PEFT": lambda: torch.autograd.grad(outs, trained, gradients, retain_graph=True)},
    )  # fmt: skip


def optimizers(shape: Shape, tokens: int, device: str) -> Iterator[Case]:
    """8-bit AdamW over the r=16 factors of one layer as one flat parameter; bitsandbytes over the same factors."""
    import bitsandbytes.functional as functional
    from bitsandbytes.optim import AdamW8bit

    linear = [
        (shape.hidden, shape.heads * shape.head_dim), *[(shape.hidden, shape.kv_heads * shape.head_dim)] * 2,
        (shape.heads * shape.head_dim, shape.hidden), *[(shape.hidden, shape.intermediate)] * 2,
        (shape.intermediate, shape.hidden),
    ]  # fmt: skip
    # Four layers' factors are more than the L2 cache holds, and still one launch.
    sizes = [16 * side for pair in linear for side in pair] * 4
    size = sum(sizes) // 256 * 256
    parameter, gradient = (random(size, device=device, dtype=torch.float32) for _ in range(2))
    first, second = (
        Moment(
            torch.zeros(size, dtype=torch.uint8, device=device), torch.ones(size // 256, device=device),
            map_of(functional.create_dynamic_map(signed=signed).to(device)),
        )
        for signed in (True, False)
    )  # fmt: skip
    step = AdamW(1e-4, 0.9, 0.999, 1e-8, 0.0, torch.tensor([0.1, 0.001], device=device))

    def bitsandbytes() -> Run:
        factors = [nn.Parameter(random(count, device=device, dtype=torch.float32)) for count in sizes]
        for factor in factors:
            factor.grad = torch.ones_like(factor)
        return AdamW8bit(factors, lr=1e-4).step

    yield Case(
        "adamw_8bit_", f"{size:,} in one", lambda: adamw_8bit_(parameter, gradient, first, second, step),
        # Parameter and both codes are read and written, the gradient is read, absmax both.
        size * (4 + 4 + 4 + 4) + size // 256 * 16,
        peers={f"bitsandbytes, {len(sizes)} factors": from_package("bitsandbytes", bitsandbytes)},
    )  # fmt: skip


GROUPS: list[Callable[[Shape, int, str], Iterator[Case]]] = [
    dequantisation, norms, rotations, activations, losses, heads, projections, optimizers,
]  # fmt: skip
