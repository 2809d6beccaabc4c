"""Optimizers by transformers' names, over named parameters; their state by parameter name.

bitsandbytes' AdamW (its 8-bit and 32-bit ones, paged or not) and torch's optimizers on a GPU leave a step out by a flag
that only the device knows, and multiply gradients by what only the device knows: `take_step`.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import TrainConfig
from qlora_dist.optim.adamw import DeviceSteps
from qlora_dist.optim.on_host import CONSTANT_KEYS, keep_on_host, send_home


def build_optimizer(
    parameters: dict[str, nn.Parameter],
    config: TrainConfig,
    notice: Callable[[str], None] = print,
    on_host: bool = False,
) -> Optimizer:
    """The optimizer that `train.optim` names, over `parameters` in their order.

    With `train.loraplus_lr_ratio` (LoRA+, https://arxiv.org/abs/2402.12354) the B matrices of the adapter are a
    parameter group of their own, whose `lr_ratio` multiplies the learning rate.

    Paged optimizers keep state in memory that can leave a GPU under pressure. A CPU has no such thing: there they
    run unpaged, and `notice` is told so.

    Args:
        on_host: keep the state in pinned host memory (`keep_on_host`); a paged optimizer runs unpaged then.
    """
    device = next(iter(parameters.values())).device
    betas = (config.adam_beta1, config.adam_beta2)
    adam: dict[str, Any] = dict(
        lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )
    lion: dict[str, Any] = dict(lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay)
    name: str = config.optim
    if on_host and device.type == "cpu":
        notice("shard.offload: the adapter is trained in host memory, and so is the optimizer's state")
        on_host = False
    if name.startswith("paged_") and on_host:
        name = name.removeprefix("paged_")
        notice(f"train.optim: {config.optim} runs as {name}, whose whole state shard.offload keeps in host memory")
    if name.startswith("paged_") and device.type != "cuda":
        unpaged = name.removeprefix("paged_")
        notice(f"train.optim: {name} runs as {unpaged} on a {device.type.upper()}, which has no memory to page from")
        name = unpaged
    optimizer: Any = _make(name, parameter_groups(parameters, config), adam, lion, config, device)
    if getattr(optimizer, "optimizer_name", None) == "adam":
        optimizer.device_steps = DeviceSteps(optimizer)
        optimizer.step = optimizer.device_steps.step
    elif hasattr(optimizer, "update_step"):
        optimizer.step = partial(_step_without_waiting, optimizer)
    if on_host:
        keep_on_host(optimizer)
    made: Optimizer = optimizer
    return made


def take_step(optimizer: Any, skip: bool | Tensor = False, scale: Tensor | None = None) -> None:
    """One step of what `build_optimizer` made, or none.

    Args:
        skip: leave the step out; a tensor of one element stays on the device, for Lion alone the host waits for it.
        scale: fp32, one element on the device: gradients are multiplied by it first (and may be changed in place).
    """
    flag = skip if isinstance(skip, Tensor) else None
    if flag is None and skip:
        return
    if hasattr(optimizer, "device_steps"):
        optimizer.step(flag, scale)
    elif optimizer.defaults.get("fused"):
        optimizer.found_inf = None if flag is None else flag.float()
        optimizer.grad_scale = None if scale is None else scale.reciprocal()
        optimizer.step()
        optimizer.found_inf = optimizer.grad_scale = None
    elif flag is None or not bool(flag):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if scale is not None:
            torch._foreach_mul_(grads, scale)
        optimizer.step()


def settle(optimizer: Any) -> None:
    """Wait until the state can be read on the host, and its step counts are those of steps taken."""
    if hasattr(optimizer, "device_steps"):
        optimizer.device_steps.settle()
    if getattr(optimizer, "is_paged", False) or getattr(optimizer, "state_on_host", False):
        for device in {p.device for group in optimizer.param_groups for p in group["params"]}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)


@torch.no_grad()
def _step_without_waiting(optimizer: Any) -> None:
    """bitsandbytes' step, which waits for the device after every parameter, without that: `settle` waits."""
    for g, group in enumerate(optimizer.param_groups):
        for p, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            if not optimizer.state[parameter]:
                optimizer.init_state(group, parameter, g, p)
            optimizer.prefetch_state(parameter)
            optimizer.update_step(group, parameter, g, p)


def _make(
    name: str, trained: list[dict[str, Any]], adam: dict[str, Any], lion: dict[str, Any], config: TrainConfig,
    device: torch.device,
) -> Optimizer:  # fmt: skip
    # It takes a second to import and talks while doing so; the model room has it muted by now.
    import bitsandbytes as bnb

    # The implementations that take a flag and a scale from the device; elsewhere the host has them at no cost.
    fused = device.type == "cuda" or None
    match name:
        case "paged_adamw_8bit":
            return bnb.optim.PagedAdamW8bit(trained, **adam)
        case "adamw_8bit":
            return bnb.optim.AdamW8bit(trained, **adam)
        case "paged_adamw_32bit":
            return bnb.optim.PagedAdamW32bit(trained, **adam)
        case "adamw_32bit":
            return bnb.optim.AdamW32bit(trained, **adam)
        case "paged_lion_8bit":
            return bnb.optim.PagedLion8bit(trained, **lion)
        case "lion_8bit":
            return bnb.optim.Lion8bit(trained, **lion)
        case "adamw_torch":
            return torch.optim.AdamW(trained, **adam, fused=fused)
        case "sgd":
            return torch.optim.SGD(trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)
    raise ValueError(f"unknown optimizer {name}")


def parameter_groups(parameters: dict[str, nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    """One group of all parameters, or with LoRA+ two: the B matrices (of embeddings too), and the rest before them."""
    ratio = config.loraplus_lr_ratio
    if ratio is None:
        return [{"params": list(parameters.values())}]
    raised = [p for name, p in parameters.items() if ".lora_B." in name or ".lora_embedding_B" in name]
    ids = {id(p) for p in raised}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters.values() if id(p) not in ids]},
        {"params": raised, "lr": config.learning_rate * ratio, "lr_ratio": ratio},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Use `learning_rate` for the next step, times the ratio of a group that has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)


