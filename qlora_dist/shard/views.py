"""The adapter of a worker that holds all of it: parameters stay where they are, over flat buffers.

Each weight's values and its gradient are views of two buffers, so that clearing, measuring, summing and stepping the
gradients takes a few launches however many weights there are. Weights begin on blocks of 256 elements, and lie together
by the kind of their optimizer state and learning rate (see `flat`). A gradient is never None: a weight that a step does
not use has a gradient of zeros, decays, and lives on its momentum, as it does under every other strategy.

N elements of the buffers, padding included.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from qlora_dist.config.errors import UserError
from qlora_dist.optim.optimizers import CONSTANT_KEYS, load_optimizer_state, settle, zero_code
from qlora_dist.shard.flat import MIN_8BIT_SIZE, Segment, Weight, is_lora_b
from qlora_dist.shard.pieces import grain_of
from qlora_dist.shard.strategy import FullState

# Of one segment, unless a single weight is larger: what an optimizer that is kept on the host fetches at a time.
SEGMENT_ELEMENTS = 2**24


class FlatViews:
    """The weights of a model, laid out group after group.

    Args:
        groups: the parameters of `model` that train, by PEFT's names; each belongs to one group.

    Attributes:
        grad_N: the gradients of all weights; what is padding stays 0.
        groups: of each group the part of `grad_N`.
        segments: runs of weights with the same kind of state.
        pieces: the optimizer's parameters, by segment name; their gradients are there for good.
        in_8bit: whether an 8-bit optimizer keeps 8-bit state for a piece, as it does for the weights alone.
    """

    def __init__(self, model: nn.Module, groups: Sequence[dict[str, nn.Parameter]]):
        self.segments: list[Segment] = []
        self._owners = {
            parameter: (module, attribute)
            for module in model.modules()
            for attribute, parameter in module._parameters.items()
            if parameter is not None and parameter.requires_grad
        }
        parameters: dict[str, nn.Parameter] = {}
        ends: list[int] = [0]
        for group in groups:
            parameters |= group
            ends.append(self._lay_out(group, ends[-1]))
        some = next(iter(parameters.values()))
        odd = next((name for name, p in parameters.items() if p.dtype != torch.float32), None)
        if odd is not None:
            raise ValueError(f"{odd} is {parameters[odd].dtype}; adapter weights train in fp32")
        with torch.no_grad():
            self.weight_N = torch.zeros(ends[-1], dtype=torch.float32, device=some.device)
            self.grad_N = torch.zeros_like(self.weight_N)
            for segment in self.segments:
                for weight in segment.weights:
                    parameter = parameters[weight.key]
                    view = self._part(self.weight_N, weight)
                    parameter.data = view.copy_(parameter)
                    parameter.grad = self._part(self.grad_N, weight)
        self.groups = [self.grad_N[begin:end] for begin, end in pairwise(ends)]
        self.pieces = {s.name: nn.Parameter(self.weight_N[s.begin : s.end]) for s in self.segments}
        for segment in self.segments:
            self.pieces[segment.name].grad = self.grad_N[segment.begin : segment.end]
        self.in_8bit = {segment.name: segment.in_8bit for segment in self.segments}

    def _lay_out(self, group: dict[str, nn.Parameter], offset: int) -> int:
        """Add the segments of a group that begins at `offset`; its end."""

        def kind(item: tuple[str, nn.Parameter]) -> tuple[bool, bool]:
            return item[1].numel() < MIN_8BIT_SIZE, is_lora_b(item[0])

        last, weights = None, list[Weight]()

        def close() -> None:
            nonlocal weights
            if weights:
                small, b = kind((weights[0].key, group[weights[0].key]))
                # The optimizer tells the B matrices by their name.
                name = f"{len(self.segments)}.{'fp32' if small else '8bit'}.{'lora_B' if b else 'rest'}.flat"
                end = weights[-1].offset + weights[-1].room
                self.segments.append(Segment(name, weights[0].offset, end, tuple(weights)))
                weights = []

        for name, parameter in sorted(group.items(), key=kind):
            if kind((name, parameter)) != last or offset + parameter.numel() - weights[0].offset > SEGMENT_ELEMENTS:
                close()
            last = kind((name, parameter))
            weights.append(Weight(name, *self._owners[parameter], tuple(parameter.shape), offset))
            offset += weights[-1].room
        close()
        return offset

    def _part(self, whole_N: Tensor, weight: Weight) -> Tensor:
        return whole_N[weight.offset : weight.offset + weight.numel].view(weight.shape)


def full_state(optimizer: torch.optim.Optimizer, flat: FlatViews, adapter: dict[str, Tensor]) -> FullState:
    """The state of each weight, on the CPU, beside the full `adapter`."""
    settle(optimizer)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for segment in flat.segments:
        for key, value in optimizer.state.get(flat.pieces[segment.name], {}).items():
            if key in CONSTANT_KEYS or value is None:
                continue
            if isinstance(value, Tensor) and value.dim():
                parts = segment.split(value.cpu(), grain_of(key))
                tensors |= {f"{weight.key}|{key}": part for weight, part in parts}
                continue
            for weight in segment.weights:
                if isinstance(value, Tensor):
                    tensors[f"{weight.key}|{key}"] = value.to("cpu", copy=True)
                else:
                    numbers[f"{weight.key}|{key}"] = value
    return FullState(adapter, tensors, numbers)


def load_full_state(optimizer: torch.optim.Optimizer, flat: FlatViews, state: FullState) -> None:
    """Take up an optimizer's state as `full_state` gives it.

    A weight without state, which no step had used when the checkpoint was made, begins with an empty one.

    Raises:
        UserError: the state is another optimizer's or another adapter's.
    """
    by_weight: dict[str, dict[str, Tensor | float]] = {w.key: {} for s in flat.segments for w in s.weights}
    everything: dict[str, Tensor | float] = {**state.optimizer, **state.optimizer_scalars}
    for full_name, value in everything.items():
        name, _, key = full_name.rpartition("|")
        if name not in by_weight:
            raise UserError("optimizer-state-extra", name=name)
        by_weight[name][key] = value
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for segment in flat.segments:
        known = {w.key: by_weight[w.key] for w in segment.weights if by_weight[w.key]}
        for key in {key for stored in known.values() for key in stored}:
            if any(key not in stored for stored in known.values()):
                raise UserError("optimizer-state-format", name=next(n for n, s in known.items() if key not in s))
            values = {name: stored[key] for name, stored in known.items()}
            some = next(iter(values.values()))
            if not isinstance(some, Tensor):
                numbers[f"{segment.name}|{key}"] = max(float(value) for value in values.values())
            elif not some.dim():
                tensors[f"{segment.name}|{key}"] = max(values.values())  # type: ignore[type-var,assignment]
            else:
                tensors[f"{segment.name}|{key}"] = _joined(optimizer, segment, key, values)  # type: ignore[arg-type]
    load_optimizer_state(optimizer, flat.pieces, tensors, numbers, flat.in_8bit)


def _joined(optimizer: torch.optim.Optimizer, segment: Segment, key: str, values: dict[str, Tensor]) -> Tensor:
    grain, dtype = grain_of(key), next(iter(values.values())).dtype
    fill = zero_code(optimizer, key) if dtype == torch.uint8 and hasattr(optimizer, "name2qmap") else 0
    parts = {}
    for weight in segment.weights:
        size = -(-weight.numel // grain)
        part = values.get(weight.key)
        if part is None:
            part = torch.full((size,), fill, dtype=dtype)
        if part.numel() != size or part.dtype != dtype:
            raise UserError("optimizer-state-format", name=weight.key)
        parts[weight.key] = part
    return segment.join(parts, grain, fill)
