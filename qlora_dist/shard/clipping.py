"""The norm of gradients, and their clipping where each rank holds a part of them."""

import torch
import torch.distributed as dist
from torch import Tensor


def norm_of(grads: list[Tensor]) -> Tensor:
    """The 2-norm over all of `grads`, one or more tensors of one dtype on one device; a scalar like them.

    On a CPU it is summed in fp64: PyTorch's sums over millions of fp32 elements there are 1e-4 too small, and more the
    longer a tensor is, so that the norm would tell how the gradients are laid out.
    """
    dtype = torch.float64 if grads[0].device.type == "cpu" else None
    norms = torch._foreach_norm(grads, dtype=dtype)
    return (norms[0] if len(norms) == 1 else torch.stack(norms).square().sum().sqrt()).to(grads[0].dtype)


def clip_shards(
    grads: list[Tensor], max_norm: float, loss_scale: float, device: torch.device, factor: float = 1.0, copies: int = 1
) -> Tensor:
    """Multiply this rank's parts of the gradients by `factor`, divide by `loss_scale`, and clip them.

    Args:
        grads: on the device or, offloaded, on the host; none where this rank trains nothing.
        max_norm: of the gradients over all ranks; 0 leaves them unclipped.
        copies: so many ranks hold each part.

    Returns:
        Their norm over all ranks before clipping, a scalar on `device`.
    """
    by_device = {place: [grad for grad in grads if grad.device == place] for place in {grad.device for grad in grads}}
    squares = torch.zeros((), device=device)
    for on_device in by_device.values():
        squares += norm_of(on_device).square().to(device)
    # Over all copies, so that no copy gets a norm with another last bit and drifts from the rest.
    dist.all_reduce(squares)
    norm = (squares / copies).sqrt() * (factor / loss_scale)
    if max_norm > 0:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0) * (factor / loss_scale)
        for place, on_device in by_device.items():
            torch._foreach_mul_(on_device, scale.to(place))
    elif factor != loss_scale and grads:
        torch._foreach_mul_(grads, factor / loss_scale)
    return norm
