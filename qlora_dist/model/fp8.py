"""A projection whose frozen weight is multiplied in FP8, and what that needs of a run.

y = Q(x) Q(W)' + (x A')(s B)' forward and dx = Q(dy) Q(W')' + (dy s B) A backward, where Q rounds to e4m3 with a scale
for each row: of x and dy a token, of W an output, of W' an input. The LoRA branch and all gradients of factors are as
`Projection` has them, from x and dy as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import ModelConfig
from qlora_dist.kernels.factors import place_factors
from qlora_dist.kernels.fp8 import E4M3, MULTIPLE, Scaled, quantize_rows, scaled_product, weight_into, weight_scales
from qlora_dist.kernels.low_rank import add_low_rank_
from qlora_dist.model.projection import Projection, scratch

# RTX 4090, L4, L40S; H100 is 9.0.
LEAST_CAPABILITY = (8, 9)


class Fp8Projection(Projection):
    """Linear layers over the same input, in FP8 beside their adapters.

    The scales of a weight are constants, found at its first use and kept, N + K floats; of a sharded weight every rank
    keeps them whole. So each later use makes its e4m3 numbers in one pass over the 4-bit ones.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        self._scales: tuple[Tensor, Tensor] | None = None
        self._resident: dict[bool, Scaled] = {}

    def keep_weight(self, keeps: bool) -> None:
        """Whether the e4m3 weight stays in memory from the next use on, both as it lies and turned."""
        super().keep_weight(keeps)
        if not keeps:
            self._resident.clear()

    def forward(
        self, x_MW: Tensor, factors: Sequence[Tensor], residual_MN: Tensor | None = None, out_MN: Tensor | None = None
    ) -> Tensor:
        """As `Projection.forward`."""
        y_MN = x_MW.new_empty(x_MW.shape[0], self.N) if out_MN is None else out_MN
        padded = x_MW.shape[1] - self.K
        b_NP = scratch(self.N * padded, x_MW, "low rank").view(self.N, padded)
        if self.R:
            a_PK = scratch(padded * self.K, x_MW, "factors").view(padded, self.K)
            place_factors(self._placed(factors), a_PK, b_NP)
            torch.mm(x_MW[:, : self.K], a_PK.t(), out=x_MW[:, self.K :])
        scaled_product(quantize_rows(x_MW[:, : self.K]), self._weight_e4m3(x_MW, turned=False), y_MN)
        bias_N = self.bias()
        if self.R or bias_N is not None or residual_MN is not None:
            add_low_rank_(y_MN, x_MW[:, self.K :], b_NP, bias_N, residual_MN)
        return y_MN

    def input_gradient(self, dy_MW: Tensor, factors: Sequence[Tensor], out_MK: Tensor | None = None) -> Tensor:
        """As `Projection.input_gradient`."""
        dx_MK = dy_MW.new_empty(dy_MW.shape[0], self.K) if out_MK is None else out_MK
        padded = dy_MW.shape[1] - self.N
        a_PK = scratch(padded * self.K, dy_MW, "low rank").view(padded, self.K)
        self._project_back(dy_MW, factors, a_PK)
        scaled_product(quantize_rows(dy_MW[:, : self.N]), self._weight_e4m3(dy_MW, turned=True), dx_MK)
        return add_low_rank_(dx_MK, dy_MW[:, self.N :], a_PK.t()) if self.R else dx_MK

    def _weight_e4m3(self, like: Tensor, turned: bool) -> Scaled:
        """The weight [N, K] over its rows' scales; `turned`, [K, N] over its columns'."""
        if turned in self._resident:
            return self._resident[turned]
        if self._scales is None:
            # Once in a run, so not in the buffer that lives as long as it.
            w_NK = like.new_empty(self.N, self.K)
            self._dequantize(w_NK)
            self._scales = weight_scales(w_NK)
        scale, size = self._scales[turned], self.N * self.K
        flat = like.new_empty(size, dtype=E4M3) if self._keeps else scratch(size, like, dtype=E4M3)
        made = Scaled(flat.view((self.K, self.N) if turned else (self.N, self.K)), scale)
        for part in self.parts:
            rows, (weight, packed) = part.rows, part.frozen()
            out, part_scale = (made.values_RC[:, rows], scale) if turned else (made.values_RC[rows], scale[rows])
            weight_into(out, weight if packed is None else packed, part_scale, turned)
        if self._keeps:
            self._resident[turned] = made
        return made


def check_fp8(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """See to it that `model.compute: fp8` can be had here; before anything is loaded.

    Raises:
        UserError: the GPU has no FP8, the run computes in another dtype than bf16 there, or nothing runs fused.
    """
    if config.compute != "fp8":
        return
    if config.fused == "auto" and device.type != "cuda":
        raise UserError("fp8-needs-fused", reason="model.fused=auto fuses on a GPU only, so it is always that you want")
    if device.type != "cuda":
        return
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise UserError("fp8-not-on-device", device=torch.cuda.get_device_name(device))
    if dtype != torch.bfloat16:
        raise UserError("fp8-compute-dtype", dtype=str(dtype).removeprefix("torch."))


def misfit(projection: Projection) -> str | None:
    """Why a projection cannot run in FP8; None where it can."""
    widths = [part.rows.stop - part.rows.start for part in projection.parts]
    odd = next((width for width in (projection.K, *widths) if width % MULTIPLE), None)
    return None if odd is None else f"a layer of it has {odd} inputs or outputs, which is no multiple of {MULTIPLE}"
