"""Rotary position embedding in place, in Llama's rotate-half convention.

M: tokens  H: heads  D: head dimension  T: rows of the table of angles
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from qlora_dist.kernels.launch import compute_dtype

if TYPE_CHECKING:
    pass


def rotate_(x_MHD: Tensor, cos_TD: Tensor, sin_TD: Tensor, inverse: bool = False) -> Tensor:
    """x * cos + rotate_half(x) * sin, in place; row m takes row m % T of `cos_TD` and `sin_TD`. Returns `x_MHD`.

    `x_MHD` is a view with any stride between tokens and between heads, the last dimension contiguous (queries and keys
    beside each other in one buffer are one view). `cos_TD` and `sin_TD` are contiguous rows as transformers gives
    them, of any floating dtype: their two halves are equal, and only the first is read. `inverse` applies the
    transposed matrix, which is the backward (with a scaled table, as YaRN's, it is no inverse).
    In place: outside of autograd's sight, or inside a `once_differentiable` function.
    """
    if x_MHD.shape[0] and x_MHD.shape[0] % cos_TD.shape[0]:
        raise ValueError(f"{x_MHD.shape[0]} tokens are no multiple of the {cos_TD.shape[0]} rows of angles")
    _reference(x_MHD, cos_TD, sin_TD, inverse)
    return x_MHD


def _reference(x_MHD: Tensor, cos_TD: Tensor, sin_TD: Tensor, inverse: bool) -> None:
    tokens, _, dim = x_MHD.shape
    dtype = compute_dtype(x_MHD)
    repeats = tokens // cos_TD.shape[0] if tokens else 0
    cos = cos_TD[:, : dim // 2].to(dtype).repeat(repeats, 1)[:, None]
    sin = sin_TD[:, : dim // 2].to(dtype).repeat(repeats, 1)[:, None]
    if inverse:
        sin = -sin
    a, b = x_MHD.to(dtype).chunk(2, -1)
    rotated = a * cos - b * sin, b * cos + a * sin
    x_MHD[..., : dim // 2].copy_(rotated[0])
    x_MHD[..., dim // 2 :].copy_(rotated[1])
