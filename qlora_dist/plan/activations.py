"""Which layers keep what of their forward: the most time saved for the memory there is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

# What a layer can keep, beside its input. attention: q, k, v, the attention's output and the residual stream after it.
# gate_up: the inputs of SwiGLU. weights: the frozen weights, dequantised, from step to step. norms: what they gave.
Kind = Literal["attention", "gate_up", "weights", "norms"]
KINDS: tuple[Kind, ...] = ("gate_up", "attention", "weights", "norms")

# Rates of an H100, which say in what order kinds are worth their memory; a slower GPU divides all of them alike.
GEMM_FLOPS, FP8_GEMM_FLOPS, ATTENTION_FLOPS, BYTES_PER_SECOND = 7e14, 11e14, 4.5e14, 2.7e12


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer: its sizes in elements (queries and keys: all heads), and whether it norms each head."""

    hidden: int
    intermediate: int
    queries: int
    keys: int
    normed: bool = False

    @property
    def weights(self) -> int:
        """Elements of the seven projections."""
        attention = self.hidden * (2 * self.queries + 2 * self.keys)
        return attention + 3 * self.hidden * self.intermediate


@dataclass(frozen=True)
class Gain:
    """What keeping one kind in one layer costs, in bytes, and saves, in seconds a micro-batch."""

    size: int
    seconds: float


def gains(shape: LayerShape, tokens: int, length: int, element_size: int, fp8: bool = False) -> dict[Kind, Gain]:
    """The price and worth of each kind for one layer.

    Args:
        tokens: of a micro-batch; `length`: of one of its rows.
        element_size: bytes of an activation.
        fp8: whether the frozen weights are multiplied in FP8. Kept, there are two of each then, of a byte a weight:
            the backward wants it turned.
    """
    gate_up = 2 * tokens * shape.intermediate
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
    norms = 2 * tokens * shape.hidden * element_size
    gemm_flops = FP8_GEMM_FLOPS if fp8 else GEMM_FLOPS
    return {
        "gate_up": Gain(gate_up * element_size, 4 * tokens * shape.hidden * shape.intermediate / gemm_flops),
        "attention": Gain(attention * element_size, projections / gemm_flops + looking / ATTENTION_FLOPS),
        "weights": Gain(shape.weights * (2 if fp8 else element_size), unpacked),
        "norms": Gain(norms, 2 * norms / BYTES_PER_SECOND),
    }


def choose(layers: Sequence[dict[Kind, Gain]], room: float, kinds: Iterable[Kind] = KINDS) -> list[frozenset[Kind]]:
    """What each layer keeps within `room` bytes in all: the kinds of the most seconds a byte first, last layers first.

    The last layers' backward comes first, so that what they keep is freed soonest; the earliest recompute.
    """
    wanted = [
        (gain.seconds / gain.size, number, kind, gain.size)
        for number, layer in enumerate(layers)
        for kind, gain in layer.items()
        if kind in kinds and gain.size
    ]
    kept: list[set[Kind]] = [set() for _ in layers]
    for _, number, kind, size in sorted(wanted, key=lambda item: (item[0], item[1]), reverse=True):
        # What is computed again makes its norm again on the way.
        if kind == "norms" and not kept[number] >= {"attention", "gate_up"}:
            continue
        if size <= room:
            kept[number].add(kind)
            room -= size
    return [frozenset(layer) for layer in kept]


def describe(kept: Sequence[frozenset[Kind]]) -> str:
    """One line for a person: how many layers keep what."""
    if not kept:
        return "no fused layers"
    names: dict[Kind, str] = {
        "gate_up": "gate and up",
        "attention": "attention",
        "weights": "dequantised weights",
        "norms": "norms",
    }
    parts = []
    for kind, name in names.items():
        count = sum(kind in layer for layer in kept)
        if count:
            parts.append(f"{name} of {'all' if count == len(kept) else f'{count} of'} {len(kept)} layers")
    return f"kept: {', '.join(parts)}" if parts else f"all of {len(kept)} layers recomputed"
