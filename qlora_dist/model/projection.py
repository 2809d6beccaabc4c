"""A frozen weight and its LoRA branch as one GEMM: [x | xA'] [W | sB]' forward and [dy | dy sB] [W ; A] backward.

M rows, K inputs and N outputs of a projection, R its total LoRA rank, P that rank padded for the GEMM, W columns of a
buffer that holds both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dist.kernels.nf4 import NestedAbsmax, dequantize_4bit_into


@dataclass
class Part:
    """One linear layer of a projection: its rows of the output, its columns of the rank, and the adapter's scale."""

    layer: Any
    rows: slice
    ranks: slice
    scale: float

    @property
    def base(self) -> Any:
        """The layer that holds the frozen weight."""
        return getattr(self.layer, "base_layer", self.layer)

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA branch is beside it."""
        return self.ranks.stop > self.ranks.start

    def factors(self) -> list[Tensor]:
        """A [r, K] and B [N, r] as they are now (parameters, or views of a sharded one), or nothing."""
        if not self.has_adapter:
            return []
        (name,) = self.layer.active_adapters
        return [self.layer.lora_A[name].weight, self.layer.lora_B[name].weight]


class Projection:
    """Linear layers over the same input as one GEMM."""

    def __init__(self, *layers: nn.Module):
        self.parts: list[Part] = []
        row = rank = 0
        for layer in layers:
            base: Any = getattr(layer, "base_layer", layer)
            r, scale = adapter_shape(layer)
            self.parts.append(Part(layer, slice(row, row + base.out_features), slice(rank, rank + r), scale))
            row, rank = row + base.out_features, rank + r
        self.K: int = base.in_features
        self.N, self.R = row, rank

    def padded_rank(self, device: torch.device) -> int:
        """P: tensor cores want multiples; a CPU does not."""
        return self.R if device.type == "cpu" else -(-self.R // 64) * 64

    def factors(self) -> list[Tensor]:
        """All factors, in the order in which `backward` returns their gradients."""
        return [factor for part in self.parts for factor in part.factors()]

    def room(self, rows: int, like: Tensor) -> Tensor:
        """An uninitialised [rows, K + P], for the input x in its first K columns."""
        return torch.empty(rows, self.K + self.padded_rank(like.device), dtype=like.dtype, device=like.device)

    def bias(self) -> Tensor | None:
        """The biases one after the other; None where no layer has one."""
        biases = [current(part.base, "bias") for part in self.parts]
        if all(bias is None for bias in biases):
            return None
        device = next(bias.device for bias in biases if bias is not None)
        return torch.cat(
            [
                torch.zeros(p.rows.stop - p.rows.start, device=device) if bias is None else bias.to(device)
                for p, bias in zip(self.parts, biases, strict=True)
            ]
        )

    def forward(
        self, x_MW: Tensor, factors: Sequence[Tensor], residual_MN: Tensor | None = None, out_MN: Tensor | None = None
    ) -> Tensor:
        """y = x W' + (x A') (s B)' [+ bias] [+ residual], [M, N]; fills the columns of `x_MW` that hold x A'."""
        a_RK, b_NR = self._joined(factors, x_MW)
        x_MK = x_MW[:, : self.K]
        if self.R:
            torch.mm(x_MK, a_RK.t(), out=x_MW[:, self.K : self.K + self.R])
        x_MW[:, self.K + self.R :] = 0
        w_NW = scratch(self.N * x_MW.shape[1], x_MW).view(self.N, x_MW.shape[1])
        self._dequantize(w_NW)
        w_NW[:, self.K : self.K + self.R] = b_NR
        w_NW[:, self.K + self.R :] = 0
        bias_N = self.bias()
        if bias_N is not None:
            y_MN = torch.addmm(bias_N.to(x_MW.dtype), x_MW, w_NW.t(), out=out_MN)
            return y_MN if residual_MN is None else y_MN.add_(residual_MN)
        if residual_MN is None:
            return torch.mm(x_MW, w_NW.t(), out=out_MN)
        return torch.addmm(residual_MN, x_MW, w_NW.t(), out=out_MN)

    def backward(
        self, dy_MW: Tensor, x_MK: Tensor, xa_MR: Tensor, factors: Sequence[Tensor], need_dx: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """dx [M, K] and the factors' gradients, in fp32; `dy_MW` [M, N + P] holds dy in its first N columns."""
        a_RK, b_NR = self._joined(factors, dy_MW)
        dy_MN = dy_MW[:, : self.N]
        grads: list[Tensor] = []
        if self.R:
            dyb_MR = dy_MW[:, self.N : self.N + self.R]
            torch.mm(dy_MN, b_NR, out=dyb_MR)
            da_RK = product_fp32(dyb_MR.t(), x_MK)
            db_NR = product_fp32(dy_MN.t(), xa_MR)
            for part in self.parts:
                if part.has_adapter:
                    grads += [da_RK[part.ranks], db_NR[part.rows, part.ranks] * part.scale]
        if not need_dx:
            return None, grads
        dy_MW[:, self.N + self.R :] = 0
        rows = dy_MW.shape[1]
        w_WK = scratch(rows * self.K, dy_MW).view(rows, self.K)
        self._dequantize(w_WK)
        w_WK[self.N : self.N + self.R] = a_RK
        w_WK[self.N + self.R :] = 0
        return dy_MW @ w_WK, grads

    def _joined(self, factors: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """A of all parts [R, K], and s B of all parts, block-diagonal [N, R], in the compute dtype."""
        if not self.R:
            return like.new_empty(0, self.K), like.new_empty(self.N, 0)
        pairs = list(zip(factors[::2], factors[1::2], strict=True))
        a_RK = pairs[0][0].to(like.dtype) if len(pairs) == 1 else torch.cat([a for a, _ in pairs]).to(like.dtype)
        adapted = [part for part in self.parts if part.has_adapter]
        if len(self.parts) == 1:
            return a_RK, (pairs[0][1] * adapted[0].scale).to(like.dtype)
        b_NR = torch.zeros(self.N, self.R, dtype=like.dtype, device=like.device)
        for part, (_, b) in zip(adapted, pairs, strict=True):
            b_NR[part.rows, part.ranks] = (b * part.scale).to(like.dtype)
        return a_RK, b_NR

    def _dequantize(self, out: Tensor) -> None:
        for part in self.parts:
            frozen_weight_into(out[part.rows, : self.K], part.base)


def adapter_shape(layer: Any) -> tuple[int, float]:
    """Rank and scale of a layer's active adapter; 0 where it has none."""
    if not hasattr(layer, "lora_A"):
        return 0, 0.0
    (name,) = layer.active_adapters
    return (layer.r[name], layer.scaling[name]) if name in layer.lora_A else (0, 0.0)


def current(module: Any, name: str) -> Any:
    """A frozen parameter of `module` as it stands; of a sharded one, what is gathered now."""
    asked = module.__dict__.get(f"current_{name}")
    return getattr(module, name) if asked is None else asked()


def frozen_weight_into(out_NK: Tensor, layer: Any) -> None:
    """Write a layer's frozen weight, dequantised where it is 4-bit, into `out_NK`."""
    weight = current(layer, "weight")
    state = getattr(weight, "quant_state", None)
    if state is None:
        out_NK.copy_(weight)
        return
    nested = None
    if state.nested:
        nested = NestedAbsmax(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    dequantize_4bit_into(out_NK, weight.data.view(-1), state.absmax, state.code, state.blocksize, nested)


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a b, accumulated and given in fp32 (fp64 for fp64)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


_SCRATCH: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def scratch(size: int, like: Tensor) -> Tensor:
    """A flat buffer for one dequantised weight at a time; all layers share it, since one GEMM follows another."""
    key = (like.device, like.dtype)
    if key not in _SCRATCH or _SCRATCH[key].numel() < size:
        _SCRATCH[key] = torch.empty(size, dtype=like.dtype, device=like.device)
    return _SCRATCH[key][:size]
