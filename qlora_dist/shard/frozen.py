"""The frozen tensors of a unit as one flat run of bytes, which every strategy can cut into equal shards.

Bytes, because nothing that treats them as numbers may touch packed 4-bit weights: some copies on CUDA rewrite the NaN
patterns of 16-bit floats, and mixed precision casts whatever is floating. One run, because one gather a layer is faster
than fifty, and because the quantisation constants are sharded with the weights then.

B bytes of a unit, O and I outputs and inputs of a linear layer.
"""

import math
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from qlora_dist.model.embedding import Stored
from qlora_dist.shard.units import Unit

# Where a tensor may begin: a divisor of every dtype's size and of a GPU's widest load.
ALIGNMENT = 256
BYTES = "frozen_bytes"


@dataclass(frozen=True)
class Span:
    """A tensor's place among the bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def of(self, bytes_B: Tensor) -> Tensor:
        """The tensor, a view of `bytes_B`."""
        return bytes_B[self.offset : self.end].view(self.dtype).view(self.shape)


@dataclass
class FrozenTensor:
    """One frozen parameter, wherever it is used.

    owners: modules and the attribute that holds it there (two for a tied weight).
    parts: spans by name; `data`, and for a 4-bit weight what its quantisation state holds.
    weight: the parameter without its bytes, of its shape; for a 4-bit one with its quantisation state, emptied too.
    """

    owners: list[tuple[nn.Module, str]]
    parts: dict[str, Span]
    weight: nn.Parameter

    def view(self, bytes_B: Tensor) -> Tensor:
        """The parameter as it was, its memory a view of `bytes_B`."""
        data = self.parts["data"].of(bytes_B)
        if not is_4bit(self.weight):
            return data
        weight: Any = self.weight
        state = copy(weight.quant_state)
        state.absmax = self.parts["absmax"].of(bytes_B)
        if state.nested:
            state.offset = self.parts["offset"].of(bytes_B)
            state.state2 = copy(state.state2)
            state.state2.absmax = self.parts["nested_absmax"].of(bytes_B)
        return _like_4bit(self.weight, data, state)


class FrozenUnit:
    """All frozen tensors of one unit, laid out one after the other.

    Args:
        unit: its modules; tensors of modules in `apart` are left out, as another unit's.
        num_shards: the bytes are padded so that so many equal shards begin where tensors may.

    Attributes:
        num_bytes: B, padding included.
        module: the module that `place` registers the bytes on.
    """

    def __init__(self, unit: Unit, num_shards: int, apart: set[nn.Module] | frozenset[nn.Module] = frozenset()):
        self.unit = unit
        self.module = unit.modules[0]
        self.tensors = _frozen_tensors(unit, apart)
        last = max((span.end for tensor in self.tensors for span in tensor.parts.values()), default=0)
        self.num_bytes = _up(last, ALIGNMENT * num_shards)
        self.seen: Tensor | None = None

    def pack(self, shard: int = 0, num_shards: int = 1) -> Tensor:
        """All tensors as bytes [B] on their device, or one of `num_shards` equal shards of them.

        The modules are left with empty ones, tensor after tensor.
        """
        device = self.tensors[0].owners[0][0].get_parameter(self.tensors[0].owners[0][1]).device
        size = self.num_bytes // num_shards
        begin, end = shard * size, (shard + 1) * size
        bytes_B = torch.zeros(size, dtype=torch.uint8, device=device)
        for tensor in self.tensors:
            owner, name = tensor.owners[0]
            for part, value in _parts(owner.get_parameter(name)):
                span = tensor.parts[part]
                first, last = max(span.offset, begin), min(span.end, end)
                if first < last:
                    raw = value.detach().contiguous().view(-1).view(torch.uint8)
                    bytes_B[first - begin : last - begin] = raw[first - span.offset : last - span.offset]
            for owner, name in tensor.owners:
                owner._parameters[name] = tensor.weight
                if is_4bit(tensor.weight):
                    # bitsandbytes keeps the constants at the layer too.
                    owner.quant_state = tensor.weight.quant_state  # type: ignore[attr-defined]
        return bytes_B

    def place(self, bytes_B: Tensor, container: torch.dtype = torch.uint8) -> None:
        """Register the bytes, whole or for a strategy to shard, as the module's parameter; its tensors become views.

        Args:
            container: the dtype that the parameter has on the outside.

        From here on the modules' forward reads the bytes that the parameter holds then. Nothing of them is kept from
        the forward to the backward: they may be freed and gathered anew between.
        """
        self.module.register_parameter(BYTES, nn.Parameter(bytes_B.view(container), requires_grad=False))
        for tensor in self.tensors:
            for owner, name in tensor.owners:
                del owner._parameters[name]
                owner.__dict__[name] = tensor.weight
                owner.__dict__[f"current_{name}"] = partial(self.current, tensor)
                if is_4bit(tensor.weight):
                    owner.__class__ = _keeping_its_weight(type(owner))  # type: ignore[arg-type]
                # A stored head asks for its weight anew by itself.
                if isinstance(owner, nn.Linear) and name == "weight" and not isinstance(owner, Stored):
                    forward = _linear_forward(owner, tensor)
                    # A fused head wraps whatever the plain forward is.
                    with_loss = owner.__dict__.get("with_loss")
                    owner.__dict__["forward"] = forward if with_loss is None else with_loss(forward)

    @property
    def parameter(self) -> Tensor:
        """The parameter as it stands: all bytes while the unit is gathered, in their container."""
        parameter: Tensor = self.module._parameters[BYTES]  # type: ignore[assignment]
        return parameter

    def bytes_now(self) -> Tensor:
        """The bytes as they stand."""
        parameter = self.parameter
        return parameter if parameter.dtype == torch.uint8 else parameter.detach().view(torch.uint8)

    def current(self, tensor: FrozenTensor) -> Tensor:
        """The view of `tensor` among the bytes as they stand."""
        if self.parameter is self.seen:
            owner, name = tensor.owners[0]
            view: Tensor = owner.__dict__[name]
            return view
        return tensor.view(self.bytes_now())

    def set_views(self) -> None:
        """Let the modules' attributes be views of the gathered bytes; for the start of each forward."""
        if self.parameter is self.seen:
            return
        bytes_B = self.bytes_now()
        for tensor in self.tensors:
            view = tensor.view(bytes_B)
            for owner, name in tensor.owners:
                owner.__dict__[name] = view
        self.seen = self.parameter

    def copy_views(self) -> None:
        """As `set_views`, for gathered bytes whose memory lives as long as a view of it: small tensors are copied."""
        bytes_B = self.bytes_now()
        for tensor in self.tensors:
            view = tensor.view(bytes_B)
            for owner, name in tensor.owners:
                # Linear weights are asked for anew in the backward; norms and biases are saved by autograd.
                keeps = not isinstance(owner, nn.Linear | nn.Embedding) or name != "weight"
                owner.__dict__[name] = view.clone() if keeps else view

    def drop_views(self) -> None:
        """Forget the views that `copy_views` set."""
        for tensor in self.tensors:
            for owner, name in tensor.owners:
                owner.__dict__[name] = tensor.weight


