"""The small interface behind which a strategy hides how training state is spread over workers."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig
from qlora_dist.shard.frozen import Shards
from qlora_dist.shard.replication import Frozen
from qlora_dist.shard.waits import Waits

# Of a memory budget, what offloaded shards may use of the device; gathered units and activations need the rest.
RESIDENT_SHARE = 0.4
OptimizerFactory = Callable[[dict[str, nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class FullState:
    """Everything that trains, unsharded, as one worker would hold it.

    adapter: tensors under PEFT's names.
    optimizer: tensors under `PARAMETER|KEY`.
    optimizer_scalars: the state's plain numbers under the same kind of name.
    """

    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    optimizer_scalars: dict[str, float]


class Strategy(Protocol):
    """How one worker's backward passes become one step of all workers. The loop is the same over all of them."""

    optimizer: Optimizer
    # Whether a forward takes all ranks together, so that each must run as many as the others, evaluation included.
    collective_forward: bool
    # Made by `apply`. The loop has it count `clip`; what forward and backward wait for, the strategy itself does.
    waits: Waits

    def apply(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """Spread `model` as the strategy does, build its optimizer, and return the module to call."""

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        """Add the gradients of `loss` (a scalar, this worker's share of the global loss).

        With `last_micro_batch` the sum over the workers begins while the backward still runs.
        """

    def clip(self, max_norm: float, loss_scale: float) -> Tensor:
        """Finish the sum over workers, divide by `loss_scale`, clip, and return the norm before clipping.

        The gradients themselves may be as they were until the step.

        Args:
            max_norm: 0 leaves the gradients as they are.
        """

    def step(self, skip: bool | Tensor) -> None:
        """Take the optimizer step, or leave it out, and clear the gradients.

        Args:
            skip: a tensor of one element is not read by the host where strategy and optimizer can do without.
        """

    def full_adapter(self) -> dict[str, Tensor]:
        """The whole adapter on the CPU, by PEFT's names, the same on every rank. All ranks call it together."""

    def load_adapter(self, adapter: dict[str, Tensor]) -> None:
        """Take up an adapter as `full_adapter` gives it."""

    def full_state(self) -> FullState:
        """The unsharded state, the same on every rank. All ranks call it together."""

    def load_full_state(self, state: FullState) -> None:
        """Take `state` up, whatever strategy and world size it was saved under."""


def base_shards(config: RunConfig, world_size: int, local_world_size: int) -> int:
    """Over how many workers one copy of the base is spread; neighbouring ranks hold it together, in their order.

    Where `shard.frozen` is auto, as long as nobody decided to replicate it.

    Raises:
        UserError: see `workers_of_a_copy`.
    """
    if config.strategy in ("fsdp", "hybrid") and config.shard.frozen == "replicate":
        return 1
    return workers_of_a_copy(config, world_size, local_world_size)


def workers_of_a_copy(config: RunConfig, world_size: int, local_world_size: int) -> int:
    """Over how many workers one copy of whatever a strategy shards is spread.

    Raises:
        UserError: the workers cannot form groups of that size.
    """
    if config.strategy in ("fsdp", "zero3"):
        return world_size
    if config.strategy != "hybrid":
        return 1
    size = config.shard.hybrid_shard_size or local_world_size
    if world_size % size:
        raise UserError("hybrid-uneven", workers=world_size, size=size)
    return size


def make_strategy(
    config: RunConfig,
    world_size: int,
    local_world_size: int,
    loaded: Shards | None = None,
    frozen: Frozen | None = None,
) -> Strategy:
    """The strategy that `config` names; all but none need an initialised process group.

    Args:
        loaded: units that were cut into `base_shards` shards when they were loaded, by name.
        frozen: what has been decided where `shard.frozen` is auto; auto shards where it is None.
    """
    shard = config.shard
    if frozen is None:
        frozen = "replicate" if shard.frozen == "replicate" else "shard"
    match config.strategy:
        case "none":
            from qlora_dist.shard.none import Unsharded

            return Unsharded()
        case "ddp":
            from qlora_dist.shard.ddp import DataParallel

            return DataParallel()
        case "fsdp" | "hybrid":
            from qlora_dist.shard.fsdp import FullyShard

            return FullyShard(
                workers_of_a_copy(config, world_size, local_world_size),
                frozen=frozen,
                # What is left to gather of a replicated base's units, the adapter, is small.
                reshard_after_forward=frozen == "shard"
                if shard.reshard_after_forward is None
                else shard.reshard_after_forward,
                prefetch=shard.prefetch_layers,
                offload_shards="shards" in shard.offload,
                resident_bytes=int((config.train.memory_budget_gib or 0) * 2**30 * RESIDENT_SHARE),
                loaded=loaded,
                timeout=timedelta(seconds=config.launch.collective_timeout_s),
            )
        case "zero2" | "zero3":
            from qlora_dist.config.deepspeed import deepspeed_settings
            from qlora_dist.shard.zero import Zero2, Zero3

            settings = deepspeed_settings(config)
            return Zero2(settings) if config.strategy == "zero2" else Zero3(settings, loaded)
    raise ValueError(f"no strategy {config.strategy}")
