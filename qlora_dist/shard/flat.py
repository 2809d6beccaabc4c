"""The adapter weights of a unit as one flat parameter, so laid out that cutting it changes no optimizer's state.

bitsandbytes' 8-bit optimizers quantise their state in blocks of 256 elements, and give small parameters fp32 state.
Here every weight begins on a block, shards are cut on blocks, and weights of either kind lie together: whatever the
number of shards, each block is that of the weight alone, and a weight's kind is decided by its whole size.

N elements of the flat parameter, padding included.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_dist.model.adapter import peft_key
from qlora_dist.shard.units import Unit

BLOCK = 256
# bitsandbytes' default for `min_8bit_size`.
MIN_8BIT_SIZE = 4096
FLAT = "trained_flat"


@dataclass(frozen=True)
class Weight:
    """One adapter weight: its name as PEFT saves it, where modules hold it, and its place in the flat parameter."""

    key: str
    owner: nn.Module
    attribute: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Its elements, without padding."""
        return math.prod(self.shape)

    @property
    def room(self) -> int:
        """Its elements, padded to whole blocks."""
        return -(-self.numel // BLOCK) * BLOCK


@dataclass(frozen=True)
class Segment:
    """A run of weights with the same optimizer state format and learning rate, elements [begin, end)."""

    name: str
    begin: int
    end: int
    weights: tuple[Weight, ...]

    @property
    def in_8bit(self) -> bool:
        """Whether an 8-bit optimizer keeps 8-bit state for it."""
        return self.weights[0].numel >= MIN_8BIT_SIZE

    def split(self, whole: Tensor, grain: int) -> Iterator[tuple[Weight, Tensor]]:
        """Each weight's part of the segment's state: in the weight's shape, or one element a block where `grain` is."""
        for weight in self.weights:
            first, count = (weight.offset - self.begin) // grain, -(-weight.numel // grain)
            part = whole[first : first + count].clone()
            yield weight, part.view(weight.shape) if grain == 1 else part

    def join(self, parts: Mapping[str, Tensor], grain: int, fill: int) -> Tensor:
        """The segment's state from its weights' parts, the reverse of `split`; padding holds `fill`."""
        dtype = parts[self.weights[0].key].dtype
        whole = torch.full(((self.end - self.begin) // grain,), fill, dtype=dtype)
        for weight in self.weights:
            first, count = (weight.offset - self.begin) // grain, -(-weight.numel // grain)
            whole[first : first + count] = parts[weight.key].reshape(-1)
        return whole


class FlatAdapter:
    """The adapter weights of one unit.

    Args:
        unit: its modules; those in `apart` belong to other units.
        names: the full name of each parameter that trains (`trained_names`).
        num_shards: the flat parameter is padded to so many equal shards of whole blocks.

    Attributes:
        segments: 8-bit before fp32 state, and within them A before B matrices (LoRA+ gives B another learning rate).
        numel: N.
    """

    def __init__(self, unit: Unit, names: dict[nn.Parameter, str], num_shards: int, apart: set[nn.Module]):
        self.module = unit.modules[0]
        found = [item for root in unit.modules for item in _trained(root, names, apart)]
        groups: dict[tuple[bool, bool], list[tuple[str, nn.Module, str, nn.Parameter]]] = {}
        for item in found:
            groups.setdefault((item[3].numel() < MIN_8BIT_SIZE, is_lora_b(item[0])), []).append(item)
        self.segments: list[Segment] = []
        offset = 0
        for (small, is_b), items in sorted(groups.items(), key=lambda group: group[0]):
            begin, weights = offset, []
            for key, owner, attribute, parameter in items:
                weights.append(Weight(key, owner, attribute, tuple(parameter.shape), offset))
                offset += weights[-1].room
            # The optimizer tells the B matrices by their name, as it does unsharded.
            kind = f"{'fp32' if small else '8bit'}.{'lora_B' if is_b else 'rest'}.flat"
            self.segments.append(Segment(f"{unit.name or 'root'}.{kind}", begin, offset, tuple(weights)))
        self.numel = -(-offset // (BLOCK * num_shards)) * BLOCK * num_shards
        self.originals = {item[0]: item[3] for item in found}

    @property
    def weights(self) -> list[Weight]:
        """All weights in the order of their offsets."""
        return [weight for segment in self.segments for weight in segment.weights]

    def place(self) -> None:
        """Put the flat parameter in the place of the weights: attributes become views of it at `set_views`."""
        flat_N = self.join({key: parameter.detach() for key, parameter in self.originals.items()})
        for weight in self.weights:
            del weight.owner._parameters[weight.attribute]
        self.originals.clear()
        self.module.register_parameter(FLAT, nn.Parameter(flat_N))
        with torch.no_grad():
            self.set_views()

    def set_views(self) -> None:
        """Let the modules' attributes be views of the gathered parameter, with its gradient; for each forward."""
        flat_N: Tensor = self.module._parameters[FLAT]  # type: ignore[assignment]
        rooms = [weight.room for weight in self.weights]
        pieces = torch.split(flat_N, [*rooms, self.numel - sum(rooms)])
        for weight, piece in zip(self.weights, pieces, strict=False):
            weight.owner.__dict__[weight.attribute] = piece[: weight.numel].view(weight.shape)

    def drop_views(self) -> None:
        """Forget the views that `set_views` made, so that the gathered parameter's memory can be freed."""
        nothing = torch.empty(0, dtype=torch.float32, device=self.module._parameters[FLAT].device)  # type: ignore[union-attr]
        for weight in self.weights:
            weight.owner.__dict__[weight.attribute] = nothing

    def join(self, state: dict[str, Tensor]) -> Tensor:
        """The flat parameter [N] that holds the weights of `state`, padded with zeros."""
        device = next(iter(state.values())).device
        flat_N = torch.zeros(self.numel, dtype=torch.float32, device=device)
        for weight in self.weights:
            flat_N[weight.offset : weight.offset + weight.numel] = state[weight.key].reshape(-1)
        return flat_N

    def part(self, flat_N: Tensor, weight: Weight) -> Tensor:
        """One weight of the full flat parameter, in its shape."""
        return flat_N[weight.offset : weight.offset + weight.numel].view(weight.shape)


def is_lora_b(key: str) -> bool:
    """Whether a weight is the B of an adapter, for which LoRA+ has a learning rate of its own."""
    return ".lora_B." in key or ".lora_embedding_B" in key


def trained_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """The names of the parameters that train. No others: whoever holds a frozen one keeps its memory."""
    return {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _trained(
    module: nn.Module, names: dict[nn.Parameter, str], apart: set[nn.Module]
) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    for attribute, parameter in module._parameters.items():
        if parameter is not None and parameter.requires_grad:
            if parameter.dtype != torch.float32:
                raise ValueError(f"{names[parameter]} is {parameter.dtype}; adapter weights train in fp32")
            yield peft_key(names[parameter]), module, attribute, parameter
    for child in module.children():
        if child not in apart:
            yield from _trained(child, names, apart)
