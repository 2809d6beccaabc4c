"""Bases of a real shape with random weights: a cluster is measured before anything is downloaded.

A synthetic base is a small folder (config, tokenizer, SYNTHETIC.json). Its weights are made a tensor at a time, where
they are used; their values follow from the tensor's name, so that all ranks on one kind of device have the same.
"""

import difflib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_dist.config.errors import UserError
from qlora_dist.config.folders import cache_root, folder_lock, publish_folder
from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.shapes import SHAPES
from qlora_dist.model.stream import empty_model
from qlora_dist.model.tensors import LazyTensor
from qlora_dist.model.weights import SYNTHETIC_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SYNTHETIC_PREFIX = "synthetic:"
# A change of what is made must not meet folders that an older version left in the cache.
SYNTHETIC_VERSION = 1
STD = 0.02
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def synthetic_folder(name: str) -> Path:
    """The cached folder of `synthetic:NAME`, made on first use (a second; a few MB at most).

    Raises:
        UserError: there is no such shape (the nearest are named), or the cache cannot be written.
    """
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, n=3, cutoff=0.3) or list(SHAPES)
        raise UserError("synthetic-model-unknown", name=SYNTHETIC_PREFIX + name, nearest=", ".join(near))
    folder = cache_root() / "synthetic" / f"{name}-v{SYNTHETIC_VERSION}"
    if not folder.is_dir():
        with folder_lock(folder):
            if not folder.is_dir():
                publish_folder(folder, lambda partial: write_synthetic(name, partial))
    return folder


def write_synthetic(name: str, folder: Path) -> None:
    """Write config.json, generation_config.json, SYNTHETIC.json and a byte-level tokenizer to `folder`."""
    tokenizer = byte_tokenizer(SHAPES[name]["vocab_size"])
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for file, content in (
        ("config.json", SHAPES[name] | ends | {"dtype": "bfloat16"}),
        ("generation_config.json", ends),
        (SYNTHETIC_FILE, {"name": name, "version": SYNTHETIC_VERSION, "std": STD}),
    ):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def byte_tokenizer(vocab_size: int) -> "PreTrainedTokenizerFast":
    """A tokenizer of bytes with a ChatML template; ids that no byte needs are reserved tokens, up to `vocab_size`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<|reserved_{i}|>" for i in range(vocab_size - len(tokens))]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def synthetic_tensors(config: ModelConfig, folder: Path, device: torch.device) -> dict[str, LazyTensor]:
    """The weights of the synthetic base in `folder`, unmade: bf16 on `device`, norms 1, all else normal with std 0.02.

    A tensor's values are the same whenever and in whatever order it is made. CPUs and GPUs draw different ones.
    """
    version = json.loads((folder / SYNTHETIC_FILE).read_text())["version"]
    return {
        name: LazyTensor(tuple(weight.shape), "BF16", _maker(f"{version}:{name}", weight.shape, device))
        for name, weight in empty_model(config, folder, torch.bfloat16).named_parameters()
    }


def _maker(key: str, shape: torch.Size, device: torch.device) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        if key.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.bfloat16, device=device)
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
        generator = torch.Generator(device).manual_seed(seed)
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, STD, generator=generator)

    return make
