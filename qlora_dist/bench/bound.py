"""What GEMMs and attention alone allow on this GPU: `python -m qlora_dist.bench.bound CONFIG.json RESULT.json BxT ...`.

A frozen base needs no weight gradient: each linear layer is two GEMMs a token, forward and dx (4N FLOP a token in all),
and attention its forward and backward. The bound is the tokens a second of a step that consists of nothing else.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Rows of logits at a time, as the head of qlora-dist has them at a vocabulary of 128,256.
HEAD_ROWS = 2048


@dataclass(frozen=True)
class Shape:
    """What a decoder's config.json says of its size; `from_config` reads it."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Shape":
        heads = config["num_attention_heads"]
        return cls(
            config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"], heads,
            config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads,
            config["vocab_size"],
        )  # fmt: skip

    def linear(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's GEMMs, projections of one input taken together."""
        both = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "qkv": (self.hidden, both),
            "o": (self.heads * self.head_dim, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
        }


Rates = dict[str, float]


def bounds(shape: Shape, tokens: int, gemms: dict[str, Rates], attention: Rates) -> Rates:
    """Tokens a second of the bound, from milliseconds.

    Args:
        gemms: "qkv", "o", "gate_up", "down" and "head", each with forward_ms and backward_ms for `tokens` tokens.
        attention: forward_ms and backward_ms of one layer's attention over them.

    Returns:
        kept: nothing is recomputed. recomputed: each layer's forward twice but for the down projection, whose output
        the backward does not need.
    """
    layer = attention["forward_ms"] + attention["backward_ms"]
    layer += sum(gemms[name]["forward_ms"] + gemms[name]["backward_ms"] for name in shape.linear())
    again = attention["forward_ms"] + sum(gemms[name]["forward_ms"] for name in shape.linear() if name != "down")
    head = gemms["head"]["forward_ms"] + gemms["head"]["backward_ms"]
    return {
        "kept": tokens / (shape.layers * layer + head) * 1e3,
        "recomputed": tokens / (shape.layers * (layer + again) + head) * 1e3,
    }


def measure(shape: Shape, batch: int, length: int) -> dict[str, Any]:
    """The rates and the bounds at `batch` sequences of `length` tokens, on the current GPU."""
    from qlora_dist.bench.timing import gemm_ms, tflop_s

    tokens, gemms = batch * length, {}
    for name, (inputs, outputs) in {**shape.linear(), "head": (shape.hidden, shape.vocabulary)}.items():
        rows = min(tokens, HEAD_ROWS) if name == "head" else tokens
        forward, backward = gemm_ms(rows, inputs, outputs)
        flop = 2 * rows * inputs * outputs
        gemms[name] = {
            "forward_ms": forward * tokens / rows, "backward_ms": backward * tokens / rows,
            "forward_tflop_s": tflop_s(flop, forward), "backward_tflop_s": tflop_s(flop, backward),
        }  # fmt: skip
    attention = attention_rates(shape, batch, length)
    fastest = min(attention.values(), key=lambda rates: rates["forward_ms"] + rates["backward_ms"])
    return {"gemms": gemms, "attention": attention, "bound": bounds(shape, tokens, gemms, fastest)}


def attention_rates(shape: Shape, batch: int, length: int) -> dict[str, Rates]:
    """Causal attention by each of PyTorch's kernels that takes it: milliseconds, and TFLOP/s of the causal half."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from qlora_dist.bench.timing import device_ms, random, tflop_s

    q = random(batch, shape.heads, length, shape.head_dim).requires_grad_()
    k, v = (random(batch, shape.kv_heads, length, shape.head_dim).requires_grad_() for _ in range(2))
    gradient = random(batch, shape.heads, length, shape.head_dim)
    flop = 4 * batch * shape.heads * length * length * shape.head_dim / 2
    rates = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            try:
                out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            except RuntimeError:
                continue  # this GPU or build lacks it
            forward = device_ms(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
            backward = device_ms(partial(torch.autograd.grad, out, (q, k, v), gradient, retain_graph=True))
        rates[name] = {
            "forward_ms": forward, "backward_ms": backward,
            "forward_tflop_s": tflop_s(flop, forward), "backward_tflop_s": tflop_s(2.5 * flop, backward),
        }  # fmt: skip
    return rates


def main(config_file: Path, result_file: Path, sizes: list[str]) -> None:
    """Measure each BxT of `sizes` and the copy bandwidth, and write them."""
    from qlora_dist.bench.timing import copy_gb_s

    shape = Shape.from_config(json.loads(config_file.read_text()))
    result: dict[str, Any] = {"copy_gb_s": copy_gb_s()}
    for size in sizes:
        batch, length = map(int, size.split("x"))
        result[size] = measure(shape, batch, length)
        result_file.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
