"""PEFT LoRA folders as parents of a new one: read by their headers, checked, and then one layer at a time."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_dist.aggregate.products import Factors
from qlora_dist.config.errors import UserError
from qlora_dist.model.adapter import CONFIG_FILE, WEIGHTS_FILE
from qlora_dist.model.weights import base_fingerprint, read_header

# How PEFT names the two factors of a linear layer and of an embedding.
PAIRS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
PREFIX = "base_model.model."
FLOATS = {"F64", "F32", "F16", "BF16"}
# What makes an adapter more, or other, than scale * B A.
BEYOND = (
    "use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
# The note in the weights' file that says which base it is.
BASE_NOTE = "base"


@dataclass(frozen=True)
class Layer:
    """One adapted layer of one parent: `scale * B A`, N outputs and K inputs."""

    a_name: str
    b_name: str
    rank: int
    num_outputs: int
    num_inputs: int
    scale: float


@dataclass(frozen=True)
class Parent:
    """An adapter folder without its weights.

    layers: by the name of the module in PEFT's file, such as base_model.model.model.layers.0.self_attn.q_proj.
    notes: the metadata of the weights' file.
    """

    folder: Path
    settings: dict[str, Any]
    notes: dict[str, str]
    layers: dict[str, Layer]

    @property
    def rank(self) -> int:
        """The largest of its layers' ranks."""
        return max(layer.rank for layer in self.layers.values())

    @property
    def base(self) -> str:
        """The base by name, and its revision where one is told."""
        name, revision = self.settings.get("base_model_name_or_path"), self.settings.get("revision")
        return f"{name}@{revision}" if revision else str(name)


def read_parent(folder: Path) -> Parent:
    """Read a folder's settings and the header of its weights.

    Raises:
        UserError: it is no folder of a plain LoRA adapter in safetensors, or its two files do not belong together.
    """
    from safetensors import safe_open

    if not folder.is_dir():
        raise UserError("aggregate-folder-missing", folder=folder)
    if not (folder / CONFIG_FILE).is_file() and (folder / "adapter" / CONFIG_FILE).is_file():
        raise UserError("aggregate-run-folder", folder=folder, adapter=folder / "adapter")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError("aggregate-no-adapter", folder=folder, name=name)
    settings = _read_settings(folder)
    header, _ = read_header(folder / WEIGHTS_FILE)
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        notes = file.metadata() or {}
    # PEFT adds the frozen embedding itself where it was a target.
    shapes = {name: _shape(folder, name, entry) for name, entry in header.items() if ".base_layer." not in name}
    layers: dict[str, Layer] = {}
    for a_name, (rank, num_inputs) in shapes.items():
        module, a_suffix, b_suffix = _module(a_name)
        if a_suffix is None or module + b_suffix not in shapes:
            if any(a_name.endswith(b) and a_name.removesuffix(b) + a in shapes for a, b in PAIRS):
                continue
            raise UserError("aggregate-weight-unknown", folder=folder, name=a_name)
        num_outputs, b_rank = shapes[module + b_suffix]
        if b_rank != rank or not rank:
            raise UserError("aggregate-factors-differ", folder=folder, module=module, a_rank=rank, b_rank=b_rank)
        scale = _scale(folder, settings, module, a_name, rank)
        layers[module] = Layer(a_name, module + b_suffix, rank, num_outputs, num_inputs, scale)
    if not layers:
        raise UserError("aggregate-empty", folder=folder)
    return Parent(folder, settings, notes, layers)


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text())
    except ValueError as error:
        raise UserError("aggregate-config-damaged", file=folder / CONFIG_FILE, reason=error) from error
    if not isinstance(settings, dict):
        raise UserError("aggregate-config-damaged", file=folder / CONFIG_FILE, reason="it is no JSON object")
    if settings.get("peft_type") != "LORA":
        raise UserError("aggregate-not-lora", folder=folder, type=settings.get("peft_type"))
    for setting in ("rank_pattern", "alpha_pattern"):
        try:
            [re.compile(key) for key in dict(settings.get(setting) or {})]
        except (re.error, TypeError, ValueError) as error:
            reason = f"{setting}: {error}"
            raise UserError("aggregate-config-damaged", file=folder / CONFIG_FILE, reason=reason) from error
    for setting in BEYOND:
        if settings.get(setting):
            raise UserError("aggregate-beyond-lora", folder=folder, setting=setting)
    if settings.get("bias", "none") != "none":
        raise UserError("aggregate-beyond-lora", folder=folder, setting=f"bias={settings['bias']}")
    init = str(settings.get("init_lora_weights")).lower()
    if init.startswith(INITS_THAT_CHANGE_THE_BASE):
        raise UserError("aggregate-changed-its-base", folder=folder, init=init)
    return settings


