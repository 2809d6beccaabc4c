"""Adapter folders in, one adapter folder out, one layer at a time."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_dist.aggregate.folders import (
    BASE_NOTE,
    PREFIX,
    Layer,
    Parent,
    check_same_base,
    check_shapes,
    read_factors,
    read_parent,
)
from qlora_dist.aggregate.methods import Recipe, combine_layer
from qlora_dist.aggregate.products import Factors, mean_of_products
from qlora_dist.aggregate.weights_file import write_weights
from qlora_dist.config.errors import UserError
from qlora_dist.config.folders import publish_folder
from qlora_dist.model.adapter import CONFIG_FILE, WEIGHTS_FILE

# Which modules of the base an adapter is on, in PEFT's configuration.
SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass
class Summary:
    """What became of the adapters.

    lost: share of the norm of all layers' updates that the projection to `rank` cut off; 0 where none was made.
    worst: the layer of which the largest share was cut off, and this share.
    beside: ||product of the combined factors - combined products|| / ||combined products||, where nothing else is
        between them.
    """

    recipe: Recipe
    parents: list[Parent]
    folder: Path
    rank: int
    num_layers: int
    lost: float = 0.0
    worst: tuple[str, float] = ("", 0.0)
    beside: float | None = None


def aggregate(
    folders: Sequence[Path],
    recipe: Recipe,
    output: Path,
    *,
    base: str | None = None,
    device: str = "cpu",
    each_layer: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Summary:
    """Combine PEFT LoRA folders by `recipe` into the new PEFT folder `output`, which appears whole or not at all.

    One layer of one adapter after another is read, in fp32; the result is written layer by layer, in fp32, with
    lora_alpha = r, so that its scale is 1. The metadata of its weights names method, parents and weights.

    Args:
        folders: as many as `recipe` has weights.
        base: the base's name where the parents have several for the same one; kept in the result.
        device: where it is computed.
        each_layer: goes through the layers' names; for showing progress.

    Raises:
        UserError: a folder is none of a plain LoRA adapter, or damaged, or has NaN in it; bases, shapes, ranks or
            modules do not fit together; `output` exists.
    """
    if output.exists():
        raise UserError("aggregate-output-exists", folder=output)
    place = _device(device)
    parents = [read_parent(folder) for folder in folders]
    fingerprint = check_same_base(parents, base)
    layers = check_shapes(parents)
    rank = _result_rank(recipe, parents, layers)
    summary = Summary(recipe, parents, output, rank, len(layers))
    settings = _settings(parents, layers, rank, base)
    shapes: dict[str, tuple[int, int]] = {}
    for layer in layers.values():
        shapes |= {layer.a_name: (rank, layer.num_inputs), layer.b_name: (layer.num_outputs, rank)}

    def write(partial_folder: Path) -> None:
        tensors = _combined(summary, layers, place, each_layer)
        write_weights(partial_folder / WEIGHTS_FILE, shapes, tensors, _notes(summary, fingerprint))
        (partial_folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")

    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("aggregate-output-not-writable", folder=output, reason=error.strerror) from error
    if not os.access(output.absolute().parent, os.W_OK):
        raise UserError("aggregate-output-not-writable", folder=output, reason="permission denied")
    try:
        published = publish_folder(output.absolute(), write)
    except OSError as error:
        raise UserError("aggregate-output-not-writable", folder=output, reason=error.strerror) from error
    if not published:
        raise UserError("aggregate-output-exists", folder=output)
    return summary


def _device(name: str) -> torch.device:
    try:
        if name.split(":")[0] not in ("cpu", "cuda"):
            raise RuntimeError(name)
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError("aggregate-value", option="--device", value=name, wanted="a device of this machine") from error


def _result_rank(recipe: Recipe, parents: Sequence[Parent], layers: dict[str, Layer]) -> int:
    if recipe.method == "cat":
        return max(sum(p.layers[m].rank for p in parents if m in p.layers) for m in layers)
    if recipe.on == "updates":
        return recipe.rank or max(parent.rank for parent in parents)
    for module in layers:
        having = [parent for parent in parents if module in parent.layers]
        without = next((parent for parent in parents if parent not in having), None)
        if recipe.method == "mean" and without is not None:
            raise UserError("aggregate-layer-missing", module=module, folder=having[0].folder, other=without.folder)
        for parent in having[1:]:
            ranks = having[0].layers[module].rank, parent.layers[module].rank
            if ranks[0] != ranks[1]:
                raise UserError(
                    "aggregate-ranks-differ", method=recipe.method, module=module, first=having[0].folder,
                    first_rank=ranks[0], second=parent.folder, second_rank=ranks[1],
                    mend="svd or cat" if recipe.method == "mean" else "--on updates",
                )  # fmt: skip
    return max(parent.rank for parent in parents)


def _combined(
    summary: Summary,
    layers: dict[str, Layer],
    device: torch.device,
    each_layer: Callable[[Sequence[str]], Iterable[str]],
) -> Iterator[tuple[str, Tensor]]:
    """The result's weights in the order of `layers`; fills in the summary's measures."""
    recipe, squares, cut, apart = summary.recipe, 0.0, 0.0, 0.0
    plain = recipe.on == "factors" and recipe.method in ("mean", "task-arithmetic")
    for module in each_layer(list(layers)):
        factors = [read_factors(p, module, device) if module in p.layers else None for p in summary.parents]
        made = combine_layer(recipe, module, factors, summary.rank)
        results = {layers[module].a_name: made.a_qK.float(), layers[module].b_name: made.b_Nq.float()}
        for name, tensor in results.items():
            if not bool(torch.isfinite(tensor).all()):
                raise UserError("aggregate-result-not-finite", name=name)
        norm = made.norm
        if plain:
            present = [(f, weight) for f, weight in zip(factors, recipe.weights, strict=True) if f is not None]
            some, weights = [f for f, _ in present], [weight for _, weight in present]
            norm = mean_of_products(some, weights, 1).norm
            apart += mean_of_products([*some, Factors(made.a_qK, made.b_Nq, 1.0)], [*weights, -1.0], 1).norm ** 2
        squares, cut = squares + norm**2, cut + (made.lost * norm) ** 2
        if made.lost > summary.worst[1]:
            summary.worst = module.removeprefix(PREFIX), made.lost
        yield from results.items()
    summary.lost = math.sqrt(cut / squares) if squares else 0.0
    summary.beside = math.sqrt(apart / squares) if plain and squares else None


def _settings(parents: Sequence[Parent], layers: dict[str, Layer], rank: int, base: str | None) -> dict[str, Any]:
    """adapter_config.json of the result: the first parent's, of scale 1 and on the layers that any parent adapts."""
    settings = dict(parents[0].settings)
    settings |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    settings |= {"init_lora_weights": True, "inference_mode": True}
    if base is not None:
        settings |= {"base_model_name_or_path": base, "revision": None}
    same = all(
        parent.layers.keys() == layers.keys()
        and all(_sorted(parent.settings.get(key)) == _sorted(settings.get(key)) for key in SELECTION)
        for parent in parents
    )
    if not same:
        settings |= dict.fromkeys(SELECTION)
        settings["target_modules"] = sorted(module.removeprefix(PREFIX) for module in layers)
    return settings


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


def _notes(summary: Summary, fingerprint: str | None) -> dict[str, str]:
    recipe = summary.recipe
    told: dict[str, Any] = {"method": recipe.method, "on": recipe.on, "parents": []}
    if recipe.method in ("ties", "dare", "della"):
        told |= {"density": recipe.density, "majority_sign": recipe.majority_sign, "seed": recipe.seed}
    if recipe.method == "della":
        told["epsilon"] = recipe.epsilon
    for parent, weight in zip(summary.parents, recipe.weights, strict=True):
        with (parent.folder / WEIGHTS_FILE).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        told["parents"].append(
            {"folder": str(parent.folder), "weight": weight, "sha256": digest, "notes": parent.notes}
        )
    base = {BASE_NOTE: fingerprint} if fingerprint else {}
    return {"format": "pt", **base, "aggregate": json.dumps(told)}
