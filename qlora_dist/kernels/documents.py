"""Causal attention of lines that hold several documents each, none of which sees another.

B lines  T tokens a line  D documents  E head size
"""

from functools import cache

import torch
import torch.nn.functional as functional
from torch import Tensor


def documents_attention(
    q_BhTE: Tensor, k_BhTE: Tensor, v_BhTE: Tensor, borders_D1: Tensor, longest: int, scale: float,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k' * scale) v within each document, [B, heads, T, E]; keys and values may have fewer heads.

    Args:
        borders_D1: int32 [D + 1], 0 first and B * T last: where documents begin on all lines laid end to end. What pads
            a line counts as documents too.
        longest: tokens of the longest document, or more.
        window: a token sees itself and so many before it, less one; all where None.
    """
    batch, _, time, size = q_BhTE.shape
    if not has_flash(q_BhTE.device) or q_BhTE.dtype not in (torch.bfloat16, torch.float16):
        mask_B1TT = _mask(borders_D1, batch, time, window)
        grouped = q_BhTE.shape[1] != k_BhTE.shape[1]
        return functional.scaled_dot_product_attention(
            q_BhTE, k_BhTE, v_BhTE, attn_mask=mask_B1TT, scale=scale, enable_gqa=grouped
        )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BhTE, k_BhTE, v_BhTE))
    # FlashAttention's kernel for lines of unequal length, with its own backward.
    out = torch.ops.aten._flash_attention_forward(
        q, k, v, borders_D1, borders_D1, longest, longest, 0.0, True, False, scale=scale,
        window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0,
    )[0]  # fmt: skip
    return out.view(batch, time, -1, size).transpose(1, 2)


@cache
def has_flash(device: torch.device) -> bool:
    """Whether FlashAttention's kernels run there: on GPUs from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _mask(borders_D1: Tensor, batch: int, time: int, window: int | None) -> Tensor:
    """True where a token sees another, [B, 1, T, T]."""
    place = torch.arange(batch * time, device=borders_D1.device)
    document_BT = torch.searchsorted(borders_D1.long(), place, right=True).view(batch, time)
    back_TT = torch.arange(time, device=place.device)[:, None] - torch.arange(time, device=place.device)
    seen_TT = (back_TT >= 0) & (back_TT < (window or time))
    return (document_BT[:, :, None] == document_BT[:, None, :])[:, None] & seen_TT