# This rank's shard of each unit's bytes, by the unit's name.
Shards = dict[str, tuple[FrozenUnit, Tensor]]


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b for a frozen W that is asked for in the forward and again in the backward, and saved in neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return linear(x, weight().to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad @ ctx.weight().to(grad.dtype), None, None


@cache
def _keeping_its_weight(kind: type[nn.Module]) -> Any:
    """`kind`, whose weight nobody sets: PEFT's DoRA gives a layer on a CPU its own weight back, as a parameter."""

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        if name != "weight":
            kind.__setattr__(self, name, value)

    return type(kind.__name__, (kind,), {"__setattr__": __setattr__, "__module__": kind.__module__})


def _linear_forward(layer: Any, tensor: FrozenTensor) -> Callable[[Tensor], Tensor]:
    if not is_4bit(tensor.weight):
        return lambda x: _FrozenLinear.apply(x.to(tensor.weight.dtype), layer.current_weight, layer.bias)

    from bitsandbytes.functional import dequantize_4bit

    def dequantised() -> Tensor:
        weight: Any = layer.current_weight()
        return dequantize_4bit(weight.data, weight.quant_state)

    def forward(x: Tensor) -> Tensor:
        dtype = layer.compute_dtype or x.dtype
        output: Tensor = _FrozenLinear.apply(x.to(dtype), dequantised, layer.bias)
        return output.to(x.dtype)

    return forward


def is_4bit(weight: Tensor) -> bool:
    """Whether it is a quantised weight of bitsandbytes."""
    return getattr(weight, "quant_state", None) is not None


@dataclass
class _Layout:
    tensors: dict[int, FrozenTensor] = field(default_factory=dict)
    offset: int = 0

    def add(self, owner: nn.Module, name: str, weight: nn.Parameter) -> None:
        if id(weight) in self.tensors:
            self.tensors[id(weight)].owners.append((owner, name))
            return
        parts = {}
        for part, value in _parts(weight):
            self.offset = _up(self.offset, ALIGNMENT)
            parts[part] = Span(self.offset, tuple(value.shape), value.dtype)
            self.offset = parts[part].end
        self.tensors[id(weight)] = FrozenTensor([(owner, name)], parts, _emptied(weight))


def _frozen_tensors(unit: Unit, apart: set[nn.Module] | frozenset[nn.Module]) -> list[FrozenTensor]:
    layout = _Layout()
    for root in unit.modules:
        for owner in own_modules(root, apart):
            for name, weight in owner._parameters.items():
                if weight is not None and not weight.requires_grad:
                    layout.add(owner, name, weight)
    return list(layout.tensors.values())


def own_modules(root: nn.Module, apart: set[nn.Module] | frozenset[nn.Module]) -> Iterator[nn.Module]:
    """`root` and all modules below it, down to those in `apart`."""
    yield root
    for child in root.children():
        if child not in apart:
            yield from own_modules(child, apart)


def _parts(weight: Any) -> Iterator[tuple[str, Tensor]]:
    yield "data", weight.data
    if is_4bit(weight):
        state = weight.quant_state
        yield "absmax", state.absmax
        if state.nested:
            yield "offset", state.offset
            yield "nested_absmax", state.state2.absmax


def _emptied(weight: Any) -> nn.Parameter:
    """`weight` in its shape and without its memory, for those who ask for shape, device, dtype and kind.

    Whoever reads it as a number gets NaN, which does not stay unseen.
    """
    number = torch.nan if weight.dtype.is_floating_point else 0
    nothing = torch.full((), number, dtype=weight.dtype, device=weight.device).expand(weight.shape)
    if not is_4bit(weight):
        made = nn.Parameter(nothing, requires_grad=False)
        # Marks that others left, such as that it needs no initialisation.
        made.__dict__.update(weight.__dict__)
        return made
    state = copy(weight.quant_state)
    state.absmax = torch.empty(0, dtype=state.absmax.dtype, device=weight.device)
    state.code = _constant(state.code)
    if state.nested:
        state.offset = torch.empty(0, dtype=state.offset.dtype, device=weight.device)
        state.state2 = copy(state.state2)
        state.state2.absmax = torch.empty(0, dtype=state.state2.absmax.dtype, device=weight.device)
        state.state2.code = _constant(state.state2.code)
    return _like_4bit(weight, nothing, state)


def _like_4bit(weight: Any, data: Tensor, state: Any) -> nn.Parameter:
    from bitsandbytes.nn import Params4bit

    made: Any = torch.Tensor._make_subclass(Params4bit, data, False)
    made.__dict__.update(weight.__dict__)
    made.quant_state = state
    return made


_CONSTANTS: dict[tuple[str, bytes], Tensor] = {}


def _constant(code: Tensor) -> Tensor:
    """The one copy of a lookup table that all weights of a device share."""
    key = (str(code.device), code.cpu().numpy().tobytes())
    return _CONSTANTS.setdefault(key, code)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
