"""A model built empty and filled a tensor at a time: read or made, quantised on the device, freed."""

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_dist.config.catalogue.facts import and_more
from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.embedding import plan_storage, store_filled
from qlora_dist.model.placement import Alone, Placement
from qlora_dist.model.quiet import mute_known_chatter, quiet_libraries
from qlora_dist.model.tensors import LazyTensor

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

ALONE = Alone()
M_MMAP_THRESHOLD = -3
GLIBC_LARGEST_THRESHOLD = 2**25


def bnb_config(config: ModelConfig, dtype: torch.dtype) -> "BitsAndBytesConfig":
    """bitsandbytes' settings for `model.quantization` nf4 or fp4."""
    mute_known_chatter()
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def empty_model(config: ModelConfig, folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """The model that config.json in `folder` describes, on the meta device: shapes without memory, unquantised.

    Raises:
        UserError: the architecture lacks the attention implementation.
    """
    mute_known_chatter()
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_libraries(), torch.device("meta"):
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        if hasattr(hf_config, "quantization_config"):
            del hf_config.quantization_config
        try:
            return AutoModelForCausalLM.from_config(
                hf_config,
                dtype=dtype,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
            )
        except ValueError as error:
            if "attention implementation" not in str(error):
                raise
            raise UserError(
                "attention-not-for-model", model_type=hf_config.model_type, attention=config.attn_implementation
            ) from error


def stream_model(
    config: ModelConfig,
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    device: torch.device,
    dtype: torch.dtype,
    quantize: bool,
    placement: Placement = ALONE,
) -> "PreTrainedModel":
    """The model of `folder`'s config.json filled with `tensors`, in evaluation mode.

    transformers does the filling (its renamings, tied weights, buffers, dtypes, and bitsandbytes' quantisation), so
    that the result is what it makes of the folder itself. It is given tensors that exist one at a time: on the host
    there is never more than the one at hand beside what stays there. `placement` sees the model before each of them,
    and decides what stays. Embedding and head are stored as `model.embedding` and `model.head` say.

    Raises:
        UserError: it does not fit into the GPU's memory, a weight of the model is missing or of another shape, or
            embedding or head cannot be stored so.
    """
    from transformers import AutoConfig, GenerationConfig

    built: list[PreTrainedModel] = []
    empty = empty_model(config, folder, dtype)
    _check_shapes(empty, tensors, folder)
    model_class: Any = type(empty)
    with quiet_libraries():
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    try:
        with quiet_libraries(), _one_at_a_time():
            shown = _shown_to(built, model_class, partial(plan_storage, config=config, folder=folder))
            loaded: Any = shown.from_pretrained(
                None,
                config=hf_config,
                state_dict={name: _announced(tensor, placement, built) for name, tensor in tensors.items()},
                dtype=dtype,
                device_map={"": device},
                attn_implementation=config.attn_implementation,
                output_loading_info=True,
                **({"quantization_config": bnb_config(config, dtype)} if quantize else {}),
            )
            model, info = loaded
            model.__class__ = model_class
            missing = sorted(info["missing_keys"])
            if missing:
                raise UserError("weights-missing", folder=folder, weights=and_more(missing))
            store_filled(model, last=True)
            placement.filled(model)
            built.clear()
    except torch.OutOfMemoryError as error:
        raise UserError("model-too-large", name=config.name, device=device) from error
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model  # type: ignore[no-any-return]


def _shown_to(built: list["PreTrainedModel"], model_class: Any, prepare: Callable[["PreTrainedModel"], None]) -> Any:
    """`model_class`, whose instances are prepared and put into `built`: transformers fills a model it shows nobody."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        prepare(self)
        built.append(self)

    names = {"__init__": __init__, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), names)


def _announced(tensor: LazyTensor, placement: Placement, built: list["PreTrainedModel"]) -> LazyTensor:
    def make() -> torch.Tensor:
        store_filled(built[0], last=False)
        placement.filling(built[0])
        return tensor[...]

    return LazyTensor(tuple(tensor.get_shape()), tensor.get_dtype(), make)


def _check_shapes(empty: "PreTrainedModel", tensors: Mapping[str, LazyTensor], folder: Path) -> None:
    # transformers compares no shapes where it quantises: the layer would get the file's, and fail in the first step.
    for name, parameter in empty.state_dict().items():
        packed = name not in tensors or tensors[name].get_dtype() == "U8"
        if not packed and tensors[name].get_shape() != list(parameter.shape):
            found, wanted = tensors[name].get_shape(), list(parameter.shape)
            raise UserError("weight-shape", folder=folder, name=name, found=found, wanted=wanted)


def _give_freed_tensors_back_above(size: int) -> None:
    # glibc keeps freed blocks below its threshold, which it raises by itself; what stays of the model between them
    # keeps them from being used again or given back (some 20 MB a layer of a 1B model).
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, size)


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    from transformers import modeling_utils

    # transformers' loading threads run ahead of what they feed and hold several tensors at once.
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    _give_freed_tensors_back_above(2**20)
    # It takes the GPU memory for the whole model at once, of which a rank may keep a shard alone.
    reserve = modeling_utils.caching_allocator_warmup
    modeling_utils.caching_allocator_warmup = lambda *_: None
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = reserve
        _give_freed_tensors_back_above(GLIBC_LARGEST_THRESHOLD)
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
