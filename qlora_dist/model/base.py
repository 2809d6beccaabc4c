"""The frozen base model on its device, in NF4, FP4 or in the compute dtype, and its tokenizer."""

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_dist.config.errors import UserError
from qlora_dist.config.folders import folder_lock, publish_folder
from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.model.cache import check_cache, holds_anything, write_cache
from qlora_dist.model.embedding import plan_storage, store_filled
from qlora_dist.model.inits import init_settings, split_tensors
from qlora_dist.model.placement import Placement
from qlora_dist.model.quiet import quiet_libraries
from qlora_dist.model.resolve import is_hub_id
from qlora_dist.model.stream import ALONE, empty_model, stream_model
from qlora_dist.model.synthetic import synthetic_tensors
from qlora_dist.model.tensors import LazyTensor, folder_tensors
from qlora_dist.model.weights import base_fingerprint, is_synthetic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What holds a vocabulary, in every family's naming.
TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "merges.txt")


def compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype of activations and of unquantised weights; `auto` as the schema says.

    Raises:
        UserError: bf16 is asked of a GPU that lacks it.
    """
    has_bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if config.compute_dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16 if has_bf16 else torch.float16
    if config.compute_dtype == "bf16" and not has_bf16:
        raise UserError("no-bf16", device=torch.cuda.get_device_name(device))
    return DTYPES[config.compute_dtype]


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer in `folder`, with a pad token that was in its vocabulary before.

    The pad token is the tokenizer's own, else the unknown token (training text never predicts it), else the
    end-of-sequence token (the loss mask, not the token id, says what is padding). The vocabulary never grows, so the
    embeddings fit.

    Raises:
        UserError: there is no tokenizer, or none of the three tokens.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise UserError("tokenizer-needs-package", folder=folder, reason=error) from error
    except (OSError, ValueError) as error:
        if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
            raise UserError("tokenizer-missing", folder=folder) from error
        raise UserError("tokenizer-damaged", folder=folder, reason=error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError("tokenizer-without-pad", folder=folder)
    return tokenizer


def load_base(
    config: ModelConfig,
    folder: Path,
    device: torch.device,
    adapter: AdapterConfig | None = None,
    placement: Placement = ALONE,
) -> "PreTrainedModel":
    """The base model on `device`, frozen, without a key-value cache, in evaluation mode.

    With `quantization: nf4` or `fp4`, linear layers are bitsandbytes `Linear4bit`. Embedding and head keep the compute
    dtype, or are what `embedding` and `head` say. With `cache_quantized`, the quantised model is read from that folder,
    which the first process to need it writes (the others wait); embedding and head are in the compute dtype there.

    Tensors stream: on the host there is the one at hand beside what stays there.

    Args:
        adapter: for an `init_lora_weights` that changes the base (PiSSA, LoftQ); the model is then the one in
            `cache_quantized`, and `name_or_path` names that folder.
        placement: how several ranks load together; weights that it takes up are left empty, of their shape.

    Raises:
        UserError: the cache is damaged or another base's or setting's; the base comes quantised in another way; the
            attention implementation is missing; it does not fit into the GPU's memory.
    """
    _check_attention(config, device)
    dtype = compute_dtype(config, device)
    own_quantization = json.loads((folder / "config.json").read_text()).get("quantization_config")
    if own_quantization:
        _check_own_quantization(config, folder, own_quantization, adapter)
        model = _from_folder(config, folder, device, dtype, False, placement)
    elif config.quantization != "none" and config.cache_quantized is not None:
        model = _through_cache(config, folder, device, dtype, adapter, placement)
    else:
        model = _from_folder(config, folder, device, dtype, config.quantization != "none", placement)
    if device.type == "cpu":
        keep_exact_cpu_kernels(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    name = config.name if is_loaded_from_hub(config) else str(folder)
    if adapter is not None and adapter.changes_base:
        name = str(_cache_folder(config))
    model.name_or_path = model.config._name_or_path = name
    return model


def is_loaded_from_hub(config: ModelConfig) -> bool:
    """Whether `model.name` is a hub id and no local folder of that name hides it."""
    return is_hub_id(config.name) and not Path(config.name).is_dir()


def keep_exact_cpu_kernels(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in evaluation on CPUs with AVX512-BF16.

    Its repacked layers compute in bf16 whatever the compute dtype and, from the first evaluation on, pass no gradient
    to their input (`gemv_4bit` has no backward), so that training after an evaluation would go wrong silently.
    """
    for module in linear4bit_layers(model):
        module.support_avx512bf16_for_cpu = False


