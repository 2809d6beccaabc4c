"""One worker that holds everything."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qlora_dist.model.adapter import adapter_state, load_adapter_state, trainable_parameters
from qlora_dist.optim.optimizers import load_optimizer_state, optimizer_state
from qlora_dist.shard.strategy import FullState, OptimizerFactory


class Unsharded:
    """Plain backward, clip and step."""

    optimizer: Optimizer
    collective_forward = False

    def apply(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """See `Strategy.apply`."""
        self.model = model
        self.parameters = trainable_parameters(model)
        self.optimizer = make_optimizer(self.parameters)
        return model

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        """See `Strategy.backward`."""
        loss.backward()

    def clip(self, max_norm: float, loss_scale: float) -> Tensor:
        """See `Strategy.clip`."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        return clip_gradients(grads, max_norm, loss_scale)

    def step(self, skip: bool) -> None:
        """See `Strategy.step`."""
        if not skip:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def full_adapter(self) -> dict[str, Tensor]:
        """See `Strategy.full_adapter`."""
        return adapter_state(self.model)

    def load_adapter(self, adapter: dict[str, Tensor]) -> None:
        """See `Strategy.load_adapter`."""
        load_adapter_state(self.model, adapter)

    def full_state(self) -> FullState:
        """See `Strategy.full_state`."""
        return FullState(self.full_adapter(), *optimizer_state(self.optimizer, self.parameters))

    def load_full_state(self, state: FullState) -> None:
        """See `Strategy.load_full_state`."""
        self.load_adapter(state.adapter)
        load_optimizer_state(self.optimizer, self.parameters, state.optimizer, state.optimizer_scalars)


def clip_gradients(grads: list[Tensor], max_norm: float, loss_scale: float) -> Tensor:
    """Divide `grads` by `loss_scale` and clip them in place to the 2-norm `max_norm` over all of them (0: no clipping).

    Returns:
        The norm before clipping and after the division, a scalar on the gradients' device.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) / loss_scale
    if max_norm > 0:
        torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0) / loss_scale)
    elif loss_scale != 1.0:
        torch._foreach_div_(grads, loss_scale)
    return norm
