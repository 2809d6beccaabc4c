"""A frozen weight and its LoRA branch as one GEMM: [x | xA'] [W | sB]' forward and [dy | dy sB] [W ; A] backward.

M rows, K inputs and N outputs of a projection, R its total LoRA rank, P that rank padded for the GEMM, W columns of a
buffer that holds both.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dist.kernels.factors import Factors, place_factors
from qlora_dist.kernels.nf4 import NestedAbsmax, Packed, pack, unpack_into
from qlora_dist.plan.activations import padded


class Part:
    """One linear layer of a projection.

    base: the layer that holds the frozen weight. rows: its rows of the output. ranks: its columns of the total rank,
    none where it has no adapter. scale: the adapter's, alpha / r.
    """

    def __init__(self, layer: Any, row: int, rank: int):
        self.base: Any = getattr(layer, "base_layer", layer)
        r, self.scale = adapter_shape(layer)
        self.rows, self.ranks = slice(row, row + self.base.out_features), slice(rank, rank + r)
        self.has_adapter = r > 0
        if self.has_adapter:
            (name,) = layer.active_adapters
            self.adapter = layer.lora_A[name], layer.lora_B[name]
        self._read: tuple[Any, Packed | None] = (None, None)

    def factors(self) -> list[Tensor]:
        """A [r, K] and B [N, r] as they are now (parameters, or views of a sharded one), or nothing."""
        return [_weight(module) for module in self.adapter] if self.has_adapter else []

    def frozen(self) -> tuple[Tensor, Packed | None]:
        """The frozen weight as it stands and, where it is 4-bit, as the kernels take it."""
        if "current_weight" in self.base.__dict__:
            # Not kept: the memory of a gathered weight may live as long as a view of it.
            weight = self.base.current_weight()
            return weight, _packed(weight)
        weight = self.base._parameters["weight"]
        if self._read[0] is not weight:
            self._read = (weight, _packed(weight))
        return self._read

    def weight_into(self, out_NK: Tensor) -> None:
        """Write the frozen weight, dequantised where it is 4-bit, into `out_NK`."""
        weight, packed = self.frozen()
        if packed is None:
            out_NK.copy_(weight)
        else:
            unpack_into(out_NK, packed)


def _weight(module: Any) -> Tensor:
    """`module.weight`, without nn.Module's long way to it."""
    own = module.__dict__.get("weight")
    weight: Tensor = module._parameters["weight"] if own is None else own
    return weight


