"""Loading over several ranks: one of a node reads, and each keeps its shard of a unit as soon as that is filled."""

import gc
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig
from qlora_dist.model.adapter import weights_read_at_attach
from qlora_dist.model.tensors import DTYPES, LazyTensor
from qlora_dist.shard.frozen import FrozenUnit, Shards, own_modules
from qlora_dist.shard.meeting import Meeting
from qlora_dist.shard.replication import Frozen, decide, is_open
from qlora_dist.shard.strategy import base_shards
from qlora_dist.shard.units import Unit, find_units

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
CPU = torch.device("cpu")
# Some network stacks refuse single messages beyond 2 GiB.
LARGEST_MESSAGE = 2**28
LONGEST_SILENCE_S = 10.0
# What the rank that reads a tensor says of it.
READING, READ, FAILED = range(3)


class NodeReader:
    """The ranks of one node, of which the first reads and the others listen.

    Args:
        ranks: the node's, in order.
        rank: this one.
        group: theirs; None for all ranks of the run.
        timeout_s: a rank that is silent for so long counts as lost.
    """

    def __init__(self, ranks: list[int], rank: int, group: Any, timeout_s: float):
        self.ranks, self.group = ranks, group
        self.reads = rank == ranks[0]
        self.tick_s = min(LONGEST_SILENCE_S, timeout_s / 4)

    def once(self, make: Callable[[], T]) -> T:
        """See `Placement.once`. However long it takes: the rank that makes it says that it lives."""
        outcome: tuple[Any, UserError | None] | None = None
        if self.reads:
            with self._signs_of_life(lambda: self._say(None)):
                outcome = _outcome_of(make)
            self._say(outcome)
        while outcome is None:
            outcome = self._say(None)
        value, error = outcome
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def share(self, find: Callable[[], dict[str, LazyTensor]], device: torch.device) -> dict[str, LazyTensor]:
        """See `Placement.share`."""
        mine: dict[str, LazyTensor] = {}

        def describe() -> list[tuple[str, tuple[int, ...], str]]:
            mine.update(find())
            return [(name, tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in mine.items()]

        return {
            name: LazyTensor(shape, dtype, partial(self._sent, number, mine.get(name), shape, DTYPES[dtype], device))
            for number, (name, shape, dtype) in enumerate(self.once(describe))
        }

    def _sent(
        self, number: int, source: LazyTensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Tensor `number` on `device`, read from `source`, however long that takes, or received."""
        tensor, error = None, None
        if source is None:
            while (state := self._tell(number, READING)) == READING:
                pass
        else:
            with self._signs_of_life(lambda: self._tell(number, READING)):
                tensor, error = _outcome_of(lambda: source[...])
            state = self._tell(number, READ if error is None else FAILED)
        if state == FAILED:
            raise self._say(error)
        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype, device=device)
        tensor = tensor.to(device).contiguous()
        for part in tensor.view(-1).view(torch.uint8).split(LARGEST_MESSAGE) if tensor.numel() else ():
            dist.broadcast(part, self.ranks[0], self.group)
        return tensor

    def _say(self, what: Any) -> Any:
        box = [what]
        dist.broadcast_object_list(box, self.ranks[0], self.group, CPU)
        return box[0]

    def _tell(self, number: int, state: int) -> int:
        """How the rank that reads stands with tensor `number`."""
        told = torch.tensor([number, state])
        dist.broadcast(told, self.ranks[0], self.group)
        if told[0] != number:
            raise RuntimeError(f"rank {self.ranks[0]} reads tensor {told[0]} where this rank asks for {number}")
        return int(told[1])

    @contextmanager
    def _signs_of_life(self, give: Callable[[], Any]) -> Iterator[None]:
        done = Event()

        def tick() -> None:
            while not done.wait(self.tick_s):
                give()

        with ThreadPoolExecutor(1) as thread:
            ticking = thread.submit(tick)
            try:
                yield
            finally:
                done.set()
                ticking.result()


class NodePlacement:
    """Base weights among the ranks of a node: read once, and cut into shards where the strategy does.

    Args:
        reader: the node's; None where this rank reads for itself.
        shard, num_shards: which part of each unit this rank keeps; of one it keeps all, as it is.
        stays_whole: whether the module of a name is left as it is, weights and all.
        frozen: `replicate` where each rank keeps the whole base though the strategy shards.
        decide: where that is open, what to ask as soon as the model is known; see `replication.decide`.
        meeting: of several nodes. The placement is a block then, which ends when all ranks have loaded.

    Attributes:
        loaded: this rank's shard of each unit that has been packed, by the unit's name.
        reason: why `frozen` was decided so, for a person; None where nothing was.
    """

    def __init__(
        self,
        reader: NodeReader | None,
        shard: int,
        num_shards: int,
        stays_whole: Callable[[str], bool] = lambda _: False,
        frozen: Frozen = "shard",
        decide: Callable[["PreTrainedModel"], tuple[Frozen, str | None]] | None = None,
        meeting: Meeting | None = None,
    ):
        self.reader, self.shard, self.num_shards, self.stays_whole = reader, shard, num_shards, stays_whole
        self.frozen, self.decide, self.meeting = frozen, decide, meeting
        self.reason: str | None = None
        self.loaded: Shards = {}
        self.waiting: list[tuple[Unit, list[tuple[nn.Module, str]]]] | None = None
        self.apart: set[nn.Module] = set()

    def __enter__(self) -> "NodePlacement":
        if self.meeting is not None:
            self.meeting.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.meeting is not None:
            self.meeting.__exit__(*error)

    @property
    def splits_work(self) -> bool:
        """See `Placement.splits_work`."""
        return self.reader is not None or self.num_shards > 1

    def once(self, make: Callable[[], T]) -> T:
        """See `Placement.once`."""
        return make() if self.reader is None else self.reader.once(make)

    def share(self, find: Callable[[], dict[str, LazyTensor]], device: torch.device) -> dict[str, LazyTensor]:
        """See `Placement.share`."""
        return find() if self.reader is None else self.reader.share(find, device)

    def filling(self, model: "PreTrainedModel") -> None:
        """See `Placement.filling`."""
        if self.decide is not None:
            if self.meeting is not None:
                self.meeting.meet()
            self.frozen, self.reason = self.decide(model)
            self.decide = None
            if self.frozen == "replicate":
                self.shard, self.num_shards = 0, 1
        if self.num_shards == 1:
            return
        if self.waiting is None:
            # What is tied is known when all is there: a folder may hold weights apart that its config ties.
            tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
            self.waiting = self._units(model, tied)
        for waiting in [w for w in self.waiting if _is_filled(w[1])]:
            self._pack(waiting[0])
            self.waiting.remove(waiting)

    def filled(self, model: "PreTrainedModel") -> None:
        """See `Placement.filled`."""
        if self.num_shards == 1:
            return
        for unit, _ in self._units(model, set()):
            if unit.name not in self.loaded:
                self._pack(unit)
        self.waiting = None
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _units(self, model: "PreTrainedModel", later: set[str]) -> list[tuple[Unit, list[tuple[nn.Module, str]]]]:
        """The units that are to be packed, with what they own; without those that own a parameter in `later`."""
        units = find_units(model)
        names = {module: name for name, module in model.named_modules()}
        self.apart = {module for unit in units for module in unit.modules}
        found = []
        for unit in units:
            apart = self.apart - set(unit.modules)
            modules = [module for root in unit.modules for module in own_modules(root, apart)]
            owned = [(module, attribute) for module in modules for attribute in module._parameters]
            if any(self.stays_whole(names[module]) for module in modules):
                continue
            if not any(f"{names[module]}.{attribute}" in later for module, attribute in owned):
                found.append((unit, owned))
        return found

    def _pack(self, unit: Unit) -> None:
        apart = self.apart - set(unit.modules)
        for root in unit.modules:
            for module in own_modules(root, apart):
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad_(False)
        frozen = FrozenUnit(unit, self.num_shards, apart)
        if frozen.tensors:
            self.loaded[unit.name] = (frozen, frozen.pack(self.shard, self.num_shards))


def make_placement(
    config: RunConfig, rank: int, world_size: int, local_rank: int, local_world_size: int, device: torch.device = CPU
) -> NodePlacement:
    """How the workers of `config` load their base onto `device`; all of them call it together."""
    num_shards = base_shards(config, world_size, local_world_size)
    reader = meeting = None
    if world_size > 1:
        timeout_s = config.launch.collective_timeout_s
        nodes = ranks_by_node(world_size, local_rank)
        # Every rank takes part in the making of every group.
        groups = [
            dist.new_group(ranks, timedelta(seconds=timeout_s)) if 1 < len(ranks) < world_size else None
            for ranks in nodes
        ]
        mine, group = next((ranks, group) for ranks, group in zip(nodes, groups, strict=True) if rank in ranks)
        reader = NodeReader(mine, rank, group, timeout_s) if len(mine) > 1 else None
        if len(nodes) > 1:
            meeting = Meeting(dist.new_group(timeout=timedelta(seconds=timeout_s), backend="gloo"), timeout_s)
    return NodePlacement(
        reader, rank % num_shards, num_shards, weights_read_at_attach(config.adapter),
        frozen="replicate" if config.shard.frozen == "replicate" else "shard",
        decide=partial(decide, device=device, budget_gib=config.train.memory_budget_gib)
        if is_open(config, num_shards) else None,
        meeting=meeting,
    )  # fmt: skip


def ranks_by_node(world_size: int, local_rank: int) -> list[list[int]]:
    """The ranks of each node, told by their host names and local ranks. All ranks call it together."""
    places: list[Any] = [None] * world_size
    dist.all_gather_object(places, (socket.gethostname(), local_rank))
    nodes: list[list[int]] = []
    newest: dict[str, list[int]] = {}
    for rank, (host, local) in enumerate(places):
        # Two nodes may share a name; their local ranks begin anew.
        if host not in newest or any(places[other][1] == local for other in newest[host]):
            newest[host] = []
            nodes.append(newest[host])
        newest[host].append(rank)
    return nodes


def _outcome_of(make: Callable[[], T]) -> tuple[T | None, UserError | None]:
    try:
        return make(), None
    except UserError as error:
        return None, error


def _is_filled(owned: list[tuple[nn.Module, str]]) -> bool:
    parameters = (module._parameters[name] for module, name in owned)
    return all(parameter is None or parameter.device.type != "meta" for parameter in parameters)
