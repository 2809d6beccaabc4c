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

from qlora_dist.optim.optimizers import CONSTANT_KEYS, init_optimizer_state, load_optimizer_state, zero_code
from qlora_dist.shard.flat import FLAT, FlatAdapter, Segment
from qlora_dist.shard.frozen import BYTES, FrozenUnit
from qlora_dist.shard.pieces import grain_of
from qlora_dist.shard.strategy import FullState, OptimizerFactory
from qlora_dist.shard.units import Unit, base_of, call_through_hooks, find_units

# FSDP2 before torch 2.13 lets no parameter be of integers. fp32 is copied bit for bit where bf16 and fp16 are not:
# those pass through fp32 on their way and lose the patterns of their NaNs.
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
CONTAINER = torch.uint8 if TORCH >= (2, 13) else torch.float32


class ShardedUnit:
    """A unit under FSDP: its frozen bytes, its flat adapter parameter, and this rank's part of the optimizer."""

    def __init__(self, unit: Unit, frozen: FrozenUnit | None, adapter: FlatAdapter | None, shard: Tensor | None):
        self.unit, self.frozen, self.adapter, self.shard = unit, frozen, adapter, shard
        self.fsdp: Any = None
        # The optimizer's parameters: views of the local shard, one a segment that the shard touches.
        self.pieces: dict[str, tuple[Segment, int, nn.Parameter]] = {}

    @property
    def local(self) -> Tensor:
        """This rank's shard of the flat adapter parameter."""
        flat: Any = self.unit.modules[0]._parameters[FLAT]
        local: Tensor = flat.to_local()
        return local.detach()

    def cut(self, shard: int) -> None:
        """Lay the optimizer's parameters over the local shard, number `shard`."""
        assert self.adapter is not None
        local_N = self.local
        start = shard * local_N.numel()
        for segment in self.adapter.segments:
            begin, end = max(segment.begin, start), min(segment.end, start + local_N.numel())
            if begin < end:
                piece = nn.Parameter(local_N[begin - start : end - start])
                self.pieces[segment.name] = (segment, begin, piece)

    def set_gradients(self, shard: int) -> Tensor | None:
        """Point the optimizer's parameters at their gradients; this rank's shard of the gradient, or None."""
        flat: Any = self.unit.modules[0]._parameters[FLAT]
        if flat.grad is None:
            return None
        grad_N: Tensor = flat.grad.to_local()
        start = shard * grad_N.numel()
        for _, begin, piece in self.pieces.values():
            piece.grad = grad_N[begin - start : begin - start + piece.numel()]
        return grad_N


