"""PiSSA and LoftQ: adapters that start with a part of the base, which is quantised without it.

The quantised base is then another one than plain NF4, so it is kept (model.cache_quantized) together with the
adapter's first weights. Shapes: W_OI (O outputs, I inputs), A_RI, B_OR (R the rank).
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.model.adapter import new_lora_config
from qlora_dist.model.quiet import quiet_libraries
from qlora_dist.model.stream import empty_model
from qlora_dist.model.tensors import LazyTensor


@dataclass(frozen=True)
class AdaptedLayer:
    """The LoRA shape of one linear layer; its update is `scaling` B A."""

    rank: int
    scaling: float


def init_settings(adapter: AdapterConfig | None) -> dict[str, Any] | None:
    """What the changed base depends on; None where the initialisation leaves the base alone."""
    if adapter is None or not adapter.changes_base:
        return None
    return adapter.model_dump(mode="json", exclude={"path", "lora_dropout", "modules_to_save"})


def split_tensors(
    tensors: Mapping[str, LazyTensor],
    config: ModelConfig,
    adapter: AdapterConfig,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[dict[str, LazyTensor], dict[str, Tensor]]:
    """`tensors` with the adapter's part taken out of the weights it adapts.

    Returns:
        The tensors to quantise, and a dictionary that holds the adapter's weights by PEFT's names (fp32, on the CPU)
        once every tensor has been made.

    Raises:
        UserError: a targeted module is no linear layer whose weight the folder stores under its name.
    """
    taken: dict[str, Tensor] = {}
    split = dict(tensors)
    for module, layer in adapted_layers(config, adapter, folder, dtype).items():
        name = f"{module}.weight"
        if name not in tensors:
            raise UserError("init-without-weight", init=adapter.init_lora_weights, weight=name, folder=folder)
        split[name] = LazyTensor(
            tuple(tensors[name].get_shape()),
            "F32",
            _splitter(tensors[name], module, layer, config, adapter, device, dtype, taken),
        )
    return split, taken


def adapted_layers(
    config: ModelConfig, adapter: AdapterConfig, folder: Path, dtype: torch.dtype
) -> dict[str, AdaptedLayer]:
    """Module name -> LoRA shape, as PEFT itself resolves targets, layers and patterns on the empty model.

    Raises:
        UserError: PEFT refuses the settings, or a target is no linear layer.
    """
    from peft import get_peft_model
    from peft.tuners.lora import Linear, LoraLayer

    model = empty_model(config, folder, dtype)
    try:
        with quiet_libraries():
            adapted = get_peft_model(model, new_lora_config(adapter), low_cpu_mem_usage=True)
    except ValueError as error:
        raise UserError("adapter-refused", field="adapter", reason=error) from error
    layers: dict[str, AdaptedLayer] = {}
    for name, module in adapted.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = name.removeprefix("base_model.model.")
        if not isinstance(module, Linear):
            raise UserError("init-not-linear", init=adapter.init_lora_weights, module=name)
        layers[name] = AdaptedLayer(module.r["default"], module.scaling["default"])
    return layers


def pissa(weight_OI: Tensor, layer: AdaptedLayer, rounds: int | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The residual W - scaling B A, A and B, where scaling B A is the best approximation of W of that rank.

    Source: PiSSA (https://arxiv.org/abs/2404.02948), eq. 2 to 4.

    Args:
        weight_OI: fp32 or fp64.
        rounds: None for the exact decomposition, else that many subspace iterations of the randomised one.
        seed: of the randomised one.
    """
    a_RI, b_OR = _principal(weight_OI, layer, rounds, seed)
    return weight_OI - layer.scaling * (b_OR @ a_RI), a_RI, b_OR


def loftq(
    weight_OI: Tensor, layer: AdaptedLayer, rounds: int, round_trip: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What to quantise, A and B after `rounds` of quantising W - scaling B A and fitting A and B to what that loses.

    Source: LoftQ (https://arxiv.org/abs/2310.08659), algorithm 1. PEFT's own leaves out the scaling, and so starts
    elsewhere than intended where lora_alpha is not r; here the adapter's update counts with it.

    Args:
        round_trip: a weight, quantised and dequantised.
    """
    residual_OI = weight_OI
    a_RI, b_OR = _principal(weight_OI - round_trip(residual_OI), layer, None, 0)
    for _ in range(rounds - 1):
        residual_OI = weight_OI - layer.scaling * (b_OR @ a_RI)
        a_RI, b_OR = _principal(weight_OI - round_trip(residual_OI), layer, None, 0)
    return residual_OI, a_RI, b_OR


def _principal(matrix_OI: Tensor, layer: AdaptedLayer, rounds: int | None, seed: int) -> tuple[Tensor, Tensor]:
    rank = layer.rank
    if rounds is None:
        u_OR, s_R, vh_RI = torch.linalg.svd(matrix_OI, full_matrices=False)
        u_OR, s_R, vh_RI = u_OR[:, :rank], s_R[:rank], vh_RI[:rank]
    else:
        devices = [matrix_OI.device] if matrix_OI.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            u_OR, s_R, v_IR = torch.svd_lowrank(matrix_OI, rank, niter=rounds)
        vh_RI = v_IR.T
    root_R = (s_R / layer.scaling).sqrt()
    return (root_R[:, None] * vh_RI).contiguous(), (u_OR * root_R).contiguous()


def _splitter(
    source: LazyTensor, module: str, layer: AdaptedLayer, config: ModelConfig, adapter: AdapterConfig,
    device: torch.device, dtype: torch.dtype, taken: dict[str, Tensor],
) -> Callable[[], Tensor]:  # fmt: skip
    kind = str(adapter.init_lora_weights)

    def round_trip(weight_OI: Tensor) -> Tensor:
        from bitsandbytes import functional

        # As the base will be quantised: from the compute dtype, with its own constants quantised too where asked.
        packed, state = functional.quantize_4bit(
            weight_OI.to(dtype), compress_statistics=config.double_quant, quant_type=config.quantization
        )
        return functional.dequantize_4bit(packed, state).to(weight_OI.dtype)

    def make() -> Tensor:
        weight_OI = source[...].to(device=device, dtype=torch.float32)
        if kind == "loftq":
            rounds = adapter.loftq_config.loftq_iter if adapter.loftq_config else 1
            rest_OI, a_RI, b_OR = loftq(weight_OI, layer, rounds, round_trip)
        else:
            number = re.search(r"\d+$", kind)
            seed = int.from_bytes(hashlib.sha256(module.encode()).digest()[:7])
            rest_OI, a_RI, b_OR = pissa(weight_OI, layer, int(number[0]) if number else None, seed)
        taken[f"base_model.model.{module}.lora_A.weight"] = a_RI.cpu()
        taken[f"base_model.model.{module}.lora_B.weight"] = b_OR.cpu()
        return rest_OI

    return make
