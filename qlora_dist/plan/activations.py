"""Which layers keep what of their forward: the most time saved for the memory there is."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

# What a layer can keep, beside its input. attention: q, k, v, the attention's output and the residual stream after it.
# gate_up: the inputs of SwiGLU. weights: the frozen weights, dequantised, from step to step. norms: what they gave.
Kind = Literal["attention", "gate_up", "weights", "norms"]
KINDS: tuple[Kind, ...] = ("gate_up", "attention", "weights", "norms")
# What may wait in host memory; a layer whose attention does so keeps it.
HostKind = Literal["attention_on_host", "input_on_host"]
HOST_KINDS: tuple[HostKind, ...] = ("attention_on_host", "input_on_host")
Choice = frozenset[Kind | HostKind]

# Rates of an H100, which say in what order kinds are worth their memory; a slower GPU divides all of them alike.
GEMM_FLOPS, FP8_GEMM_FLOPS, ATTENTION_FLOPS, BYTES_PER_SECOND = 7e14, 11e14, 4.5e14, 2.7e12


# LoRA's factors lie beside the weights, and their products beside the activations, in multiples of so many columns.
RANK_MULTIPLE = 64


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer: its sizes in elements (queries and keys: all heads), and whether it norms each head.

    ranks: the LoRA ranks of q, k and v together, the output, gate and up together, and down.
    """

    hidden: int
    intermediate: int
    queries: int
    keys: int
    normed: bool = False
    ranks: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def weights(self) -> int:
        """Elements of the seven projections."""
        attention = self.hidden * (2 * self.queries + 2 * self.keys)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def padded_weights(self) -> int:
        """The same with room for the factors, as they are kept."""
        sizes = (
            (self.queries + 2 * self.keys, self.hidden),
            (self.hidden, self.queries),
            (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        )
        return sum((n + padded(r)) * (k + padded(r)) for (n, k), r in zip(sizes, self.ranks, strict=True))


@dataclass(frozen=True)
class Gain:
    """What keeping one kind in one layer costs, in bytes, and saves, in seconds a micro-batch.

    stays: of the bytes, those that are on the device also where the kind is on the host.
    """

    size: int
    seconds: float
    stays: int = 0


def padded(rank: int) -> int:
    """The columns of a buffer that a LoRA rank takes."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def gains(shape: LayerShape, tokens: int, length: int, element_size: int, fp8: bool = False) -> dict[Kind, Gain]:
    """The price and worth of each kind for one layer.

    Args:
        tokens: of a micro-batch; `length`: of one of its rows.
        element_size: bytes of an activation.
        fp8: whether the frozen weights are multiplied in FP8. Kept, there are two of each then, of a byte a weight:
            the backward wants it turned.
    """
    r_qkv, r_output, r_gate_up, _ = shape.ranks
    gate_up = tokens * (2 * shape.intermediate + padded(r_gate_up) + r_gate_up)
    low_rank = tokens * (r_qkv + r_output)
    heads = shape.queries + 2 * shape.keys
    attention = tokens * (heads + shape.queries + shape.hidden)
    if shape.normed:
        # The backward of a norm over each head needs what came before it.
        attention += tokens * heads
    projections = 2 * tokens * shape.hidden * (2 * shape.queries + 2 * shape.keys)
    # Causal: each token looks at half of the row, with two products.
    looking = 2 * tokens * length * shape.queries
    # 4-bit weights are read and written out, in the forward and in the backward.
    unpacked = 2 * shape.weights * (0.52 + (1 if fp8 else element_size)) / BYTES_PER_SECOND
    norms = tokens * (2 * shape.hidden + padded(r_qkv) + padded(r_gate_up)) * element_size
    gemm_flops = FP8_GEMM_FLOPS if fp8 else GEMM_FLOPS
    return {
        "gate_up": Gain(gate_up * element_size, 4 * tokens * shape.hidden * shape.intermediate / gemm_flops),
        "attention": Gain(
            (attention + low_rank) * element_size,
            projections / gemm_flops + looking / ATTENTION_FLOPS,
            low_rank * element_size,
        ),
        "weights": Gain(2 * shape.weights if fp8 else shape.padded_weights * element_size, unpacked),
        "norms": Gain(norms, 2 * norms / BYTES_PER_SECOND),
    }


def forward_seconds(shape: LayerShape, tokens: int, length: int, element_size: int, fp8: bool = False) -> float:
    """A layer's forward at the rates of an H100; arguments as of `gains`."""
    products = 2 * tokens * shape.weights / (FP8_GEMM_FLOPS if fp8 else GEMM_FLOPS)
    looking = 2 * tokens * length * shape.queries / ATTENTION_FLOPS
    # Two norms, RoPE in place, the heads joined, SwiGLU, both residuals; 4-bit weights read and written out.
    heads = shape.queries + shape.keys
    passes = tokens * (6 * shape.hidden + 2 * heads + 2 * shape.queries + 3 * shape.intermediate) * element_size
    unpacked = shape.weights * (0.52 + (1 if fp8 else element_size))
    return products + looking + (passes + unpacked) / BYTES_PER_SECOND


def choose(layers: Sequence[dict[Kind, Gain]], room: float, kinds: Iterable[Kind] = KINDS) -> list[frozenset[Kind]]:
    """What each layer keeps within `room` bytes in all: the kinds of the most seconds a byte first, last layers first.

    The last layers' backward comes first, so that what they keep is freed soonest; the earliest recompute.
    """
    return fill(by_worth(layers, kinds), [False] * len(layers), room)


def by_worth(layers: Sequence[dict[Kind, Gain]], kinds: Iterable[Kind]) -> list[tuple[int, Kind, int]]:
    """Every layer's number and kinds, with their bytes, in the order in which `choose` takes them."""
    allowed = frozenset(kinds)
    wanted = [
        (gain.seconds / gain.size, number, kind, gain.size)
        for number, layer in enumerate(layers)
        for kind, gain in layer.items()
        if kind in allowed and gain.size
    ]
    wanted.sort(key=lambda item: (item[0], item[1]), reverse=True)
    return [(number, kind, size) for _, number, kind, size in wanted]


def fill(wanted: Iterable[tuple[int, Kind, int]], elsewhere: Sequence[bool], room: float) -> list[frozenset[Kind]]:
    """What each layer keeps of what is `wanted`, first come first served.

    Args:
        elsewhere: of each layer, whether its attention is kept where it takes no room.
    """
    kept: list[set[Kind]] = [{"attention"} if is_so else set() for is_so in elsewhere]
    for number, kind, size in wanted:
        if size > room or kind in kept[number]:
            continue
        # What is computed again makes its norm again on the way.
        if kind == "norms" and not kept[number] >= {"attention", "gate_up"}:
            continue
        kept[number].add(kind)
        room -= size
    return [frozenset(layer) for layer in kept]


def describe(kept: Sequence[Choice]) -> str:
    """One line for a person: how many layers keep what, and where."""
    if not kept:
        return "no fused layers"
    here: dict[Kind, str] = {
        "gate_up": "gate and up",
        "attention": "attention",
        "weights": "dequantised weights",
        "norms": "norms",
    }
    there: dict[HostKind, str] = {"attention_on_host": "attention", "input_on_host": "inputs"}
    on_device = _of_layers(here[k] for layer in kept for k in KINDS if k in layer and f"{k}_on_host" not in layer)
    on_host = _of_layers(there[k] for layer in kept for k in HOST_KINDS if k in layer)
    parts = [f"{where}: {', '.join(f'{what} of {_share(count, len(kept))}' for what, count in counted)}"
             for where, counted in (("kept", on_device), ("in host memory", on_host)) if counted]  # fmt: skip
    if not any("attention" in layer or "gate_up" in layer for layer in kept) and not on_device:
        parts.insert(0, f"all of {len(kept)} layers recomputed")
    return "; ".join(parts)


def _of_layers(names: Iterable[str]) -> list[tuple[str, int]]:
    order = ("gate and up", "attention", "dequantised weights", "norms", "inputs")
    return sorted(Counter(names).items(), key=lambda item: order.index(item[0]))


def _share(count: int, of: int) -> str:
    return f"all {of} layers" if count == of else f"{count} of {of} layers"