def linear4bit_layers(model: torch.nn.Module) -> list[Any]:
    """The bitsandbytes `Linear4bit` layers of `model`, in its order."""
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def _from_folder(
    config: ModelConfig, folder: Path, device: torch.device, dtype: torch.dtype, quantize: bool, placement: Placement
) -> "PreTrainedModel":
    # Made weights are the same on every rank.
    tensors = (
        synthetic_tensors(config, folder, device)
        if is_synthetic(folder)
        else placement.share(lambda: folder_tensors(folder), device)
    )
    return _filled(config, folder, tensors, device, dtype, quantize, placement)


def _filled(
    config: ModelConfig,
    folder: Path,
    tensors: dict[str, LazyTensor],
    device: torch.device,
    dtype: torch.dtype,
    quantize: bool,
    placement: Placement,
) -> "PreTrainedModel":
    model = stream_model(config, folder, tensors, device, dtype, quantize, placement)
    # A folder that was quantised elsewhere brings the compute dtype of its writer.
    for module in linear4bit_layers(model):
        module.compute_dtype, module.compute_type_is_set = dtype, True
    return model


def _through_cache(
    config: ModelConfig,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    adapter: AdapterConfig | None,
    placement: Placement,
) -> "PreTrainedModel":
    cache = _cache_folder(config)
    written: list[PreTrainedModel] = []

    def prepare() -> None:
        settings = {
            "base": base_fingerprint(folder),
            "quantization": config.quantization,
            "double_quant": config.double_quant,
            "dtype": str(dtype).removeprefix("torch."),
            "adapter_init": init_settings(adapter),
        }
        if not holds_anything(cache):
            with folder_lock(cache, "model.cache_quantized"):
                if not holds_anything(cache):
                    model = _write_cache(config, folder, device, dtype, adapter, settings)
                    if not placement.splits_work:
                        written.append(model)
        check_cache(cache, settings)

    placement.once(prepare)
    if written:
        plan_storage(written[0], config, cache)
        store_filled(written[0], last=True)
        return written[0]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _from_folder(config, cache, device, dtype, False, placement)


def _write_cache(
    config: ModelConfig,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    adapter: AdapterConfig | None,
    settings: dict[str, Any],
) -> "PreTrainedModel":
    tensors = synthetic_tensors(config, folder, device) if is_synthetic(folder) else folder_tensors(folder)
    start: dict[str, torch.Tensor] = {}
    if adapter is not None and adapter.changes_base:
        tensors, start = split_tensors(tensors, config, adapter, folder, device, dtype)
    # What cannot be stored as asked for is refused before the work.
    plan_storage(empty_model(config, folder, dtype), config, folder)
    plain = config.model_copy(update={"embedding": "bf16", "head": "bf16"})
    model = _filled(plain, folder, tensors, device, dtype, True, ALONE)
    tokenizer = load_tokenizer(folder, config.trust_remote_code)
    publish_folder(
        _cache_folder(config), lambda partial: write_cache(model, tokenizer, folder, partial, settings, start)
    )
    return model


def _cache_folder(config: ModelConfig) -> Path:
    assert config.cache_quantized is not None
    return config.cache_quantized.expanduser().absolute()


def _check_own_quantization(
    config: ModelConfig, folder: Path, own: dict[str, Any], adapter: AdapterConfig | None
) -> None:
    if adapter is not None and adapter.changes_base:
        raise UserError("init-of-quantised-base", init=adapter.init_lora_weights, folder=folder)
    kind = own.get("bnb_4bit_quant_type") if own.get("load_in_4bit") else own.get("quant_method")
    if kind != config.quantization:
        if kind in ("nf4", "fp4"):
            raise UserError("base-quantised-4bit", folder=folder, kind=kind, quantization=config.quantization)
        raise UserError("base-quantised-otherwise", folder=folder, kind=kind, quantization=config.quantization)
    if own.get("bnb_4bit_use_double_quant", False) != config.double_quant:
        raise UserError("base-double-quant", folder=folder, double_quant=not config.double_quant)
    if config.cache_quantized is not None:
        raise UserError("base-needs-no-cache", folder=folder)


def _check_attention(config: ModelConfig, device: torch.device) -> None:
    from transformers.utils import is_flash_attn_2_available

    if config.attn_implementation == "flash_attention_2" and not (
        device.type == "cuda" and is_flash_attn_2_available()
    ):
        raise UserError("no-flash-attention")
