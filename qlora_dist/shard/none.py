"""One worker that holds everything."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qlora_dist.model.adapter import adapter_state, load_adapter_state, trainable_parameters
from qlora_dist.optim.optimizers import init_optimizer_state, take_step
from qlora_dist.shard.clipping import norm_of
from qlora_dist.shard.strategy import FullState, OptimizerFactory
from qlora_dist.shard.views import FlatViews, full_state, load_full_state
from qlora_dist.shard.waits import Waits


class Unsharded:
    """Plain backward, clip and step, over one buffer of all gradients."""

    optimizer: Optimizer
    collective_forward = False

    def apply(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """See `Strategy.apply`."""
        self.model = model
        self.flat = FlatViews(model, self._groups(trainable_parameters(model)))
        self.optimizer = make_optimizer(self.flat.pieces)
        init_optimizer_state(self.optimizer, self.flat.pieces, self.flat.in_8bit)
        self.scale: Tensor | None = None
        self.waits = Waits(self.flat.grad_N.device)
        return model

    def _groups(self, parameters: dict[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
        return [parameters]

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        """See `Strategy.backward`."""
        loss.backward()

    def clip(self, max_norm: float, loss_scale: float) -> Tensor:
        """See `Strategy.clip`. The optimizer multiplies the gradients as it reads them."""
        norm = norm_of([self.flat.grad_N]) / loss_scale
        self.scale = None
        if max_norm > 0:
            self.scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0) / loss_scale
        elif loss_scale != 1.0:
            self.scale = torch.full_like(norm, 1.0 / loss_scale)
        return norm

    def step(self, skip: bool | Tensor) -> None:
        """See `Strategy.step`."""
        take_step(self.optimizer, skip, self.scale)
        self.flat.grad_N.zero_()

    def full_adapter(self) -> dict[str, Tensor]:
        """See `Strategy.full_adapter`."""
        return adapter_state(self.model)

    def load_adapter(self, adapter: dict[str, Tensor]) -> None:
        """See `Strategy.load_adapter`."""
        load_adapter_state(self.model, adapter)

    def full_state(self) -> FullState:
        """See `Strategy.full_state`."""
        return full_state(self.optimizer, self.flat, self.full_adapter())

    def load_full_state(self, state: FullState) -> None:
        """See `Strategy.load_full_state`."""
        self.load_adapter(state.adapter)
        load_full_state(self.optimizer, self.flat, state)
