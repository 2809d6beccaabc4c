"""The units in which a sharded model is gathered: decoder layers, embedding, head, and the rest at the root."""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Unit:
    """Modules whose weights are gathered and freed together.

    name: of the first module, in the model.
    modules: those whose forward needs the weights; more than one where they share a weight (tied embeddings).
    """

    name: str
    modules: tuple[nn.Module, ...]


def base_of(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    get_base = getattr(model, "get_base_model", None)
    return model if get_base is None else get_base()


def find_units(model: nn.Module) -> list[Unit]:
    """The units of a transformers model, plain or inside PEFT, in the order of their forward; the root comes last.

    Decoder layers are what transformers itself never splits over devices (`_no_split_modules`). Embedding and head are
    units of their own, or one together where they are tied.
    """
    base = base_of(model)
    names = {module: name for name, module in base.named_modules()}
    layer_classes = set(base._no_split_modules or ())
    layers = [Unit(name, (module,)) for module, name in names.items() if type(module).__name__ in layer_classes]
    if not layers:
        raise ValueError(f"{type(base).__name__} names no decoder layers (_no_split_modules)")
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None:
        return [Unit(names[embedding], (embedding,)), *layers, Unit("", (base,))]
    if {id(p) for p in embedding.parameters()} & {id(p) for p in head.parameters()}:
        return [Unit(names[embedding], (embedding, head)), *layers, Unit("", (base,))]
    return [Unit(names[embedding], (embedding,)), *layers, Unit(names[head], (head,)), Unit("", (base,))]


def call_through_hooks(model: nn.Module, base: nn.Module) -> None:
    """Let PEFT call `base` itself: it calls the `forward` by name, past the hooks that gather the root."""
    if model is not base:
        tuner: Any = model.base_model
        tuner.forward = base.__call__
