"""LoRA adapters on a frozen base: attached, checked, saved and restored in PEFT's own format and names."""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_dist.config.catalogue.facts import and_more
from qlora_dist.config.errors import UserError
from qlora_dist.config.folders import publish_folder
from qlora_dist.config.schema import AdapterConfig
from qlora_dist.model.embedding import Stored, stored_modules
from qlora_dist.model.quiet import mute_known_chatter, quiet_libraries

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER = "default"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
# What PiSSA or LoftQ took out of the base, in the folder of the base without it.
START_FILE = "adapter_start.safetensors"
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
PLAIN_INITS = (True, False, "gaussian", "orthogonal")


def attach_adapter(
    model: "PreTrainedModel", config: AdapterConfig, seed: int, base_revision: str | None = None
) -> "PeftModel":
    """Put a LoRA adapter on the frozen `model`, new or from `config.path`; its weights are fp32 and trainable.

    New weights depend on `seed` alone (drawn on the CPU): every rank gets the same, and no global generator moves.
    PiSSA's and LoftQ's come from the folder of the base that `load_base` changed for them.

    Args:
        base_revision: the hub revision of the base, kept in adapter_config.json.

    Raises:
        UserError: a module name matches nothing (the nearest are named) or cannot be adapted; the adapter folder is
            incomplete, no LoRA adapter, or of a base with other shapes.
    """
    mute_known_chatter()
    from peft import get_peft_model

    state = None
    if config.path is None:
        lora = new_lora_config(config)
    else:
        lora, state = _read_adapter_folder(config.path)
    origin = "adapter" if config.path is None else f"adapter.path: {config.path}"
    lora.base_model_name_or_path = model.name_or_path
    lora.revision = None if config.path is None and config.changes_base else base_revision
    _check_module_names(model, lora, config.path)
    not_linear = _targets_without_weights(model, lora)
    global_state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        with quiet_libraries():
            adapted = get_peft_model(model, lora, adapter_name=ADAPTER)
        if config.path is None and config.init_lora_weights == "orthogonal":
            _init_orthogonal(adapted)
    except ValueError as error:
        if not_linear:
            field = f"{_place(config.path)}target_modules"
            raise UserError("adapter-target-not-linear", field=field, name=not_linear[0]) from error
        raise UserError("adapter-refused", field=origin, reason=error) from error
    finally:
        torch.default_generator.set_state(global_state)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _bridge_dtypes(adapted, model.dtype)
    if state is not None:
        load_adapter_state(adapted, state, source=origin)
    elif config.changes_base:
        _load_start(adapted, Path(str(model.name_or_path)) / START_FILE)
    return adapted


def weights_read_at_attach(config: AdapterConfig) -> Callable[[str], bool]:
    """Whether `attach_adapter` reads the weights of the module of a name, or of one below it.

    PEFT copies what `modules_to_save` names, and DoRA starts from the norm of every weight.

    Raises:
        UserError: as for `attach_adapter`.
    """
    settings: Any = config if config.path is None else _read_adapter_config(config.path)
    copied = settings.modules_to_save or ()

    def reads(name: str) -> bool:
        return bool(settings.use_dora) or any(name == module or name.endswith("." + module) for module in copied)

    return reads


