"""FSDP2 over a 4-bit base: each unit's frozen bytes and its flat adapter parameter are sharded, gathered and freed.

With a second mesh dimension (hybrid) shards are spread within a node and replicated over nodes. Nothing is cast on the
way: adapters are fp32 masters, the base is bytes, and the loop's autocast says what products are made in.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.optim import Optimizer

from qlora_dist.optim.optimizers import take_step
from qlora_dist.shard.clipping import clip_shards
from qlora_dist.shard.flat import FLAT, FlatAdapter, trained_names
from qlora_dist.shard.frozen import BYTES, FrozenUnit
from qlora_dist.shard.pieces import Piece, PieceOptimizer, cut, whole
from qlora_dist.shard.strategy import FullState, OptimizerFactory
from qlora_dist.shard.units import Unit, base_of, call_through_hooks, find_units
from qlora_dist.shard.waits import Waits

# FSDP2 before torch 2.13 lets no parameter be of integers. fp32 is copied bit for bit where bf16 and fp16 are not:
# those pass through fp32 on their way and lose the patterns of their NaNs.
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
CONTAINER = torch.uint8 if TORCH >= (2, 13) else torch.float32
# Up to so many bytes the adapter over a replicated base travels in one piece, at both ends of a step: small messages
# beside the layers' GEMMs cost more time, by the multiprocessors they take, than one that nothing hides.
LARGEST_WHOLE = 2**30


class ShardedUnit:
    """A unit under FSDP: its frozen bytes, its flat adapter parameter, and this rank's part of the optimizer."""

    def __init__(self, unit: Unit, frozen: FrozenUnit | None, adapter: FlatAdapter | None, loaded: Tensor | None):
        self.unit, self.frozen, self.adapter, self.loaded = unit, frozen, adapter, loaded
        self.fsdp: Any = None
        self.pieces: dict[str, Piece] = {}

    @property
    def flat(self) -> Any:
        """The flat adapter parameter as it stands: a DTensor while it is sharded."""
        return self.unit.modules[0]._parameters[FLAT]

    @property
    def local(self) -> Tensor:
        """This rank's shard of the flat adapter parameter."""
        local: Tensor = self.flat.to_local()
        return local.detach()

    def set_gradients(self, shard: int) -> Tensor | None:
        """Point the optimizer's parameters at their gradients; this rank's shard of the gradient, or None."""
        if self.flat.grad is None:
            return None
        grad_N: Tensor = self.flat.grad.to_local()
        start = shard * grad_N.numel()
        for piece in self.pieces.values():
            first = piece.begin - start
            piece.parameter.grad = grad_N[first : first + piece.parameter.numel()]
        return grad_N


