"""ZeRO-2 and ZeRO-3 by DeepSpeed, over a 4-bit base.

The adapter weights of a unit are one flat parameter, padded to whole blocks of 256 elements for every worker (`flat`).
DeepSpeed cuts such parameters on blocks, so that 8-bit state is the same at every world size and under every strategy:
nothing is requantised. Under ZeRO-3 a unit's frozen bytes, quantisation constants included, are one more parameter that
DeepSpeed cuts, gathers and frees.

DeepSpeed neither clips, scales, casts nor schedules; our loop does.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from qlora_dist.shard.clipping import clip_shards
from qlora_dist.shard.deepspeed import SteppedByPieces, library
from qlora_dist.shard.flat import FLAT, FlatAdapter, trained_names
from qlora_dist.shard.frozen import BYTES, FrozenUnit, Shards
from qlora_dist.shard.pieces import PieceOptimizer, cut, whole
from qlora_dist.shard.strategy import FullState, OptimizerFactory
from qlora_dist.shard.units import Unit, base_of, call_through_hooks, find_units
from qlora_dist.shard.waits import Waits


@dataclass(frozen=True)
class Stretch:
    """A stretch of this rank's partition: `size` elements from `offset` on, those of `adapter` from `start` on."""

    adapter: FlatAdapter
    start: int
    offset: int
    size: int


@dataclass
class ZeroUnit:
    """A unit's flat adapter parameter, and under ZeRO-3 its frozen bytes."""

    unit: Unit
    adapter: FlatAdapter | None
    frozen: FrozenUnit | None

    def set_views(self) -> None:
        """Let the modules read what is gathered now."""
        if self.frozen is not None:
            self.frozen.copy_views()
        if self.adapter is not None:
            self.adapter.set_views()

    def drop_views(self) -> None:
        """Forget it, so that its memory is freed when DeepSpeed frees it."""
        if self.frozen is not None:
            self.frozen.drop_views()
        if self.adapter is not None:
            self.adapter.drop_views()


