"""GGUF files of other architectures than a plain Llama, by transformers' own reader."""

from pathlib import Path
from typing import Any

import torch

from qlora_dist.config.catalogue.facts import and_more
from qlora_dist.config.errors import UserError
from qlora_dist.model.quiet import quiet_libraries

TOKEN_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def convert_by_transformers(gguf_file: Path, folder: Path, fields: dict[str, Any], what: str) -> None:
    """Write config.json, generation_config.json, safetensors (bf16) and tokenizer of `gguf_file` to `folder`.

    The special tokens and the chat template are those that the file names: transformers' versions differ there.

    Args:
        fields: the file's metadata.
        what: what it has that the project's own reader does not take, for the error.

    Raises:
        UserError: transformers does not read it either, or finds no weight for a part of the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    unpacked = GgufConfig(dequantize=True)
    try:
        with quiet_libraries():
            tokenizer = AutoTokenizer.from_pretrained(**where)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                **where, dtype=torch.bfloat16, quantization_config=unpacked, output_loading_info=True
            )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError, OSError, ImportError,
            RuntimeError) as error:  # fmt: skip
        raise UserError("gguf-unreadable", file=gguf_file, what=what, reason=error) from error
    model, info = loaded
    lacking = sorted({*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])})
    if lacking:
        raise UserError("gguf-weights-missing", file=gguf_file, what=what, weights=and_more(lacking))
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {role: fields.get(f"tokenizer.ggml.{key}_token_id") for key, role in TOKEN_ROLES.items()}
    for role, index in ids.items():
        if index is not None and index < len(tokens):
            setattr(tokenizer, role, tokens[index])
    if fields.get("tokenizer.chat_template"):
        tokenizer.chat_template = fields["tokenizer.chat_template"]
    named = {f"{role}_id": ids[role] for role in ("bos_token", "eos_token", "pad_token")}
    for key, index in named.items():
        setattr(model.config, key, index)
    model.config.dtype = torch.bfloat16
    for attribute in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    model.generation_config = GenerationConfig(**named)
    with quiet_libraries():
        model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