class FullyShard:
    """The strategies fsdp and hybrid.

    Args:
        shards: workers a base is spread over; the world size for fsdp, the workers of a node for hybrid.
        frozen: `replicate` keeps the whole base on every worker, as it was loaded, and shards the adapter alone.
        reshard_after_forward: free a unit's gathered weights after its forward.
        prefetch: units that are gathered ahead of the one that computes.
        offload_shards: keep shards, gradients and optimizer state in host memory.
        resident_bytes: with `offload_shards`, so many bytes of shards stay on the device, those of the first units.
        loaded: units whose bytes are sharded already, by name, each with this rank's shard.
        timeout: how long a collective waits for its ranks; PyTorch's own where unset.
    """

    optimizer: Optimizer
    collective_forward = True

    def __init__(
        self,
        shards: int,
        frozen: Literal["shard", "replicate"] = "shard",
        reshard_after_forward: bool = True,
        prefetch: int = 1,
        offload_shards: bool = False,
        resident_bytes: int = 0,
        loaded: dict[str, tuple[FrozenUnit, Tensor]] | None = None,
        timeout: timedelta | None = None,
    ):
        self.shards, self.frozen, self.prefetch = shards, frozen, prefetch
        self.reshard_after_forward, self.offload_shards = reshard_after_forward, offload_shards
        self.loaded = loaded or {}
        self.timeout = timeout
        self.resident_bytes_left = resident_bytes

    def apply(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """See `Strategy.apply`."""
        base = base_of(model)
        self.device: torch.device = next(p for p in base.parameters() if p.device.type != "meta").device
        self.mesh = make_mesh(self.device, self.shards, self.timeout)
        self.shard_mesh = self.mesh["shard"]
        self.shard_rank = self.shard_mesh.get_local_rank()
        names = trained_names(model)
        in_one_piece = self.frozen == "replicate" and sum(p.nbytes for p in names) <= LARGEST_WHOLE
        units = [Unit("", (base,))] if in_one_piece else find_units(model)
        modules = {module for unit in units for module in unit.modules}
        self.units = [self._place(unit, names, modules - set(unit.modules)) for unit in units]
        self.waits = Waits(self.device)
        for unit in self.units:
            self._fully_shard(unit)
            self._count_waits(unit)
        self.root: Any = self.units[-1].fsdp
        self._set_prefetch([unit.fsdp for unit in self.units[:-1]])
        call_through_hooks(model, base)
        if self.device.type == "cuda":
            # The units that were packed leave blocks of other sizes than training asks for.
            torch.cuda.empty_cache()
        adapters: list[FlatAdapter] = []
        pieces: dict[str, Piece] = {}
        for unit in self.units:
            if unit.adapter is not None:
                adapters.append(unit.adapter)
                unit.pieces = cut(unit.adapter, self.shard_rank * unit.local.numel(), unit.local)
                pieces |= unit.pieces
        self.pieces = PieceOptimizer(adapters, pieces, make_optimizer, self.device, self.shard_mesh.get_group())
        self.optimizer = self.pieces.optimizer
        return model

    def _place(self, unit: Unit, names: dict[nn.Parameter, str], apart: set[nn.Module]) -> ShardedUnit:
        frozen: FrozenUnit | None = None
        shard: Tensor | None = None
        if unit.name in self.loaded:
            frozen, shard = self.loaded.pop(unit.name)
            frozen.unit, frozen.module = unit, unit.modules[0]
        elif self.frozen == "shard":
            frozen = FrozenUnit(unit, self.shards, apart)
        if frozen is None or not frozen.tensors:
            frozen = None
        elif shard is not None:
            frozen.place(torch.empty(frozen.num_bytes, dtype=torch.uint8, device="meta"), CONTAINER)
        else:
            frozen.place(frozen.pack(), CONTAINER)
        adapter: FlatAdapter | None = FlatAdapter(unit, names, self.shards, apart)
        if adapter is not None and not adapter.segments:
            adapter = None
        if adapter is not None:
            adapter.place()
        sharded = ShardedUnit(unit, frozen, adapter, shard)
        for module in unit.modules:
            module.register_forward_pre_hook(_view_hook(sharded))
        return sharded

    def _fully_shard(self, unit: ShardedUnit) -> None:
        modules = unit.unit.modules
        # Of what is replicated, FSDP is told of nothing.
        replicated = modules if self.frozen == "replicate" else ()
        ignored = {p for module in replicated for p in module.parameters() if not p.requires_grad}
        offload = self.offload_shards
        if offload and unit.frozen is not None and unit.frozen.num_bytes // self.shards <= self.resident_bytes_left:
            self.resident_bytes_left -= unit.frozen.num_bytes // self.shards
            offload = False
        policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else OffloadPolicy()
        unit.fsdp = modules[0]
        fully_shard(
            list(modules) if len(modules) > 1 else modules[0],  # type: ignore[arg-type]
            mesh=self.mesh if self.mesh.ndim == 2 else self.shard_mesh,
            reshard_after_forward=self.reshard_after_forward,
            offload_policy=policy,
            ignored_params=ignored,
        )
        if unit.loaded is not None:
            placed: Any = modules[0]._parameters[BYTES]
            placed = torch.empty_like(placed, device="cpu" if offload else self.device)
            placed.to_local().copy_(unit.loaded.view(CONTAINER))
            unit.loaded = None
            modules[0]._parameters[BYTES] = nn.Parameter(placed, requires_grad=False)
        # The loss is over all ranks' tokens already, so gradients are summed and not averaged.
        unit.fsdp.set_gradient_divide_factor(1.0)
        unit.fsdp.set_force_sum_reduction_for_comms(True)
        if (
            unit.adapter is None
            and len(modules) == 1
            and (isinstance(modules[0], nn.Embedding) or hasattr(modules[0], "with_loss"))
        ):
            # An embedding's backward does not need its weight, and a fused head has made its gradient in the forward.
            unit.fsdp.set_unshard_in_backward(False)

    def _count_waits(self, unit: ShardedUnit) -> None:
        """On a GPU the stream waits for what was gathered or reduced, on a CPU the host while it is."""
        # Names of PyTorch's own: where another version has others, waiting is not told from computing.
        state = getattr(unit.fsdp, "_get_fsdp_state", lambda: None)()
        group = getattr(state, "_fsdp_param_group", None)
        if group is not None:
            names = ("wait_for_unshard", "post_backward", "finalize_backward")
            self.waits.around(group, *(names if self.device.type == "cuda" else ("unshard", *names)))

    def _set_prefetch(self, in_order: list[FSDPModule]) -> None:
        for place, module in enumerate(in_order):
            module.set_modules_to_forward_prefetch(in_order[place + 1 : place + 1 + self.prefetch])
            module.set_modules_to_backward_prefetch(in_order[max(0, place - self.prefetch) : place][::-1])

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        """See `Strategy.backward`."""
        self.root.set_requires_gradient_sync(last_micro_batch)
        self.root.set_is_last_backward(last_micro_batch)
        loss.backward()

    def clip(self, max_norm: float, loss_scale: float) -> Tensor:
        """See `Strategy.clip`."""
        grads = [
            grad for unit in self.units if unit.pieces and (grad := unit.set_gradients(self.shard_rank)) is not None
        ]
        return clip_shards(grads, max_norm, loss_scale, self.device, copies=dist.get_world_size() // self.shards)

    def step(self, skip: bool | Tensor) -> None:
        """See `Strategy.step`."""
        take_step(self.optimizer, skip)
        self.optimizer.zero_grad(set_to_none=True)
        for unit in self.units:
            if unit.adapter is not None:
                unit.flat.grad = None

    def full_adapter(self) -> dict[str, Tensor]:
        """See `Strategy.full_adapter`."""
        self._reshard()
        state: dict[str, Tensor] = {}
        for unit in self.units:
            if unit.adapter is not None:
                start = self.shard_rank * unit.local.numel()
                flat_N = whole(unit.local, start, unit.adapter.numel, self.device, self.shard_mesh.get_group())
                state |= {w.key: unit.adapter.part(flat_N, w).clone() for w in unit.adapter.weights}
        return state

    def load_adapter(self, adapter: dict[str, Tensor]) -> None:
        """See `Strategy.load_adapter`."""
        self._reshard()
        for unit in self.units:
            if unit.adapter is not None:
                local_N = unit.local
                start = self.shard_rank * local_N.numel()
                local_N.copy_(unit.adapter.join(adapter)[start : start + local_N.numel()])

    def _reshard(self) -> None:
        """Free what a forward without a backward has left gathered, which would go on as it is after a change."""
        for unit in self.units:
            unit.fsdp.reshard()

    def full_state(self) -> FullState:
        """See `Strategy.full_state`."""
        return self.pieces.full_state(self.full_adapter())

    def load_full_state(self, state: FullState) -> None:
        """See `Strategy.load_full_state`."""
        self.load_adapter(state.adapter)
        self.pieces.load(state)


def make_mesh(device: torch.device, shards: int, timeout: timedelta | None = None) -> DeviceMesh:
    """The mesh of all workers: `shards` of them hold one copy of the model, neighbouring ranks together.

    Args:
        timeout: of the collectives in a part of the mesh; those of all workers have the process group's.

    Raises:
        ValueError: the world size is no multiple of `shards`.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % shards:
        raise ValueError(f"{world_size} workers cannot form groups of {shards}")
    if world_size == shards:
        return init_device_mesh(device.type, (shards,), mesh_dim_names=("shard",))
    ranks = torch.arange(world_size).view(-1, shards)
    # Groups that a mesh makes itself wait as long as PyTorch thinks right.
    mine = []
    for groups in (ranks.T.tolist(), ranks.tolist()):
        made = [(members, dist.new_group(members, timeout=timeout)) for members in groups]
        mine.append(next(group for members, group in made if rank in members))
    return DeviceMesh.from_group(mine, device.type, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def _view_hook(unit: ShardedUnit) -> Callable[..., None]:
    def set_views(*_: Any) -> None:
        if unit.frozen is not None:
            unit.frozen.set_views()
        if unit.adapter is not None:
            unit.adapter.set_views()

    return set_views
