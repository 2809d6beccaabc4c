"""LoRA adapters on a frozen base: attached, checked, saved and restored in PEFT's own format and names."""

import difflib
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qlora_dist.config.errors import UserError
from qlora_dist.config.folders import publish_folder
from qlora_dist.config.schema import AdapterConfig
from qlora_dist.model.quiet import mute_known_chatter, quiet_libraries

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER = "default"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
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
        origin = "adapter"
    else:
        lora, state = _read_adapter_folder(config.path)
        origin = f"adapter.path: {config.path}"
    lora.base_model_name_or_path = model.name_or_path
    lora.revision = None if config.path is None and config.changes_base else base_revision
    _check_module_names(model, lora, origin)
    global_state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        with quiet_libraries():
            adapted = get_peft_model(model, lora, adapter_name=ADAPTER)
        if config.path is None and config.init_lora_weights == "orthogonal":
            _init_orthogonal(adapted)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{origin}: PEFT refuses these settings ({reason}); correct them.") from error
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
        raise UserError(
            "adapter: no adapter is active on the model (none attached, disabled or merged), so the run would train "
            "nothing; check adapter.target_modules."
        )
    counts = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _is_adapter_weight(name):
            raise UserError(
                f"adapter: the base weight {peft_key(name)} would be trained; "
                "name its module in adapter.modules_to_save or leave it frozen."
            )
        quant_state = getattr(parameter, "quant_state", None)
        counts[parameter.requires_grad] += parameter.numel() if quant_state is None else quant_state.shape.numel()
    if not counts[True]:
        raise UserError("adapter: no weight of it requires a gradient, so the run would train nothing.")
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
            raise UserError(
                f"{source} has a weight {name}, which this model's adapter lacks; use the same base model "
                "and adapter settings."
            )
        wanted, found = list(parameters[name].shape), list(tensor.shape)
        if wanted != found:
            raise UserError(
                f"{source} has {name} of shape {found} where this model needs {wanted}; use the base model it was "
                "trained on and the same adapter settings (r, target_modules)."
            )
    missing = [name for name in parameters if name not in state]
    if missing:
        raise UserError(
            f"{source} lacks {missing[0]} and {len(missing) - 1} more of {len(parameters)} weights; "
            "use the same base model and adapter settings."
        )
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)


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


def write_adapter(state: Mapping[str, torch.Tensor], config_json: bytes, folder: Path) -> None:
    """Write a PEFT adapter folder from what `adapter_state` and `adapter_config_json` gave; whole or not at all."""
    from safetensors.torch import save_file

    def write(partial_folder: Path) -> None:
        save_file(dict(state), partial_folder / WEIGHTS_FILE, metadata={"format": "pt"})
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
        odd = [rank for rank in (config.r, *config.rank_pattern.values()) if rank % 2]
        if odd:
            raise UserError(f"adapter.r: init_lora_weights=orthogonal needs an even rank, not {odd[0]}; change it.")
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
        raise UserError(
            f"{file} is not the start of this adapter; delete the folder {file.parent}, it will be made again."
        )
    load_adapter_state(adapted, state | start, source=str(file))


def _read_adapter_folder(folder: Path) -> tuple["LoraConfig", dict[str, torch.Tensor]]:
    from peft import LoraConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"adapter.path: {folder} has no {name}; give a PEFT adapter folder with safetensors weights."
            )
    try:
        fields: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
        state = load_file(folder / WEIGHTS_FILE)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"adapter.path: a file in {folder} is damaged ({error}); fetch it again.") from error
    beyond = [key for key in ("trainable_token_indices", "layer_replication", "target_parameters") if fields.get(key)]
    if fields.get("peft_type") != "LORA" or beyond or fields.get("bias", "none") != "none":
        what = f"uses {beyond[0]}" if beyond else f"is of type {fields.get('peft_type')}, bias {fields.get('bias')}"
        raise UserError(f"adapter.path: {folder} {what}; only LoRA adapters without it can be trained further.")
    if fields.get("init_lora_weights", True) not in PLAIN_INITS:
        raise UserError(
            f"adapter.path: {folder} was made by {fields['init_lora_weights']}, which changes the base weights too; "
            "convert it to plain LoRA first (PEFT: save_pretrained(path_initial_model_for_weight_conversion=...))."
        )
    lora = LoraConfig.from_pretrained(str(folder))
    lora.inference_mode = False
    lora.init_lora_weights = True  # as PEFT's orthogonal start fails on 4-bit layers; every weight is overwritten
    # PEFT adds the frozen embedding itself where it was a target; the base brings it already.
    return lora, {name: tensor for name, tensor in state.items() if ".base_layer." not in name}


def _check_module_names(model: nn.Module, lora: "LoraConfig", origin: str) -> None:
    names = [name for name, _ in model.named_modules() if name]
    targets = lora.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        try:
            matched = any(re.fullmatch(targets, name) for name in names)
        except re.error as error:
            raise UserError(f"{origin}: target_modules {targets!r} is no valid pattern ({error}).") from error
        if not matched:
            raise UserError(
                f"{origin}: target_modules {targets!r} matches no module in full; "
                f"nearest are {_nearest(targets, names)}."
            )
    listed = [] if targets is None or isinstance(targets, str) else sorted(targets)
    for field, wanted in (("target_modules", listed), ("modules_to_save", lora.modules_to_save or [])):
        for name in wanted:
            if not any(module == name or module.endswith("." + name) for module in names):
                raise UserError(
                    f"{origin}: {field} names {name!r}, which the base lacks; nearest are {_nearest(name, names)}."
                )
    for field, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns or {}:
            try:
                expression = re.compile(rf"(.*\.)?({pattern})$")
            except re.error as error:
                raise UserError(f"{origin}: {field} names {pattern!r}, no valid pattern ({error}).") from error
            if not any(expression.match(name) for name in names):
                raise UserError(
                    f"{origin}: {field} names {pattern!r}, which matches no module; "
                    f"nearest are {_nearest(pattern, names)}."
                )
    wanted_layers = lora.layers_to_transform
    num_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for layer in [wanted_layers] if isinstance(wanted_layers, int) else wanted_layers or []:
        if num_layers is not None and layer >= num_layers:
            raise UserError(
                f"{origin}: layers_to_transform names layer {layer}, but the base has {num_layers}, "
                f"counted from 0; give numbers up to {num_layers - 1}."
            )
    for name, module in model.named_modules():
        if any(name == saved or name.endswith("." + saved) for saved in lora.modules_to_save or []) and any(
            getattr(p, "quant_state", None) is not None for p in module.parameters()
        ):
            raise UserError(
                f"{origin}: modules_to_save names {name}, which is quantised and cannot be trained in full; "
                "put it in target_modules or set model.quantization=none."
            )


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
