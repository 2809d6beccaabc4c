"""Moments set to zero through a strategy: those that are named, and no others; what is in 8 bits means zero then."""

from pathlib import Path

import pytest
import torch

from qlora_dist.config.schema import TrainConfig
from qlora_dist.optim.optimizers import zero_code
from qlora_dist.shard.none import Unsharded
from qlora_dist.train.moments import reset_moments
from tests.unit.test_flat_views import OPTIMS, applied, take


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("optim", [optim for optim in OPTIMS if optim != "sgd"])
def test_the_named_moments_start_from_zero_and_no_others(tiny_model: Path, optim: str, everything: bool) -> None:
    strategy, model = applied(tiny_model, Unsharded, TrainConfig(optim=optim, learning_rate=1e-2))
    take(strategy, model, range(3))
    before = strategy.full_state()
    names = sorted({full_name.rpartition("|")[0] for full_name in before.optimizer})
    chosen = set(names if everything else names[::2])
    reset_moments(strategy, None if everything else sorted(chosen))
    after = strategy.full_state()
    assert after.optimizer_scalars == before.optimizer_scalars
    assert all(torch.equal(after.adapter[name], before.adapter[name]) for name in before.adapter)
    changed = 0
    for full_name, tensor in after.optimizer.items():
        name, _, key = full_name.rpartition("|")
        if name not in chosen or not tensor.dim():
            assert torch.equal(tensor, before.optimizer[full_name]), full_name
            continue
        zero = zero_code(strategy.optimizer, key) if tensor.dtype == torch.uint8 else 0
        assert bool((tensor == zero).all()), full_name
        changed += not torch.equal(tensor, before.optimizer[full_name])
    assert changed >= len(chosen)
    take(strategy, model, range(3, 4))
    assert all(bool(tensor.isfinite().all()) for tensor in strategy.full_adapter().values())
