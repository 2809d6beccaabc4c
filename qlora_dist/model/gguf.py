"""A GGUF file -> a folder that transformers loads (config, bf16 safetensors, tokenizer).

Weights, config and tokenizer of a plain Llama are read with gguf-py alone: what transformers makes of a GGUF differs
between its versions (5.17 gives this kind of tokenizer a wrong end-of-sequence token), and a converted folder must
not. Other architectures and tokenizers go through transformers' reader (gguf_other.py).
"""

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_dist.config.errors import UserError
from qlora_dist.config.folders import cache_root, folder_lock, publish_folder
from qlora_dist.model.gguf_other import convert_by_transformers

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from transformers import LlamaConfig, PreTrainedTokenizerFast

SOURCE_FILE = "SOURCE.json"
# A change of what the conversion writes must not meet folders that an older one left in the cache.
CONVERSION_VERSION = 1
BLOCK_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OTHER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# llama.cpp's names for vocabularies whose merges were learned with every digit on its own.
SINGLE_DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
# Those that transformers' reader knows; it takes any other too, and splits text in a way the model never saw.
TRANSFORMERS_SPLITS = {"default", "qwen2", "llama-bpe", "llama3", "llama-v3"}
CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4


def dequantized_folder(gguf_file: Path) -> Path:
    """The cached folder of `gguf_file`, converted on first use (about 5 s for 135M parameters).

    The cache (see `folders.cache_root`) is keyed by file name, size and SHA-256 of the content. Safe when several
    processes ask at once: one converts, the others wait and use its folder.

    Raises:
        UserError: as for `convert_gguf`, or the cache cannot be written.
    """
    checksum = _sha256(gguf_file)
    key = f"{gguf_file.stem}-{gguf_file.stat().st_size}-{checksum[:16]}-v{CONVERSION_VERSION}"
    folder = cache_root() / "gguf" / key
    if not folder.is_dir():
        with folder_lock(folder):
            if not folder.is_dir():
                publish_folder(folder, lambda partial: convert_gguf(gguf_file, partial, checksum))
    return folder


def convert_gguf(gguf_file: Path, folder: Path, checksum: str | None = None) -> None:
    """Write config.json, generation_config.json, model.safetensors (bf16), tokenizer and SOURCE.json to `folder`.

    Raises:
        UserError: the file is damaged, or its architecture, tokenizer or tensor type is not supported.
    """
    import gguf
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    try:
        reader = gguf.GGUFReader(gguf_file)
    except (ValueError, IndexError) as error:
        raise UserError("gguf-damaged", file=gguf_file) from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if "general.architecture" not in fields or "tokenizer.ggml.tokens" not in fields:
        raise UserError("gguf-without-model", file=gguf_file)
    beyond = _beyond_plain_llama(gguf_file, fields, {tensor.name for tensor in reader.tensors})
    if beyond is not None:
        convert_by_transformers(gguf_file, folder, fields, beyond)
    else:
        config = _llama_config(fields, {tensor.name for tensor in reader.tensors})
        tokenizer = _byte_level_tokenizer(fields)
        num_heads = config.num_attention_heads
        weights = dequantize(reader, num_heads, config.num_key_value_heads or num_heads)
        weights = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    source = {
        "file": gguf_file.name,
        "sha256": checksum or _sha256(gguf_file),
        "quantization": _main_type(reader),
        "license": fields.get("general.license"),
    }
    (folder / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n")


def rounding_note(folder: Path) -> str | None:
    """A sentence to print beside "16-bit" figures of a base that came from a quantised GGUF; None for any other."""
    path = folder / SOURCE_FILE
    if not path.is_file():
        return None
    source = json.loads(path.read_text())
    if source["quantization"] in ("F32", "F16", "BF16"):
        return None
    return (
        f"The base comes from {source['file']}, whose weights are rounded to {source['quantization']}: "
        "its 16-bit figures are of the rounded model."
    )


def dequantize(reader: "GGUFReader", num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """All weights of a Llama GGUF by transformers' names, fp32, in transformers' row order.

    Raises:
        UserError: a tensor has no place in a Llama, or a type that gguf-py cannot dequantise.
    """
    weights = {}
    for tensor in reader.tensors:
        weight = _dequantized(tensor)
        if tensor.name.endswith("attn_q.weight"):
            weight = _split_halves(weight, num_heads)
        elif tensor.name.endswith("attn_k.weight"):
            weight = _split_halves(weight, num_kv_heads)
        weights[transformers_name(tensor.name)] = weight
    return weights


def transformers_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`.

    Raises:
        UserError: a Llama has no such tensor.
    """
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if block and block[2] in BLOCK_TENSORS:
        return f"model.layers.{block[1]}.{BLOCK_TENSORS[block[2]]}.weight"
    stem = gguf_name.removesuffix(".weight")
    if stem not in OTHER_TENSORS:
        raise UserError("gguf-tensor-unknown", tensor=gguf_name)
    return f"{OTHER_TENSORS[stem]}.weight"


def _split_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    # llama.cpp rotates neighbouring pairs, transformers the two halves of a head; undo its interleaving of the rows.
    rows, columns = weight.shape
    head_dim = rows // num_heads
    return weight.reshape(num_heads, head_dim // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def _dequantized(tensor: "ReaderTensor") -> torch.Tensor:
    import gguf

    try:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError("gguf-tensor-type", tensor=tensor.name, type=tensor.tensor_type.name) from error
    return torch.from_numpy(values.copy())


def _beyond_plain_llama(gguf_file: Path, fields: dict[str, Any], tensor_names: set[str]) -> str | None:
    """What the file has that only transformers' reader takes; None for a plain Llama."""
    # transformers would lose scaled rotary positions (a GGUF keeps their factors as a tensor), so nobody reads those.
    architecture = fields["general.architecture"]
    if fields.get(f"{architecture}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensor_names:
        raise UserError("gguf-scaled-rope", file=gguf_file)
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2" and split not in {*SINGLE_DIGIT_SPLITS, "gpt-2", *TRANSFORMERS_SPLITS}:
        raise UserError("gguf-split-unknown", file=gguf_file, split=split)
    if architecture != "llama":
        return f"architecture {architecture}"
    if kind != "gpt2" or split not in {*SINGLE_DIGIT_SPLITS, "gpt-2"}:
        return f"a {kind} tokenizer with the {split} split"
    return None


def _llama_config(fields: dict[str, Any], tensor_names: set[str]) -> "LlamaConfig":
    from transformers import LlamaConfig

    num_heads, hidden_size = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    config = LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden_size,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=num_heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", num_heads),
        head_dim=fields.get("llama.attention.key_length", hidden_size // num_heads),
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields.get("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in tensor_names,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    return config


def _byte_level_tokenizer(fields: dict[str, Any]) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = fields.get("tokenizer.ggml.pre", "default")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if split in SINGLE_DIGIT_SPLITS
        else byte_level
    )
    backend.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type") or []
    control = [token for token, t in zip(tokens, types, strict=False) if t == CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    backend.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, t in zip(tokens, types, strict=False)
            if t == USER_DEFINED_TOKEN
        ]
    )
    special = {
        role: tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    if fields.get("tokenizer.ggml.add_bos_token"):
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokens.index(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _main_type(reader: "GGUFReader") -> str:
    elements: dict[str, int] = {}
    for tensor in reader.tensors:
        elements[tensor.tensor_type.name] = elements.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return max(elements, key=lambda name: elements[name])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