def check_trainable(model: nn.Module) -> tuple[int, int]:
    """Refuse a model of which nothing, or more than the adapter, would train.

    Returns:
        Trainable and all parameters, counted in weights (a 4-bit one counts once, not as half a byte).

    Raises:
        UserError: no adapter is active, nothing requires a gradient, or a base weight does.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not any(layer.active_adapters and not layer.disable_adapters and not layer.merged for layer in layers):
        raise UserError("adapter-inactive")
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _is_adapter_weight(name):
            raise UserError("adapter-trains-base", name=peft_key(name))
        quant_state = getattr(parameter, "quant_state", None)
        counts[parameter.requires_grad] += parameter.numel() if quant_state is None else quant_state.shape.numel()
    # What is in host memory is no parameter; one that embedding and head share counts once, as the others.
    counts[False] += sum({id(m.host): m.host.numel() for m in stored_modules(model) if m.host is not None}.values())
    if not counts[True]:
        raise UserError("adapter-trains-nothing")
    return counts[True], counts[True] + counts[False]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that train, by the names PEFT saves them under, in the order of the model's modules.

    Names and order are the same under DDP, FSDP, `torch.compile` and activation checkpointing wrappers.
    """
    return {peft_key(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def peft_key(name: str) -> str:
    """The key in adapter_model.safetensors for a parameter's name in the (possibly wrapped) model."""
    for prefix in WRAPPER_PREFIXES:
        name = name.replace("." + prefix, ".").removeprefix(prefix)
    name = name.replace(f".modules_to_save.{ADAPTER}", "")
    # PEFT keeps DoRA's magnitudes in a module and saves them as if they were a plain parameter.
    name = re.sub(rf"(\.lora_magnitude_vector)\.{ADAPTER}\.weight$", r"\1", name)
    return re.sub(rf"(\.lora_\w+)\.{ADAPTER}(?=\.|$)", r"\1", name)


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy on the CPU of all adapter weights, `modules_to_save` included, by PEFT's names."""
    return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in _adapter_parameters(model).items()}


def load_adapter_state(model: nn.Module, state: Mapping[str, torch.Tensor], source: str = "The adapter state") -> None:
    """Copy `state` (as from `adapter_state`) into the model's adapter, in place and bit for bit.

    Args:
        source: what to call the state's origin in an error.

    Raises:
        UserError: a weight is missing, unknown, or of another shape; nothing has been changed then.
    """
    parameters = _adapter_parameters(model)
    for name, tensor in state.items():
        if name not in parameters:
            raise UserError("adapter-weight-unknown", source=source, name=name)
        wanted, found = list(parameters[name].shape), list(tensor.shape)
        if _differ_in_rank_alone(name, found, wanted):
            rank = 0 if ".lora_A." in name else 1
            raise UserError("adapter-rank-differs", source=source, name=name, found=found[rank], wanted=wanted[rank])
        if wanted != found:
            raise UserError("adapter-weight-shape", source=source, name=name, found=found, wanted=wanted)
    missing = [name for name in parameters if name not in state]
    if missing:
        raise UserError(
            "adapter-weights-missing", source=source, weights=and_more(missing), missing=len(missing),
            count=len(parameters),
        )  # fmt: skip
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)


def _differ_in_rank_alone(name: str, found: list[int], wanted: list[int]) -> bool:
    if len(found) != 2 or found == wanted:
        return False
    return (".lora_A." in name and found[1] == wanted[1]) or (".lora_B." in name and found[0] == wanted[0])


def adapter_config_json(model: nn.Module) -> bytes:
    """The bytes of adapter_config.json for the model's adapter; the same for the same adapter on every rank."""
    from peft import PeftModel

    adapted = next(module for module in model.modules() if isinstance(module, PeftModel))
    fields = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in adapted.peft_config[ADAPTER].to_dict().items()
    }
    fields["inference_mode"] = True
    return json.dumps(fields, indent=2, sort_keys=True).encode() + b"\n"


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the model's adapter as a plain PEFT folder, in the place of any folder of that name."""
    write_adapter(adapter_state(model), adapter_config_json(model), folder)


def write_adapter(
    state: Mapping[str, torch.Tensor], config_json: bytes, folder: Path, notes: Mapping[str, str] | None = None
) -> None:
    """Write a PEFT adapter folder from what `adapter_state` and `adapter_config_json` gave; whole or not at all.

    Args:
        notes: how it was trained, for the metadata of the weights' file, which PEFT does not read.
    """
    from safetensors.torch import save_file

    def write(partial_folder: Path) -> None:
        save_file(dict(state), partial_folder / WEIGHTS_FILE, metadata={"format": "pt", **(notes or {})})
        (partial_folder / CONFIG_FILE).write_bytes(config_json)

    publish_folder(folder.absolute(), write, replace=True)