def _shape(folder: Path, name: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    shape = entry["shape"]
    if len(shape) != 2 or entry["dtype"] not in FLOATS:
        raise UserError("aggregate-weight-no-matrix", folder=folder, name=name, dtype=entry["dtype"], shape=shape)
    return shape[0], shape[1]


def _module(name: str) -> tuple[str, str | None, str]:
    """The module of an A's name, and the suffixes of A and B there; None where it is no A."""
    for a_suffix, b_suffix in PAIRS:
        if name.endswith(a_suffix):
            return name.removesuffix(a_suffix), a_suffix, b_suffix
    return name, None, ""


def _scale(folder: Path, settings: Mapping[str, Any], module: str, a_name: str, rank: int) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) under rsLoRA, with the layer's own alpha and rank (as PEFT has it).

    Raises:
        UserError: the settings name another rank than the weights have, or no numbers.
    """
    told_rank = _for_module(settings.get("rank_pattern") or {}, module, settings.get("r"))
    alpha = _for_module(settings.get("alpha_pattern") or {}, module, settings.get("lora_alpha"))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(
            "aggregate-config-damaged", file=folder / CONFIG_FILE, reason=f"its lora_alpha is {alpha}, no number"
        )
    if told_rank != rank:
        raise UserError("adapter-rank-differs", source=folder, name=a_name, found=rank, wanted=told_rank)
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _for_module(pattern: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    name = module.removeprefix(PREFIX)
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def read_factors(parent: Parent, module: str, device: torch.device) -> Factors:
    """One layer's factors; the file is open, and mapped into memory, for no longer than that.

    Raises:
        UserError: a value is NaN or infinite.
    """
    from safetensors import safe_open

    layer = parent.layers[module]
    with safe_open(parent.folder / WEIGHTS_FILE, framework="pt") as file:
        read = [file.get_tensor(name).to(device, torch.float32, copy=True) for name in (layer.a_name, layer.b_name)]
    for name, tensor in zip((layer.a_name, layer.b_name), read, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            raise UserError("aggregate-not-finite", folder=parent.folder, name=name)
    return Factors(read[0], read[1], layer.scale)


def check_shapes(parents: Sequence[Parent]) -> dict[str, Layer]:
    """Every layer that any parent adapts, in the order of the first one's file.

    Raises:
        UserError: two parents adapt a layer of one name and other shapes.
    """
    found: dict[str, tuple[Parent, Layer]] = {}
    for parent in parents:
        for module, layer in parent.layers.items():
            first, other = found.setdefault(module, (parent, layer))
            sizes = [(one.num_outputs, one.num_inputs) for one in (layer, other)]
            if sizes[0] != sizes[1] or layer.a_name != other.a_name:
                raise UserError(
                    "aggregate-shapes-differ", module=module, first=first.folder, second=parent.folder,
                    first_shape=f"{sizes[1][0]} x {sizes[1][1]}", second_shape=f"{sizes[0][0]} x {sizes[0][1]}",
                )  # fmt: skip
    return {module: layer for module, (_, layer) in found.items()}


def check_same_base(parents: Sequence[Parent], named: str | None = None) -> str | None:
    """Refuse parents over different bases.

    Two fingerprints, which this project's `train` notes in the weights' file, decide where both parents have one.
    Otherwise the names have to be the same, or name folders that hold the same model; `named` says that they mean one.

    Returns:
        The fingerprint, if one is noted.

    Raises:
        UserError: two parents are over different bases, or may be.
    """
    noted = [(parent, parent.notes[BASE_NOTE]) for parent in parents if BASE_NOTE in parent.notes]
    for parent, fingerprint in noted[1:]:
        if fingerprint != noted[0][1]:
            raise UserError(
                "aggregate-bases-differ", first=noted[0][0].folder, first_base=noted[0][0].base,
                first_print=noted[0][1][:12], second=parent.folder, second_base=parent.base,
                second_print=fingerprint[:12],
            )  # fmt: skip
    if named is None and len(noted) < len(parents):
        for parent in parents[1:]:
            if parent.base != parents[0].base and not _hold_the_same(parents[0], parent):
                raise UserError(
                    "aggregate-base-names-differ", first=parents[0].folder, first_base=parents[0].base,
                    second=parent.folder, second_base=parent.base,
                )  # fmt: skip
    return noted[0][1] if noted else None


def _hold_the_same(*parents: Parent) -> bool:
    folders = [Path(str(parent.settings.get("base_model_name_or_path"))) for parent in parents]
    return (
        all((folder / "config.json").is_file() for folder in folders) and len(set(map(base_fingerprint, folders))) == 1
    )
