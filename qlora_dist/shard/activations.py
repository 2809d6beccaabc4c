"""Activations wait for their backward in pinned host memory, whatever the model.

What autograd saves during a forward goes through the host. With gradient checkpointing, and in fused layers that
recompute, that is the input of each decoder layer.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch.autograd.graph import saved_tensors_hooks

from qlora_dist.model.host_store import MIN_BYTES, Stored, store_of
from qlora_dist.shard.units import base_of

# What is let go, and sent for, together, in a model whose layers nobody knows.
GROUP_BYTES = 2**27


def offload_activations(model: nn.Module, min_bytes: int = MIN_BYTES) -> None:
    """From now on what the model's forward saves for its backward, where it has `min_bytes` or more, lives on the host.

    Parameters and views of them are left where they are: a strategy gathers and frees those. What comes after the last
    decoder layer stays too: the backward asks for it at once.
    """
    base = base_of(model)
    forward: Callable[..., Any] = base.forward
    classes = set(base._no_split_modules or ())
    layers = [module for module in base.modules() if type(module).__name__ in classes]
    begins = over = False

    def begin(*_: Any) -> None:
        nonlocal begins
        begins = True

    def end(*_: Any) -> None:
        nonlocal over
        over = True

    def pack(tensor: Tensor) -> Tensor | Stored:
        nonlocal begins
        # Something small begins no layer: checkpointing may save a dummy of another device first.
        if over or tensor.nbytes < min_bytes:
            return tensor
        store = store_of(tensor.device)
        if begins or (not layers and store.group_bytes >= GROUP_BYTES):
            store.begin_layer()
            begins = False
        return store.pack(tensor, min_bytes)

    for layer in layers:
        layer.register_forward_pre_hook(begin)
    if layers:
        layers[-1].register_forward_hook(end)

    @wraps(forward)
    def offloading(*args: Any, **kwargs: Any) -> Any:
        nonlocal over
        over = False
        if not is_grad_enabled():
            return forward(*args, **kwargs)
        with saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    base.forward = offloading


def unpack(saved: Tensor | Stored) -> Tensor:
    """The tensor on its device, where the backward needs it."""
    return saved if isinstance(saved, Tensor) else store_of(saved.kept.device).get(saved)
