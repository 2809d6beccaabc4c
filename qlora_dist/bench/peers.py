"""The peers: how each one loads the base and attaches its adapter, as its own documentation has people do it.

A peer's `build` runs in a process of its own and returns the model to train; `peer_process` takes the steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNSLOTH_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}


@dataclass(frozen=True)
class Job:
    """What every peer is given.

    Attributes:
        base: a folder that stock transformers loads as a 4-bit bitsandbytes model.
        batches: a safetensors file with input_ids [steps, B, T]; every token bears loss.
        device: "cuda:0", or "cpu" in tests.
    """

    base: Path
    batches: Path
    r: int
    lora_alpha: int
    max_length: int
    device: str


@dataclass(frozen=True)
class Peer:
    """One way of others to train the same.

    Attributes:
        title: what tables call it.
        packages: the modules without which it is not installed.
        build: makes the model and says whether its steps run under bf16 autocast.
        environment: what its process needs beside the person's own environment.
        trainer: whether TRL's trainer takes the steps.
        note: what is different in kind, such as a base in 16 bits; empty where it trains the same as ours.
    """

    title: str
    packages: tuple[str, ...]
    build: Callable[[Job], tuple[Any, bool]]
    environment: Mapping[str, str] = field(default_factory=dict)
    trainer: bool = False
    note: str = ""


def stock(
    job: Job, prepare: bool = False, checkpointing: bool = True, liger: bool = False, compiled: bool = False,
    in_16_bits: bool = False,
) -> tuple[Any, bool]:  # fmt: skip
    """transformers + PEFT + bitsandbytes under bf16 autocast.

    Args:
        prepare: PEFT's `prepare_model_for_kbit_training`, which the common recipe calls: it turns norms, embedding
            and head to fp32.
        checkpointing: recompute every decoder layer in the backward; else all activations are kept.
        liger: Liger's kernels for this family, its fused linear cross-entropy included.
        compiled: each decoder layer compiled.
        in_16_bits: the same weights dequantised once; this is LoRA and no QLoRA.
    """
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoConfig, AutoModelForCausalLM

    if liger:
        from liger_kernel.transformers import _apply_liger_kernel

        _apply_liger_kernel(AutoConfig.from_pretrained(job.base).model_type)
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.base, dtype=torch.bfloat16, device_map={"": job.device}, attn_implementation="sdpa"
    )
    if in_16_bits:
        model = model.dequantize()
    if prepare:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    elif checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    lora = LoraConfig(
        r=job.r, lora_alpha=job.lora_alpha, lora_dropout=0.0, target_modules="all-linear", bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(model, lora)
    if compiled:
        # What differs from layer to layer may ask for a compilation each.
        torch._dynamo.config.recompile_limit = 64
        for layer in model.base_model.model.model.layers:
            layer.compile()
    return model, True


def unsloth(job: Job, checkpointing: str | bool = "unsloth", **load: Any) -> tuple[Any, bool]:
    """Unsloth's FastLanguageModel, its own checkpointing where not told otherwise."""
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(job.base), max_seq_length=job.max_length, dtype=torch.bfloat16, load_in_4bit=True, **load
    )
    model = FastLanguageModel.get_peft_model(
        model, r=job.r, lora_alpha=job.lora_alpha, lora_dropout=0, target_modules=LLAMA_LINEAR, bias="none",
        use_gradient_checkpointing=checkpointing, max_seq_length=job.max_length,
    )  # fmt: skip
    return model, True


STOCK = ("transformers", "peft", "bitsandbytes")
LIGER = (*STOCK, "liger_kernel")
UNSLOTH = (*STOCK, "unsloth")
# In the order in which they are measured, where time is short.
PEERS: dict[str, Peer] = {
    "unsloth": Peer("Unsloth", UNSLOTH, unsloth, UNSLOTH_OFFLINE),
    "unsloth-kept": Peer("Unsloth, no checkpointing", UNSLOTH, partial(unsloth, checkpointing=False), UNSLOTH_OFFLINE),
    "liger": Peer("Liger + PEFT, checkpointing", LIGER, partial(stock, liger=True)),
    "liger-kept": Peer("Liger + PEFT", LIGER, partial(stock, liger=True, checkpointing=False)),
    "peft": Peer("transformers + PEFT, checkpointing", STOCK, partial(stock, prepare=True)),
    "unsloth-auto": Peer(
        "Unsloth, GC_KEEP_LAYERS=auto", UNSLOTH, unsloth, UNSLOTH_OFFLINE | {"UNSLOTH_GC_KEEP_LAYERS": "auto"}
    ),
    "unsloth-host": Peer(
        "Unsloth, embedding on the host", UNSLOTH, partial(unsloth, offload_embedding=True), UNSLOTH_OFFLINE
    ),
    "compiled-kept": Peer("compiled PEFT", STOCK, partial(stock, compiled=True, checkpointing=False)),
    "unsloth-graphs": Peer(
        "Unsloth, block CUDA graphs", UNSLOTH, unsloth, UNSLOTH_OFFLINE | {"UNSLOTH_BLOCK_CUDAGRAPHS": "1"}
    ),
    "trl": Peer("TRL SFTTrainer + PEFT, checkpointing", (*STOCK, "trl"), stock, trainer=True),
    "compiled": Peer("compiled PEFT, checkpointing", STOCK, partial(stock, compiled=True)),
    "peft-kept": Peer("transformers + PEFT", STOCK, partial(stock, prepare=True, checkpointing=False)),
    "lora-16bit": Peer(
        "16-bit LoRA: Liger + PEFT", LIGER, partial(stock, liger=True, checkpointing=False, in_16_bits=True),
        note="base in 16 bits",
    ),
}  # fmt: skip