class Zero2:
    """The strategy zero2: every worker holds the model; gradients and optimizer state are spread over workers.

    Args:
        settings: what DeepSpeed is configured with (`deepspeed_settings`).
    """

    optimizer: Optimizer
    collective_forward = False
    # What DeepSpeed's gradients have to be multiplied with to be sums over workers.
    factor = 1.0

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings

    def apply(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """See `Strategy.apply`."""
        self.device: torch.device = next(p for p in base_of(model).parameters() if p.device.type != "meta").device
        with library(self.device) as deepspeed:
            self.units = self._place(model, deepspeed)
            self.adapters = [unit.adapter for unit in self.units if unit.adapter is not None]
            stepped = self.stepped = SteppedByPieces([flat_of(adapter) for adapter in self.adapters])
            self.engine, self.zero, *_ = deepspeed.initialize(
                model=model, optimizer=stepped, config=deepcopy(self.settings)
            )
        self.waits = Waits(self.device)
        self.waits.around(self.zero, "independent_gradient_partition_epilogue")
        # After DeepSpeed's own hooks, which gather.
        for unit in self.units:
            for module in unit.unit.modules:
                self._register_views(unit, module)
        self.partition: Tensor = self._own_partition()
        self.stretches = list(self._stretches())
        stepped.layout = [
            (piece, stretch.offset + piece.begin - stretch.start)
            for stretch in self.stretches
            for piece in cut(stretch.adapter, stretch.start, self._part(stretch)).values()
        ]
        pieces = {piece.segment.name: piece for piece, _ in stepped.layout}
        self.pieces = stepped.ours = PieceOptimizer(self.adapters, pieces, make_optimizer, self.device)
        self.optimizer = self.pieces.optimizer
        engine: nn.Module = self.engine
        return engine

    def _place(self, model: nn.Module, deepspeed: Any) -> list[ZeroUnit]:
        found = find_units(model)
        names = trained_names(model)
        modules = {module for unit in found for module in unit.modules}
        placed = [self._place_unit(unit, names, modules - set(unit.modules)) for unit in found]
        call_through_hooks(model, base_of(model))
        return placed

    def _place_unit(self, unit: Unit, names: dict[nn.Parameter, str], apart: set[nn.Module]) -> ZeroUnit:
        adapter = FlatAdapter(unit, names, dist.get_world_size(), apart)
        if adapter.segments:
            adapter.place()
        return ZeroUnit(unit, adapter if adapter.segments else None, None)

    def _register_views(self, unit: ZeroUnit, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: unit.set_views())

    def _own_partition(self) -> Tensor:
        (partition,), (replicated,) = self.zero.single_partition_of_fp32_groups, self.zero.bit16_groups_flat
        if not self.zero.cpu_offload:
            # The weights are fp32 themselves and need no fp32 copy.
            partition.data = replicated.chunk(dist.get_world_size())[dist.get_rank()]
            for adapter in self.adapters:
                flat_of(adapter)._hp_mapping = None  # type: ignore[attr-defined]
        return partition  # type: ignore[no-any-return]

    def _stretches(self) -> Iterator[Stretch]:
        end = -dist.get_rank() * self.partition.numel()
        for adapter in self.adapters:
            begin, end = end, end + adapter.numel
            first, last = max(begin, 0), min(end, self.partition.numel())
            if first < last:
                yield Stretch(adapter, first - begin, first, last - first)

    def _part(self, stretch: Stretch) -> Tensor:
        return self.partition.detach()[stretch.offset : stretch.offset + stretch.size]

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        """See `Strategy.backward`."""
        self.engine.backward(loss, scale_wrt_gas=False)
        for unit in self.units:
            unit.drop_views()

    def clip(self, max_norm: float, loss_scale: float) -> Tensor:
        """See `Strategy.clip`."""
        self.zero.finalize_gradient_accumulation_boundary()
        return clip_shards(self._gradients(), max_norm, loss_scale, self.device, self.factor)

    def _gradients(self) -> list[Tensor]:
        if self.partition.grad is not None:
            return [self.partition.grad]
        return list(self.zero.averaged_gradients[0])

    def step(self, skip: bool | Tensor) -> None:
        """See `Strategy.step`."""
        self.stepped.skipping = bool(skip)
        self.zero.step()
        self.zero.zero_grad()

    def full_adapter(self) -> dict[str, Tensor]:
        """See `Strategy.full_adapter`."""
        mine = {id(stretch.adapter): stretch for stretch in self.stretches}
        state: dict[str, Tensor] = {}
        for adapter in self.adapters:
            stretch = mine.get(id(adapter), Stretch(adapter, 0, 0, 0))
            flat_N = whole(self._part(stretch), stretch.start, adapter.numel, self.device)
            state |= {weight.key: adapter.part(flat_N, weight).clone() for weight in adapter.weights}
        return state

    def load_adapter(self, adapter: dict[str, Tensor]) -> None:
        """See `Strategy.load_adapter`."""
        for stretch in self.stretches:
            self._part(stretch).copy_(stretch.adapter.join(adapter)[stretch.start : stretch.start + stretch.size])
        self._spread_partitions()

    def _spread_partitions(self) -> None:
        self.zero.update_lp_params()

    def full_state(self) -> FullState:
        """See `Strategy.full_state`."""
        return self.pieces.full_state(self.full_adapter())

    def load_full_state(self, state: FullState) -> None:
        """See `Strategy.load_full_state`."""
        self.load_adapter(state.adapter)
        self.pieces.load(state)


class Zero3(Zero2):
    """The strategy zero3: the base, quantisation constants included, and the adapter are spread too.

    Args:
        settings: as for zero2.
        loaded: units whose bytes are sharded already, by name, each with this rank's shard.
    """

    collective_forward = True

    def __init__(self, settings: dict[str, Any], loaded: Shards | None = None):
        super().__init__(settings)
        self.loaded = loaded or {}

    def apply(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """See `Strategy.apply`."""
        engine = super().apply(model, make_optimizer)
        self._set_views_in_backward()
        return engine

    def _place(self, model: nn.Module, deepspeed: Any) -> list[ZeroUnit]:
        self.factor = float(dist.get_world_size())  # it knows averages alone
        self.partitioner = deepspeed.zero.Init(config_dict_or_path=deepcopy(self.settings), dtype=torch.float32)
        units = super()._place(model, deepspeed)
        for unit in units:
            first, *others = unit.unit.modules
            for name in (BYTES, FLAT):
                for other in others if name in first._parameters else ():
                    deepspeed.zero.register_external_parameter(other, first._parameters[name])
            # Nothing below a unit has parameters; without this, each of its modules would have six hooks.
            if unit.unit.name:
                for module in unit.unit.modules:
                    for child in module.children():
                        deepspeed.utils.set_z3_leaf_module(child, True)
        return units

    def _place_unit(self, unit: Unit, names: dict[nn.Parameter, str], apart: set[nn.Module]) -> ZeroUnit:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if unit.name in self.loaded:
            frozen, shard = self.loaded.pop(unit.name)
            frozen.unit, frozen.module = unit, unit.modules[0]
        else:
            frozen = FrozenUnit(unit, world_size, apart)
            shard = frozen.pack(rank, world_size) if frozen.tensors else torch.empty(0)
        if frozen.tensors:
            frozen.place(torch.empty(1, dtype=torch.uint8, device=self.device).expand(frozen.num_bytes))
            self._give_shard(frozen.parameter, shard)
        placed = super()._place_unit(unit, names, apart)
        if placed.adapter is not None:
            flat = flat_of(placed.adapter)
            self._give_shard(flat, flat.detach().chunk(world_size)[rank].clone())
            placed.adapter.drop_views()
        placed.frozen = frozen if frozen.tensors else None
        return placed

    def _give_shard(self, parameter: Any, shard: Tensor) -> None:
        """Make `parameter` one of DeepSpeed's of which this rank holds `shard`, without its broadcast of the whole."""
        from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

        self.partitioner._convert_to_deepspeed_param(parameter)
        if self.partitioner.remote_device == "cpu":
            shard = shard.cpu()
            if self.device.type == "cuda" and self.partitioner.pin_memory:
                shard = shard.pin_memory()
        held: Any = shard
        held.ds_numel, held.status, held.final_location = shard.numel(), PartitionedParamStatus.AVAILABLE, None
        parameter.ds_tensor, parameter.ds_numel_aligned = held, parameter.ds_numel
        parameter.partition()

    def _register_views(self, unit: ZeroUnit, module: nn.Module) -> None:
        super()._register_views(unit, module)
        module.register_forward_hook(lambda *_: unit.drop_views())

    def _set_views_in_backward(self) -> None:
        """What activation checkpointing computes anew in the backward may be a unit's forward without its hooks."""
        from deepspeed.runtime.zero import parameter_offload

        units = {module: unit for unit in self.units for module in unit.unit.modules}
        hooks = self.zero.parameter_offload
        self.waits.around(hooks, "pre_sub_module_forward_function", "pre_sub_module_backward_function")
        fetch, release = hooks.pre_sub_module_backward_function, hooks.post_sub_module_backward_function

        def fetch_and_set(module: nn.Module) -> None:
            fetch(module)
            if module in units:
                with torch.enable_grad():
                    units[module].set_views()

        def drop_and_release(module: nn.Module) -> None:
            if module in units:
                units[module].drop_views()
            release(module)

        def backward_is_over() -> None:
            # A forward that is left in the middle, once it has what the backward needs, leaves its modules there.
            del parameter_offload.FWD_MODULE_STACK[1:]
            leftovers()

        leftovers, hooks.release_backward_leftovers = hooks.release_backward_leftovers, backward_is_over
        hooks.pre_sub_module_backward_function = fetch_and_set
        hooks.post_sub_module_backward_function = drop_and_release

    def _own_partition(self) -> Tensor:
        (partition,), (shard,) = self.zero.fp32_partitioned_groups_flat, self.zero.fp16_partitioned_groups_flat
        if not self.zero.offload_optimizer and not self.zero.offload_param:
            partition.data = shard.data
        return partition  # type: ignore[no-any-return]

    def _stretches(self) -> Iterator[Stretch]:
        offset = 0
        for adapter in self.adapters:
            size = adapter.numel // dist.get_world_size()
            yield Stretch(adapter, dist.get_rank() * size, offset, size)
            offset += size

    def _spread_partitions(self) -> None:
        self.zero._reassign_or_swap_out_partitioned_parameters(0)


def flat_of(adapter: FlatAdapter) -> nn.Parameter:
    """The flat parameter as it stands in its module."""
    parameter = adapter.module._parameters[FLAT]
    assert parameter is not None
    return parameter