class FullyShard:
    """The strategies fsdp and hybrid.

    Args:
        shards: workers a base is spread over; the world size for fsdp, the workers of a node for hybrid.
        frozen: `replicate` keeps the whole base on every worker and shards the adapter alone.
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
        self.room = resident_bytes

    def apply(self, model: nn.Module, make_optimizer: OptimizerFactory) -> nn.Module:
        """See `Strategy.apply`."""
        base = base_of(model)
        self.device: torch.device = next(p for p in base.parameters() if p.device.type != "meta").device
        self.mesh = make_mesh(self.device, self.shards, self.timeout)
        self.shard_mesh = self.mesh["shard"]
        self.shard_rank = self.shard_mesh.get_local_rank()
        units = find_units(model)
        names = {parameter: name for name, parameter in model.named_parameters()}
        modules = {module for unit in units for module in unit.modules}
        self.units = [self._place(unit, names, modules - set(unit.modules)) for unit in units]
        for unit in self.units:
            self._fully_shard(unit)
        self.root: Any = self.units[-1].fsdp
        self._set_prefetch([unit.fsdp for unit in self.units[:-1]])
        call_through_hooks(model, base)
        pieces: dict[str, nn.Parameter] = {}
        for unit in self.units:
            if unit.adapter is not None:
                unit.cut(self.shard_rank)
                pieces |= {name: piece for name, (_, _, piece) in unit.pieces.items()}
        # A rank beyond the last block of a small adapter trains nothing, and optimizers refuse to be empty.
        self.optimizer = make_optimizer(pieces or {"nothing": nn.Parameter(torch.zeros(1, device=self.device))})
        self.in_8bit = {s.name: s.in_8bit for unit in self.units for s, _, _ in unit.pieces.values()}
        init_optimizer_state(self.optimizer, pieces, self.in_8bit)
        return model

    def _place(self, unit: Unit, names: dict[nn.Parameter, str], apart: set[nn.Module]) -> ShardedUnit:
        frozen: FrozenUnit | None
        shard: Tensor | None = None
        if unit.name in self.loaded:
            frozen, shard = self.loaded.pop(unit.name)
            frozen.unit, frozen.module = unit, unit.modules[0]
        else:
            frozen = FrozenUnit(unit, self.shards, apart)
        if not frozen.tensors:
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
        whole = self.frozen == "replicate" and unit.frozen is not None
        ignored = {modules[0]._parameters[BYTES]} if whole else set()
        offload = self.offload_shards
        if offload and unit.frozen is not None and unit.frozen.num_bytes // self.shards <= self.room:
            self.room -= unit.frozen.num_bytes // self.shards
            offload = False
        policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else OffloadPolicy()
        unit.fsdp = modules[0]
        fully_shard(
            list(modules) if len(modules) > 1 else modules[0],  # type: ignore[arg-type]
            mesh=self.mesh if self.mesh.ndim == 2 else self.shard_mesh,
            reshard_after_forward=self.reshard_after_forward,
            offload_policy=policy,
            ignored_params=ignored,  # type: ignore[arg-type]
        )
        if unit.shard is not None:
            placed: Any = modules[0]._parameters[BYTES]
            placed = torch.empty_like(placed, device="cpu" if offload else self.device)
            placed.to_local().copy_(unit.shard.view(CONTAINER))
            unit.shard = None
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
        norms = [norm.to(self.device) for norm in torch._foreach_norm(grads)] if grads else [torch.zeros(1)]
        squares = torch.stack(norms).square().sum().to(self.device)
        # Over all copies, so that no copy gets a norm with another last bit and drifts from the rest.
        dist.all_reduce(squares)
        norm = (squares / (dist.get_world_size() // self.shards)).sqrt() / loss_scale
        if max_norm > 0 or loss_scale != 1.0:
            limit = torch.clamp(max_norm / (norm + 1e-6), max=1.0) if max_norm > 0 else torch.ones_like(norm)
            # Offloaded units have their gradients on the host.
            for device in {grad.device for grad in grads}:
                torch._foreach_mul_([g for g in grads if g.device == device], (limit / loss_scale).to(device))
        return norm

    def step(self, skip: bool) -> None:
        """See `Strategy.step`."""
        if not skip:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for unit in self.units:
            if unit.pieces or unit.adapter is not None:
                unit.unit.modules[0]._parameters[FLAT].grad = None  # type: ignore[union-attr]

    def full_adapter(self) -> dict[str, Tensor]:
        """See `Strategy.full_adapter`."""
        state: dict[str, Tensor] = {}
        for unit in self.units:
            if unit.adapter is not None:
                flat_N = self._whole(unit.local, self.shard_rank * unit.local.numel(), unit.adapter.numel).cpu()
                state |= {w.key: unit.adapter.part(flat_N, w).clone() for w in unit.adapter.weights}
        return state

    def load_adapter(self, adapter: dict[str, Tensor]) -> None:
        """See `Strategy.load_adapter`."""
        for unit in self.units:
            if unit.adapter is not None:
                local_N = unit.local
                start = self.shard_rank * local_N.numel()
                local_N.copy_(unit.adapter.join(adapter)[start : start + local_N.numel()])

    def full_state(self) -> FullState:
        """See `Strategy.full_state`."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        keys = self._state_keys()
        for unit in self.units:
            for segment in [] if unit.adapter is None else unit.adapter.segments:
                _, begin, piece = unit.pieces.get(segment.name, (segment, segment.begin, None))
                mine: dict[str, Any] = {} if piece is None else self.optimizer.state[piece]
                for key, what in keys[segment.name].items():
                    if not isinstance(what, torch.dtype):
                        for weight in segment.weights:
                            (tensors if isinstance(what, Tensor) else numbers)[f"{weight.key}|{key}"] = what
                        continue
                    grain = grain_of(key)
                    own = mine[key] if mine else torch.empty(0, dtype=what)
                    whole = self._whole(own, (begin - segment.begin) // grain, (segment.end - segment.begin) // grain)
                    tensors |= {f"{w.key}|{key}": part for w, part in segment.split(whole.cpu(), grain)}
        return FullState(self.full_adapter(), tensors, numbers)

    def _state_keys(self) -> dict[str, dict[str, Any]]:
        """What each segment's optimizer state is made of: dtypes of what is sharded, and what is the same everywhere.

        A rank whose shard misses a segment learns it from the others.
        """
        mine: dict[str, dict[str, Any]] = {}
        for unit in self.units:
            for name, (_, _, piece) in unit.pieces.items():
                mine[name] = {
                    key: value.dtype if isinstance(value, Tensor) and value.dim() else value
                    for key, value in self.optimizer.state.get(piece, {}).items()
                    if key not in CONSTANT_KEYS and value is not None
                }
        parts: list[Any] = [None] * self.shard_mesh.size()
        dist.all_gather_object(parts, mine, group=self.shard_mesh.get_group())
        return {name: keys for part in parts for name, keys in part.items()}

    def load_full_state(self, state: FullState) -> None:
        """See `Strategy.load_full_state`."""
        self.load_adapter(state.adapter)
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        pieces: dict[str, nn.Parameter] = {}
        keys: dict[str, list[str]] = {}
        for full_name in (*state.optimizer, *state.optimizer_scalars):
            name, _, key = full_name.rpartition("|")
            keys.setdefault(name, []).append(key)
        for unit in self.units:
            for segment, begin, piece in unit.pieces.values():
                pieces[segment.name] = piece
                first = segment.weights[0].key
                for key in keys.get(first, []):
                    whole = state.optimizer.get(f"{first}|{key}")
                    if whole is None:
                        numbers[f"{segment.name}|{key}"] = state.optimizer_scalars[f"{first}|{key}"]
                    elif whole.dim() == 0:
                        tensors[f"{segment.name}|{key}"] = whole
                    else:
                        grain = grain_of(key)
                        fill = zero_code(self.optimizer, key) if whole.dtype == torch.uint8 else 0
                        parts = {w.key: state.optimizer[f"{w.key}|{key}"] for w in segment.weights}
                        joined = segment.join(parts, grain, fill)
                        from_ = (begin - segment.begin) // grain
                        tensors[f"{segment.name}|{key}"] = joined[from_ : from_ + piece.numel() // grain]
        load_optimizer_state(self.optimizer, pieces, tensors, numbers, self.in_8bit)

    def _whole(self, mine: Tensor, offset: int, size: int) -> Tensor:
        """The `size` elements that the ranks of a shard group hold parts of, this one `mine` from `offset` on."""
        # Sums with zeros are exact for integers, and floats go as integers: no bit of theirs is lost.
        as_int = torch.int32 if mine.dtype.itemsize == 4 else mine.dtype
        whole = torch.zeros(size, dtype=as_int, device=self.device)
        whole[offset : offset + mine.numel()] = mine.reshape(-1).view(as_int)
        dist.all_reduce(whole, group=self.shard_mesh.get_group())
        return whole.view(mine.dtype)


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
