"""Optimizer state that lives in pinned host memory and visits the device for the step, one parameter's at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Lookup tables of bitsandbytes' 8-bit format: constants that every fresh state brings again.
CONSTANT_KEYS = frozenset({"qmap1", "qmap2"})


def keep_on_host(optimizer: Optimizer) -> None:
    """From now on `optimizer.step` fetches each parameter's state before its update and sends it back after it.

    Parameters in host memory are stepped there, and their state stays where it is.
    """
    marked: Any = optimizer
    marked.state_on_host = True
    if not hasattr(optimizer, "device_steps"):
        marked.step = partial(_step_by_parameter, optimizer, optimizer.step)


def send_home(optimizer: Any, parameter: nn.Parameter) -> None:
    """Move what state `parameter` has to the host, if `optimizer` keeps it there.

    The device may still be writing it when this returns: whoever reads it on the host waits for the device first.
    """
    if not getattr(optimizer, "state_on_host", False):
        return
    state = optimizer.state.get(parameter, {})
    for key, value in _that_moves(state, parameter.device):
        home = torch.empty_like(value, device="cpu", pin_memory=True)
        state[key] = home.copy_(value, non_blocking=True)


def _step_by_parameter(optimizer: Any, step: Any) -> None:
    groups = optimizer.param_groups
    try:
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                optimizer.param_groups = [group | {"params": [parameter]}]
                with state_on_device(optimizer, parameter):
                    step()
    finally:
        optimizer.param_groups = groups


@contextmanager
def state_on_device(optimizer: Any, parameter: nn.Parameter) -> Iterator[None]:
    """Within, the state of `parameter` is on its device, wherever `optimizer` keeps it."""
    if not getattr(optimizer, "state_on_host", False):
        yield
        return
    homes = _fetch(optimizer.state.get(parameter, {}), parameter.device)
    yield
    state = optimizer.state[parameter]
    for key, home in homes.items():
        state[key] = home.copy_(state[key], non_blocking=True)
    send_home(optimizer, parameter)


def _fetch(state: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Put the state's tensors that have a home on the device; the homes."""
    homes = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.device != device and v.dim()}
    for key, home in homes.items():
        state[key] = home.to(device, non_blocking=True)
    return homes


def _that_moves(state: dict[str, Any], device: torch.device) -> list[tuple[str, Tensor]]:
    # torch keeps its step counts, which have no dimension, on the host itself.
    return [
        (key, value)
        for key, value in state.items()
        if isinstance(value, Tensor) and value.device.type != "cpu" and value.dim() and key not in CONSTANT_KEYS
    ]