def init_optimizer_state(optimizer: Any, parameters: dict[str, nn.Parameter], in_8bit: Mapping[str, bool]) -> None:
    """Make bitsandbytes' state now, with 8-bit state for those parameters that `in_8bit` says, whatever their size.

    bitsandbytes decides by a parameter's own size, so that a piece of a large weight would get another format than the
    weight. Optimizers of torch make their state at the first step, and are left alone.
    """
    if not hasattr(optimizer, "init_state"):
        return
    for name, parameter, place in _in_groups(optimizer, parameters):
        _init_state(optimizer, parameter, place, in_8bit[name])
        send_home(optimizer, parameter)


def zero_code(optimizer: Any, key: str) -> int:
    """The byte that stands for 0 in bitsandbytes' 8-bit state `key` (state1 is signed, state2 is not)."""
    name = "dynamic" if key == "state1" else "udynamic"
    if name not in optimizer.name2qmap:
        optimizer.fill_qmap()
    return int((optimizer.name2qmap[name] == 0).nonzero()[0])


def _init_state(optimizer: Any, parameter: nn.Parameter, place: tuple[int, int], in_8bit: bool | None) -> None:
    usual = optimizer.args.min_8bit_size
    if in_8bit is not None:
        optimizer.args.min_8bit_size = 0 if in_8bit else parameter.numel() + 1
    optimizer.init_state(optimizer.param_groups[place[0]], parameter, *place)
    optimizer.args.min_8bit_size = usual


def _in_groups(
    optimizer: Optimizer, parameters: dict[str, nn.Parameter]
) -> Iterator[tuple[str, nn.Parameter, tuple[int, int]]]:
    places = {
        id(parameter): (g, p)
        for g, group in enumerate(optimizer.param_groups)
        for p, parameter in enumerate(group["params"])
    }
    for name, parameter in parameters.items():
        yield name, parameter, places[id(parameter)]


def optimizer_state(
    optimizer: Optimizer, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The state as tensors and numbers, each under `PARAMETER|KEY`; lookup tables that never change are left out."""
    settle(optimizer)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key in CONSTANT_KEYS or value is None:
                continue
            (tensors if isinstance(value, Tensor) else numbers)[f"{name}|{key}"] = value
    return tensors, numbers


def load_optimizer_state(
    optimizer: Optimizer,
    parameters: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
    numbers: dict[str, float],
    in_8bit: Mapping[str, bool] | None = None,
) -> None:
    """Put back what `optimizer_state` gave, bit for bit, paged buffers included.

    Args:
        in_8bit: as for `init_optimizer_state`; a parameter's size decides where it is not given.

    Raises:
        UserError: the state is another optimizer's or another adapter's.
    """
    settle(optimizer)
    stored: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for full_name, value in (*tensors.items(), *numbers.items()):
        name, _, key = full_name.rpartition("|")
        if name not in stored:
            raise UserError("optimizer-state-extra", name=name)
        stored[name][key] = value
    for name, parameter, place in _in_groups(optimizer, parameters):
        if not stored[name]:
            continue
        if hasattr(optimizer, "init_state"):
            bits = None if in_8bit is None else in_8bit[name]
            _load_into_bitsandbytes(optimizer, name, parameter, place, stored[name], bits)
        else:
            if "state1" in stored[name]:
                raise UserError("optimizer-state-format", name=name)
            # torch keeps its step counts on the host, except where it steps by a flag of the device's.
            counts_stay = not optimizer.defaults.get("fused")
            optimizer.state[parameter] = {
                key: value.clone() if isinstance(value, Tensor) and not value.dim() and counts_stay
                else _like(value, parameter)
                for key, value in stored[name].items()
            }  # fmt: skip
        send_home(optimizer, parameter)


def _load_into_bitsandbytes(
    optimizer: Any,
    name: str,
    parameter: nn.Parameter,
    place: tuple[int, int],
    stored: dict[str, Any],
    in_8bit: bool | None,
) -> None:
    _init_state(optimizer, parameter, place, in_8bit)
    state = optimizer.state[parameter]
    if stored.keys() != state.keys() - CONSTANT_KEYS:
        raise UserError("optimizer-state-format", name=name)
    for key, value in stored.items():
        if not isinstance(value, Tensor):
            state[key] = int(value)
        elif value.dtype != state[key].dtype or value.shape != state[key].shape:
            raise UserError("optimizer-state-format", name=name)
        else:
            state[key].copy_(value)


def _like(value: Any, parameter: nn.Parameter) -> Any:
    return value.to(parameter.device).clone() if isinstance(value, Tensor) else value
