"""bitsandbytes' AdamW, its state as it is, stepped by kernels of ours: one launch a parameter, no wait for the device.

bitsandbytes counts steps on the host. Whether a step was left out is known to the device alone, so `state["step"]`
counts the steps asked for, a counter on the device those left out, and `settle` brings the two together.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qlora_dist.kernels.adamw_8bit import AdamW, Map, Moment, adamw_8bit_, adamw_32bit_, map_of
from qlora_dist.optim.on_host import state_on_device


class DeviceSteps:
    """The steps of one of bitsandbytes' AdamW optimizers, in place of its own `step`."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.left_out: dict[torch.device, Tensor] = {}
        self.betas: dict[tuple[torch.device, tuple[float, float]], Tensor] = {}
        self.maps: dict[tuple[torch.device, str], Map] = {}

    @torch.no_grad()
    def step(self, skip: Tensor | None = None, scale: Tensor | None = None) -> None:
        """Update every parameter that has a gradient.

        Args:
            skip: bool, one element on the device: leave this step out. All parameters have gradients then, or the count
                of one that has none is a step short.
            scale: fp32, one element on the device, by which gradients are multiplied.
        """
        optimizer = self.optimizer
        flags: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}
        corrections: dict[Any, Tensor] = {}
        for g, group in enumerate(optimizer.param_groups):
            for p, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                device, state = parameter.device, optimizer.state[parameter]
                if not state:
                    optimizer.init_state(group, parameter, g, p)
                if device not in flags:
                    flags[device] = tuple(None if t is None else t.to(device) for t in (skip, scale))  # type: ignore[assignment]
                    self._count(device, flags[device][0])
                state["step"] += 1
                key = device, group["betas"], state["step"]
                if key not in corrections:
                    corrections[key] = self._corrections(*key)
                here, factor = flags[device]
                (beta1, beta2), lr, decay = group["betas"], float(group["lr"]), float(group["weight_decay"])
                what = AdamW(lr, beta1, beta2, float(group["eps"]), decay, corrections[key], factor, here)
                with state_on_device(optimizer, parameter):
                    optimizer.prefetch_state(parameter)
                    self._update(parameter, state, what)

    def settle(self) -> None:
        """Let every count be that of steps taken. Waits for the device where steps may have been left out."""
        for device, count in self.left_out.items():
            left_out = int(count)
            if left_out:
                for parameter, state in self.optimizer.state.items():
                    if parameter.device == device and "step" in state:
                        state["step"] -= left_out
                count.zero_()

    def _count(self, device: torch.device, skip: Tensor | None) -> None:
        if device not in self.left_out:
            self.left_out[device] = torch.zeros((), dtype=torch.float64, device=device)
        if skip is not None:
            self.left_out[device] += skip

    def _corrections(self, device: torch.device, betas: tuple[float, float], asked: int) -> Tensor:
        if (device, betas) not in self.betas:
            self.betas[device, betas] = torch.tensor(betas, dtype=torch.float64, device=device)
        return (1 - self.betas[device, betas] ** (asked - self.left_out[device])).float()

    def _update(self, parameter: nn.Parameter, state: dict[str, Any], what: AdamW) -> None:
        assert parameter.grad is not None
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
        grad = parameter.grad.contiguous()
        if state["state1"].dtype != torch.uint8:
            adamw_32bit_(parameter.data, grad, state["state1"], state["state2"], what)
            return
        first, second = (
            Moment(state[f"state{n}"], state[f"absmax{n}"], self._map(parameter.device, f"qmap{n}", state))
            for n in ("1", "2")
        )
        adamw_8bit_(parameter.data, grad, first, second, what)

    def _map(self, device: torch.device, key: str, state: dict[str, Any]) -> Map:
        if (device, key) not in self.maps:
            self.maps[device, key] = map_of(state[key].to(device))
        return self.maps[device, key]
