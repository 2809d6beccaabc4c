"""The inner optimizer's moments where an exchange leaves the coordinates that they belong to."""

from collections.abc import Iterable

import torch

from qlora_dist.optim.optimizers import zero_code
from qlora_dist.shard.strategy import Strategy


def reset_moments(strategy: Strategy, names: Iterable[str] | None) -> None:
    """Set an optimizer's moments of these parameters, or of all, to zero; its step counts stay. All ranks call it.

    Args:
        names: PEFT's.
    """
    state = strategy.full_state()
    chosen = None if names is None else set(names)
    for full_name, tensor in state.optimizer.items():
        name, _, key = full_name.rpartition("|")
        if tensor.dim() and (chosen is None or name in chosen):
            is_code = tensor.dtype == torch.uint8 and hasattr(strategy.optimizer, "name2qmap")
            tensor.fill_(zero_code(strategy.optimizer, key) if is_code else 0)
    strategy.load_full_state(state)