def _is_adapter_weight(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def _adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {peft_key(name): p for name, p in model.named_parameters(remove_duplicate=False) if _is_adapter_weight(name)}


def new_lora_config(config: AdapterConfig) -> "LoraConfig":
    """PEFT's configuration for a new adapter, with an `init_lora_weights` that leaves any base alone.

    Raises:
        UserError: the rank does not go with the initialisation.
    """
    from peft import LoraConfig

    settings = config.model_dump(exclude={"path", "loftq_config"})
    if config.init_lora_weights == "orthogonal":
        ranks = {"adapter.r": config.r}
        ranks |= {f"adapter.rank_pattern.{pattern}": rank for pattern, rank in config.rank_pattern.items()}
        for field, rank in ranks.items():
            if rank % 2:
                raise UserError("orthogonal-odd-rank", field=field, rank=rank)
        # PEFT's own gives its weights the base's dtype, which fails on 4-bit layers, also when the adapter is loaded.
        settings["init_lora_weights"] = True
    if config.changes_base:
        # The base has been changed already, and must not be once more when the adapter is loaded.
        settings["init_lora_weights"] = True
    return LoraConfig(task_type="CAUSAL_LM", **settings)


def _init_orthogonal(adapted: "PeftModel") -> None:
    """A and B random in orthogonal halves of the rank space, so that B A = 0 though neither is.

    Source: https://datta0.github.io/posts/rethink-lora-init (as in PEFT).
    """
    weights = trainable_parameters(adapted)
    for name, a_RI in weights.items():  # R: rank, I: inputs, O: outputs
        if not name.endswith(".lora_A.weight"):
            continue
        b_OR, rank = weights[name.replace(".lora_A.", ".lora_B.")], a_RI.shape[0]
        basis_RR, _ = torch.linalg.qr(torch.randn(rank, rank))
        a_RI.data = (torch.randn(a_RI.shape[1], rank // 2) @ basis_RR[0::2]).T.contiguous().to(a_RI.device) / 10
        b_OR.data = (torch.randn(b_OR.shape[0], rank // 2) @ basis_RR[1::2]).to(b_OR.device) / 10


def _load_start(adapted: "PeftModel", file: Path) -> None:
    from safetensors.torch import load_file

    start = load_file(file)
    state = adapter_state(adapted)
    drawn = {name for name in state if ".lora_" in name}
    if drawn != start.keys():
        raise UserError("adapter-start-of-another", file=file, folder=file.parent)
    load_adapter_state(adapted, state | start, source=str(file))


def _read_adapter_folder(folder: Path) -> tuple["LoraConfig", dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    lora = _read_adapter_config(folder)
    try:
        state = load_file(folder / WEIGHTS_FILE)
    except (ValueError, SafetensorError) as error:
        raise UserError("adapter-file-damaged", file=folder / WEIGHTS_FILE, reason=error) from error
    # PEFT adds the frozen embedding itself where it was a target; the base brings it already.
    return lora, {name: tensor for name, tensor in state.items() if ".base_layer." not in name}


def _read_adapter_config(folder: Path) -> "LoraConfig":
    from peft import LoraConfig

    if not folder.is_dir():
        if folder.exists():
            raise UserError("adapter-is-a-file", folder=folder)
        raise UserError("adapter-missing", folder=folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            if name == CONFIG_FILE and (folder / "config.json").is_file():
                raise UserError("adapter-is-a-model", folder=folder)
            if name == WEIGHTS_FILE and (folder / PICKLED_FILE).is_file():
                raise UserError("adapter-pickled", folder=folder, file=PICKLED_FILE)
            raise UserError("adapter-file-missing", folder=folder, name=name)
    try:
        fields: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
    except ValueError as error:
        raise UserError("adapter-file-damaged", file=folder / CONFIG_FILE, reason=error) from error
    if not isinstance(fields, dict):
        raise UserError("adapter-config-not-an-object", file=folder / CONFIG_FILE)
    for key in ("r", "lora_alpha", "lora_dropout"):
        if not isinstance(fields.get(key, 0), int | float):
            raise UserError("adapter-setting-no-number", file=folder / CONFIG_FILE, key=key)
    beyond = [key for key in ("trainable_token_indices", "layer_replication", "target_parameters") if fields.get(key)]
    if fields.get("peft_type") != "LORA":
        raise UserError("adapter-not-lora", folder=folder, type=fields.get("peft_type"))
    if beyond:
        raise UserError("adapter-beyond-lora", folder=folder, setting=beyond[0])
    if fields.get("bias", "none") != "none":
        raise UserError("adapter-with-bias", folder=folder, bias=fields["bias"])
    if fields.get("init_lora_weights", True) not in PLAIN_INITS:
        raise UserError("adapter-changed-its-base", folder=folder, init=fields["init_lora_weights"])
    lora = LoraConfig.from_pretrained(str(folder))
    lora.inference_mode = False
    lora.init_lora_weights = True  # as PEFT's orthogonal start fails on 4-bit layers; every weight is overwritten
    return lora


def _check_module_names(model: nn.Module, lora: "LoraConfig", folder: Path | None) -> None:
    settings = _place(folder)
    names = [name for name, _ in model.named_modules() if name]
    targets = lora.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        try:
            matched = any(re.fullmatch(targets, name) for name in names)
        except re.error as error:
            raise UserError(
                "target-not-a-pattern", field=f"{settings}target_modules", pattern=targets, reason=error
            ) from error
        if not matched:
            raise UserError(
                "target-without-match",
                field=f"{settings}target_modules",
                pattern=targets,
                nearest=_nearest(targets, names),
            )
    if targets is not None and not targets and not lora.modules_to_save:
        raise UserError("adapter-targets-empty", field=f"{settings}target_modules")
    listed = [] if targets is None or isinstance(targets, str) else sorted(targets)
    for field, wanted in (("target_modules", listed), ("modules_to_save", lora.modules_to_save or [])):
        for name in wanted:
            if not any(module == name or module.endswith("." + name) for module in names):
                raise UserError(
                    "adapter-module-unknown", field=settings + field, name=name, nearest=_nearest(name, names)
                )
    for field, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns or {}:
            try:
                expression = re.compile(rf"(.*\.)?({pattern})$")
            except re.error as error:
                raise UserError(
                    "adapter-key-not-a-pattern", field=settings + field, pattern=pattern, reason=error
                ) from error
            if not any(expression.match(name) for name in names):
                raise UserError(
                    "adapter-key-without-match",
                    field=settings + field,
                    pattern=pattern,
                    nearest=_nearest(pattern, names),
                )
    wanted_layers = lora.layers_to_transform
    num_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for layer in [wanted_layers] if isinstance(wanted_layers, int) else wanted_layers or []:
        if num_layers is not None and layer >= num_layers:
            field = f"{settings}layers_to_transform"
            raise UserError("adapter-layer-unknown", field=field, layer=layer, layers=num_layers, last=num_layers - 1)
    for name, module in model.named_modules():
        for field, named in (("target_modules", targets), ("modules_to_save", lora.modules_to_save)):
            if isinstance(module, Stored) and _is_named(name, named):
                setting = "model.embedding" if isinstance(module, nn.Embedding) else "model.head"
                raise UserError(
                    "stored-vocabulary-trained", field=settings + field, name=name, setting=setting, kind=module.kind
                )
        if any(name == saved or name.endswith("." + saved) for saved in lora.modules_to_save or []) and any(
            getattr(p, "quant_state", None) is not None for p in module.parameters()
        ):
            raise UserError("saved-module-quantised", field=f"{settings}modules_to_save", name=name)


def _place(folder: Path | None) -> str:
    """What stands before the name of an adapter's setting in a sentence."""
    return "adapter." if folder is None else f"adapter.path: {folder / CONFIG_FILE}: "


def _targets_without_weights(model: nn.Module, lora: "LoraConfig") -> list[str]:
    """The modules that are targets by name and have no weight matrix, such as activations and whole blocks."""
    targets = lora.target_modules
    if targets is None or targets == "all-linear":
        return []
    return [
        name
        for name, module in model.named_modules()
        if _is_named(name, targets) and getattr(getattr(module, "weight", None), "ndim", 0) < 2
    ]


def _is_named(name: str, wanted: Any) -> bool:
    """Whether a module's name is among PEFT's `wanted`: names, or a regular expression."""
    if wanted is None or wanted == "all-linear":
        return False
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith("." + one) for one in wanted)


def _nearest(wanted: str, names: list[str]) -> str:
    last_parts = sorted({name.split(".")[-1] for name in names if not name.split(".")[-1].isdigit()})
    return ", ".join(difflib.get_close_matches(wanted, last_parts, n=3, cutoff=0.3) or last_parts)


def _bridge_dtypes(adapted: "PeftModel", dtype: torch.dtype) -> None:
    """Let fp32 `modules_to_save` sit in a bf16 or fp16 model, with or without autocast."""
    from peft.utils import ModulesToSaveWrapper

    if dtype == torch.float32:
        return
    base: Any = adapted.get_base_model()
    head = base.get_output_embeddings()
    wrappers: list[Any] = [module for module in adapted.modules() if isinstance(module, ModulesToSaveWrapper)]
    for wrapper in wrappers:
        trained = wrapper.modules_to_save[ADAPTER]
        trained.register_forward_pre_hook(_inputs_to_fp32)
        if wrapper is not head:
            trained.register_forward_hook(partial(_output_to, dtype))


def _inputs_to_fp32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def _output_to(dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.to(dtype)
