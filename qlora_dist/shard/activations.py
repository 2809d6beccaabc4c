"""Activations wait for their backward in pinned host memory.

What autograd saves during a forward is copied to the host on a stream of its own and comes back ahead of its use. With
gradient checkpointing, and in fused layers that recompute, that is the input of each decoder layer.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_dist.shard.units import base_of

# Smaller tensors stay: their copies would take longer than what they free is worth.
MIN_BYTES = 2**20
# So much is on its way back while the backward of what was saved later runs.
AHEAD_BYTES = 2**28


def offload_activations(model: nn.Module, min_bytes: int = MIN_BYTES) -> None:
    """From now on what the model's forward saves for its backward, where it has `min_bytes` or more, lives on the host.

    Parameters and views of them are left where they are: a strategy gathers and frees those.
    """
    base = base_of(model)
    forward: Callable[..., Any] = base.forward

    @wraps(forward)
    def offloading(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        away = Away(min_bytes)
        with saved_tensors_hooks(away.pack, away.unpack):
            return forward(*args, **kwargs)

    base.forward = offloading


class Kept:
    """One tensor on the host.

    uses: how often autograd saved it and has not asked for it yet.
    back: the tensor on its device, from the start of its copy to its last use.
    """

    def __init__(self, place: int, tensor: Tensor, host: Tensor):
        self.place, self.device, self.host = place, tensor.device, host
        self.source = StorageWeakRef(tensor.untyped_storage())
        self.uses = 1
        self.back: Tensor | None = None
        self.done: torch.cuda.Event | None = None


class Away:
    """What one forward has saved, in that order."""

    def __init__(self, min_bytes: int):
        self.min_bytes = min_bytes
        self.kept: list[Kept] = []
        self.known: dict[tuple[Any, ...], Kept] = {}

    def pack(self, tensor: Tensor) -> Tensor | Kept:
        """Called by autograd for a tensor to save."""
        if not self._moves(tensor):
            return tensor
        ref = tensor.untyped_storage()._cdata
        key = (ref, tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        kept = self.known.get(key)
        # An address means the same storage only as long as that one lives.
        if kept is not None and not kept.source.expired():
            kept.uses += 1
            return kept
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
        if tensor.is_cuda:
            # Only what has been computed can be copied; back again nothing has to be waited for.
            _stream(tensor.device).wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.no_grad(), _copying(tensor.device):
            host.copy_(tensor.detach(), non_blocking=True)
        if tensor.is_cuda:
            tensor.record_stream(_stream(tensor.device))
        kept = self.known[key] = Kept(len(self.kept), tensor, host)
        self.kept.append(kept)
        return kept

    def unpack(self, saved: Tensor | Kept) -> Tensor:
        """Called by autograd where the backward needs it."""
        if isinstance(saved, Tensor):
            return saved
        self._fetch_from(saved.place)
        tensor = saved.back
        assert tensor is not None
        if saved.done is not None:
            torch.cuda.current_stream(saved.device).wait_event(saved.done)
            tensor.record_stream(torch.cuda.current_stream(saved.device))
        saved.uses -= 1
        if saved.uses <= 0:
            saved.back = saved.done = None
        return tensor

    def _moves(self, tensor: Tensor) -> bool:
        whole = tensor if tensor._base is None else tensor._base
        return (
            type(tensor) is Tensor
            and not isinstance(whole, nn.Parameter)
            and tensor.numel() * tensor.element_size() >= self.min_bytes
        )

    def _fetch_from(self, place: int) -> None:
        """Start the copies of the tensor at `place` and of those before it, which the backward needs next."""
        ahead = 0
        for earlier in range(place, -1, -1):
            if ahead > AHEAD_BYTES:
                return
            kept = self.kept[earlier]
            ahead += kept.host.numel() * kept.host.element_size()
            if kept.back is None and (kept.uses > 0 or kept.place == place):
                with torch.no_grad(), _copying(kept.device):
                    kept.back = torch.empty_like(kept.host, device=kept.device)
                    kept.back.copy_(kept.host, non_blocking=True)
                    if kept.device.type == "cuda":
                        kept.done = torch.cuda.current_stream(kept.device).record_event()


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


def _copying(device: torch.device) -> AbstractContextManager[Any]:
    """A block whose copies run beside the computation."""
    return torch.cuda.stream(_stream(device)) if device.type == "cuda" else nullcontext()
