"""SwiGLU, h = silu(gate) * up, and its backward, which makes h anew instead of having kept it.

M: tokens  F: features of the MLP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_dist.kernels.launch import compute_dtype

if TYPE_CHECKING:
    pass


def swiglu(gate_MF: Tensor, up_MF: Tensor, out_MF: Tensor) -> None:
    """out = gate * sigmoid(gate) * up, rounded once; views with any row stride (gate and up of one buffer)."""
    _reference(gate_MF, up_MF, out_MF)


def swiglu_backward(
    dh_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, dgate_MF: Tensor, dup_MF: Tensor, h_MF: Tensor | None = None
) -> None:
    """d loss / d gate and d loss / d up from dh = d loss / d h, and h itself into `h_MF` where given.

    With s = sigmoid(gate): dgate = dh * up * s * (1 + gate * (1 - s)), dup = dh * gate * s. Views as in `swiglu`; an
    output may be one of the inputs.
    """
    _backward_reference(dh_MF, gate_MF, up_MF, dgate_MF, dup_MF, h_MF)


def _reference(gate_MF: Tensor, up_MF: Tensor, out_MF: Tensor) -> None:
    dtype = compute_dtype(gate_MF)
    g, u = gate_MF.to(dtype), up_MF.to(dtype)
    out_MF.copy_(g * torch.sigmoid(g) * u)


def _backward_reference(
    dh_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, dgate_MF: Tensor, dup_MF: Tensor, h_MF: Tensor | None
) -> None:
    dtype = compute_dtype(gate_MF)
    dh, g, u = dh_MF.to(dtype), gate_MF.to(dtype), up_MF.to(dtype)
    s = torch.sigmoid(g)
    dgate, dup, h = dh * u * s * (1 + g * (1 - s)), dh * g * s, g * s * u
    dgate_MF.copy_(dgate)
    dup_MF.copy_(dup)
    if h_MF is not None:
        h_MF.copy_(h)
