"""The optimizer's view of one rank's shard of flat adapter parameters: one parameter a segment that the shard touches.

Flat parameters are cut on blocks of 256 elements (see `flat`), so a piece's 8-bit state is a run of the whole weight's
blocks, and state is gathered, cut anew and loaded without a bit of change, whatever the number of shards.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from qlora_dist.optim.optimizers import (
    CONSTANT_KEYS,
    init_optimizer_state,
    load_optimizer_state,
    settle,
    zero_code,
)
from qlora_dist.shard.flat import BLOCK, FlatAdapter, Segment
from qlora_dist.shard.strategy import FullState, OptimizerFactory


@dataclass(frozen=True)
class Piece:
    """A run of one segment's elements that this rank trains.

    begin: its first element in the flat parameter.
    parameter: a view of the rank's shard.
    """

    segment: Segment
    begin: int
    parameter: nn.Parameter


def cut(adapter: FlatAdapter, start: int, shard_N: Tensor) -> dict[str, Piece]:
    """Lay one parameter over each segment that `shard_N`, the elements of `adapter` from `start` on, touches."""
    pieces = {}
    for segment in adapter.segments:
        begin, end = max(segment.begin, start), min(segment.end, start + shard_N.numel())
        if begin < end:
            pieces[segment.name] = Piece(segment, begin, nn.Parameter(shard_N[begin - start : end - start]))
    return pieces


def whole(mine: Tensor, offset: int, size: int, device: torch.device, group: dist.ProcessGroup | None = None) -> Tensor:
    """The `size` elements that the ranks of `group` hold parts of, this one `mine` from `offset` on, bit for bit.

    Args:
        device: where they meet.
        group: those who hold one copy together; all ranks where None.

    Returns:
        All of them, on the CPU.
    """
    # Sums with zeros are exact for integers, and floats go as integers: no bit of theirs is lost.
    as_int = torch.int32 if mine.dtype.itemsize == 4 else mine.dtype
    everything = torch.zeros(size, dtype=as_int, device=device)
    everything[offset : offset + mine.numel()] = mine.detach().reshape(-1).view(as_int)
    dist.all_reduce(everything, group=group)
    return everything.cpu().view(mine.dtype)


class PieceOptimizer:
    """An optimizer over this rank's pieces of all flat adapter parameters.

    Args:
        adapters: those of all units, in the same order on every rank.
        pieces: this rank's, by segment name.
        device: where collectives take place.
        group: the ranks that hold one copy together; all of them where None.
    """

    def __init__(
        self,
        adapters: list[FlatAdapter],
        pieces: dict[str, Piece],
        make_optimizer: OptimizerFactory,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ):
        self.adapters, self.pieces, self.device, self.group = adapters, pieces, device, group
        self.parameters = {name: piece.parameter for name, piece in pieces.items()}
        # A rank beyond the last block of a small adapter trains nothing, and optimizers refuse to be empty.
        trained = self.parameters or {"nothing": nn.Parameter(torch.zeros(1, device=device))}
        self.in_8bit = {name: piece.segment.in_8bit for name, piece in pieces.items()}
        self.optimizer: Optimizer = make_optimizer(trained)
        init_optimizer_state(self.optimizer, self.parameters, self.in_8bit)

    def full_state(self, adapter: dict[str, Tensor]) -> FullState:
        """The state of all pieces of all ranks by weight, beside the full `adapter`. All ranks call it together."""
        settle(self.optimizer)
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        keys = self._keys()
        for segment in self._segments():
            piece = self.pieces.get(segment.name)
            mine: dict[str, Any] = {} if piece is None else self.optimizer.state.get(piece.parameter, {})
            for key, what in keys.get(segment.name, {}).items():
                if not isinstance(what, torch.dtype):
                    for weight in segment.weights:
                        if isinstance(what, Tensor):
                            tensors[f"{weight.key}|{key}"] = what.to("cpu", copy=True)
                        else:
                            numbers[f"{weight.key}|{key}"] = what
                    continue
                grain = grain_of(key)
                own = mine[key] if piece is not None else torch.empty(0, dtype=what)
                offset = 0 if piece is None else (piece.begin - segment.begin) // grain
                everything = whole(own, offset, (segment.end - segment.begin) // grain, self.device, self.group)
                tensors |= {f"{w.key}|{key}": part for w, part in segment.split(everything, grain)}
        return FullState(adapter, tensors, numbers)

    def load(self, state: FullState) -> None:
        """Take up this rank's part of a full optimizer state.

        Raises:
            UserError: the state is another optimizer's or another adapter's.
        """
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        keys: dict[str, list[str]] = {}
        for full_name in (*state.optimizer, *state.optimizer_scalars):
            name, _, key = full_name.rpartition("|")
            keys.setdefault(name, []).append(key)
        for name, piece in self.pieces.items():
            segment, first = piece.segment, piece.segment.weights[0].key
            for key in keys.get(first, []):
                one = state.optimizer.get(f"{first}|{key}")
                if one is None:
                    numbers[f"{name}|{key}"] = state.optimizer_scalars[f"{first}|{key}"]
                elif one.dim() == 0:
                    tensors[f"{name}|{key}"] = one
                else:
                    grain = grain_of(key)
                    fill = zero_code(self.optimizer, key) if one.dtype == torch.uint8 else 0
                    parts = {w.key: state.optimizer[f"{w.key}|{key}"] for w in segment.weights}
                    begin = (piece.begin - segment.begin) // grain
                    joined = segment.join(parts, grain, fill)
                    tensors[f"{name}|{key}"] = joined[begin : begin + piece.parameter.numel() // grain]
        load_optimizer_state(self.optimizer, self.parameters, tensors, numbers, self.in_8bit)

    def _segments(self) -> Iterable[Segment]:
        return (segment for adapter in self.adapters for segment in adapter.segments)

    def _keys(self) -> dict[str, dict[str, Any]]:
        """What each segment's state is made of: dtypes of what is cut, and the values that are the same everywhere.

        A rank without a piece of a segment learns it from the others.
        """
        mine = {
            name: {
                key: value if not isinstance(value, Tensor) else value.dtype if value.dim() else value.cpu()
                for key, value in self.optimizer.state.get(piece.parameter, {}).items()
                if key not in CONSTANT_KEYS and value is not None
            }
            for name, piece in self.pieces.items()
        }
        parts: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(parts, mine, group=self.group)
        return {name: keys for part in parts for name, keys in part.items()}


def grain_of(key: str) -> int:
    """Elements of a weight that one element of the optimizer state `key` stands for."""
    return BLOCK if key.startswith("absmax") else 1