def _packed(weight: Any) -> Packed | None:
    """A 4-bit weight as the kernel takes it; None for others."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return None
    nested = None
    if state.nested:
        nested = NestedAbsmax(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    return pack(weight.data.view(-1).as_subclass(Tensor), state.absmax, state.code, state.blocksize, nested)


class Projection:
    """Linear layers over the same input as one GEMM."""

    def __init__(self, *layers: nn.Module):
        self.parts: list[Part] = []
        row = rank = 0
        for layer in layers:
            part = Part(layer, row, rank)
            self.parts.append(part)
            row, rank = part.rows.stop, part.ranks.stop
        self.K: int = part.base.in_features
        self.N, self.R = row, rank
        self._keeps = False
        self._kept: Tensor | None = None
        self.adapted = [part for part in self.parts if part.has_adapter]
        self.has_bias = any(part.base.bias is not None for part in self.parts)

    def keep_weight(self, keeps: bool) -> None:
        """Whether the dequantised weight stays in memory from the next use on."""
        self._keeps = keeps
        if not keeps:
            self._kept = None

    def _weight(self, outputs: int, inputs: int, like: Tensor) -> tuple[Tensor, bool]:
        """A buffer [outputs, inputs] with room for the factors beside or below the weight; whether it holds that."""
        if not self._keeps:
            return scratch(outputs * inputs, like).view(outputs, inputs), False
        if self._kept is None or self._kept.dtype != like.dtype:
            padded = self.padded_rank(like.device)
            kept = like.new_empty(self.N + padded, self.K + padded)
            self._dequantize(kept)
            # Only now: whoever is interrupted before must not find it.
            self._kept = kept
        return self._kept[:outputs, :inputs], True

    def padded_rank(self, device: torch.device) -> int:
        """P: tensor cores want multiples; a CPU does not."""
        return self.R if device.type == "cpu" else padded(self.R)

    def factors(self) -> list[Tensor]:
        """All factors, in the order in which `backward` returns their gradients."""
        return [factor for part in self.parts for factor in part.factors()]

    def room(self, rows: int, like: Tensor) -> Tensor:
        """An uninitialised [rows, K + P], for the input x in its first K columns."""
        return torch.empty(rows, self.K + self.padded_rank(like.device), dtype=like.dtype, device=like.device)

    def output_room(self, rows: int, like: Tensor) -> Tensor:
        """An uninitialised [rows, N + P], for the output or its gradient in its first N columns."""
        return torch.empty(rows, self.N + self.padded_rank(like.device), dtype=like.dtype, device=like.device)

    def low_rank(self, x_MW: Tensor) -> Tensor:
        """A copy of x A' [M, R] from the buffer that `forward` has filled."""
        return x_MW[:, self.K : self.K + self.R].clone()

    def bias(self) -> Tensor | None:
        """The biases one after the other; None where no layer has one."""
        if not self.has_bias:
            return None
        biases = [current(part.base, "bias") for part in self.parts]
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
        w_NW, ready = self._weight(self.N, x_MW.shape[1], x_MW)
        if self.R:
            padded = x_MW.shape[1] - self.K
            a_PK = scratch(padded * self.K, x_MW, "factors").view(padded, self.K)
            place_factors(self._placed(factors), a_PK, w_NW[:, self.K :])
            torch.mm(x_MW[:, : self.K], a_PK.t(), out=x_MW[:, self.K :])
        if not ready:
            self._dequantize(w_NW)
        bias_N = self.bias()
        if bias_N is not None:
            y_MN = torch.addmm(bias_N.to(x_MW.dtype), x_MW, w_NW.t(), out=out_MN)
            return y_MN if residual_MN is None else y_MN.add_(residual_MN)
        if residual_MN is None:
            return torch.mm(x_MW, w_NW.t(), out=out_MN)
        return torch.addmm(residual_MN, x_MW, w_NW.t(), out=out_MN)

    def input_gradient(self, dy_MW: Tensor, factors: Sequence[Tensor], out_MK: Tensor | None = None) -> Tensor:
        """dx [M, K]; `dy_MW` [M, N + P] holds dy in its first N columns, and dy s B in the others afterwards."""
        w_WK, ready = self._weight(dy_MW.shape[1], self.K, dy_MW)
        self._project_back(dy_MW, factors, w_WK[self.N :])
        if not ready:
            self._dequantize(w_WK)
        return torch.mm(dy_MW, w_WK, out=out_MK)

    def _project_back(self, dy_MW: Tensor, factors: Sequence[Tensor], a_PK: Tensor) -> None:
        if self.R:
            padded = dy_MW.shape[1] - self.N
            b_NP = scratch(self.N * padded, dy_MW, "factors").view(self.N, padded)
            place_factors(self._placed(factors), a_PK, b_NP)
            torch.mm(dy_MW[:, : self.N], b_NP, out=dy_MW[:, self.N :])

    def factor_gradients(
        self, dy_MW: Tensor, x_MK: Tensor, xa_MR: Tensor, factors: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """The factors' gradients, in fp32, in their order; `dy_MW` as `input_gradient` leaves it.

        Args:
            factors: given where `input_gradient` is left out, since nothing before the layer trains.
        """
        if not self.R:
            return []
        if factors is not None:
            padded = dy_MW.shape[1] - self.N
            self._project_back(dy_MW, factors, scratch(padded * self.K, dy_MW).view(padded, self.K))
        da_RK = product_fp32(dy_MW[:, self.N : self.N + self.R].t(), x_MK)
        db_NR = product_fp32(dy_MW[:, : self.N].t(), xa_MR)
        scales = {part.scale for part in self.adapted}
        if len(scales) == 1 and scales != {1.0}:
            db_NR.mul_(scales.pop())
        grads: list[Tensor] = []
        for part in self.adapted:
            db_Nr = db_NR[part.rows, part.ranks]
            grads += [da_RK[part.ranks], db_Nr * part.scale if len(scales) > 1 else db_Nr]
        return grads

    def _placed(self, factors: Sequence[Tensor]) -> list[Factors]:
        return [
            Factors(a, b, part.rows.start, part.ranks.start, part.scale)
            for part, a, b in zip(self.adapted, factors[::2], factors[1::2], strict=True)
        ]

    def _dequantize(self, out: Tensor) -> None:
        for part in self.parts:
            part.weight_into(out[part.rows, : self.K])


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


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a b, accumulated and given in fp32 (fp64 for fp64)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


_SCRATCH: dict[tuple[torch.device, torch.dtype, str], Tensor] = {}


def scratch(size: int, like: Tensor, purpose: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
    """A flat buffer for one dequantised weight at a time; all layers share it, since one GEMM follows another."""
    dtype = dtype or like.dtype
    key = (like.device, dtype, purpose)
    if key not in _SCRATCH or _SCRATCH[key].numel() < size:
        _SCRATCH[key] = torch.empty(size, dtype=dtype, device=like.device)
    return _SCRATCH[key][:size]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
