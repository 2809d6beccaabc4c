"""RMSNorm, fused: one pass each way, and nothing of it kept in fp32 but 1 / rms.

M tokens of the micro-batch (B rows of T), H hidden size, K inputs of a projection, P its padded LoRA rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_dist.kernels.rmsnorm import rms_norm, rms_norm_backward
from qlora_dist.model.projection import Projection, current, statistics_dtype

# All of them compute weight * x / rms(x), with the square root in fp32.
NORM_CLASSES = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm"})


def normed(norm: Any, x_MH: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    """RMSNorm of x in the first columns of a buffer [M, K + P] for `projection`, and 1 / rms [M]."""
    out_MW = projection.room(x_MH.shape[0], x_MH)
    rstd_M = torch.empty(x_MH.shape[0], dtype=statistics_dtype(x_MH), device=x_MH.device)
    rms_norm(x_MH, current(norm, "weight"), norm.variance_epsilon, out_MW[:, : projection.K], rstd_M)
    return out_MW, rstd_M


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTH: Tensor, norm: Any) -> Tensor:
        x_MH, out_BTH = x_BTH.reshape(-1, x_BTH.shape[-1]), torch.empty_like(x_BTH)
        rstd_M = torch.empty(x_MH.shape[0], dtype=statistics_dtype(x_MH), device=x_MH.device)
        rms_norm(x_MH, current(norm, "weight"), norm.variance_epsilon, out_BTH.view(x_MH.shape), rstd_M)
        # The weight is asked for again in the backward: a sharded one is gathered anew.
        ctx.norm = norm
        ctx.save_for_backward(x_BTH, rstd_M)
        return out_BTH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BTH: Tensor) -> tuple[Tensor, None]:
        x_BTH, rstd_M = ctx.saved_tensors
        x_MH, dx_BTH = x_BTH.reshape(-1, x_BTH.shape[-1]), torch.empty_like(x_BTH)
        weight_H, dx_MH = current(ctx.norm, "weight"), dx_BTH.view(x_MH.shape)
        rms_norm_backward(dout_BTH.reshape(x_MH.shape), x_MH, weight_H, rstd_M, None, dx_MH)
        return dx_BTH, None


def fuse_norm(base: Any) -> None:
    """Give the last norm of a causal LM its fused forward, unless it has another form, or trains."""
    norm: nn.Module | None = getattr(getattr(base, base.base_model_prefix, None), "norm", None)
    if type(norm).__name__ not in NORM_CLASSES or norm is None or norm.weight.requires_grad:
        return

    def forward(hidden_states: Tensor) -> Tensor:
        output: Tensor = _RMSNorm.apply(hidden_states, norm)
        return output

    norm.forward = forward  # type: ignore[method-assign]
