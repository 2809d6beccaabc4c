"""The quantised base in a folder of its own, which stock transformers loads and a later run reads instead."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dist.config.errors import UserError
from qlora_dist.model.gguf import SOURCE_FILE
from qlora_dist.model.quiet import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAMP_FILE = "quantized_cache.json"
# A shard passes through host memory while it is written.
SHARD_SIZE = "1GB"
MEND = "delete that folder or name another one"


def write_cache(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    base: Path,
    partial: Path,
    settings: dict[str, Any],
    adapter_start: dict[str, "Tensor"],
) -> None:
    """Fill `partial` with the quantised model, its tokenizer, the adapter's start (if any) and a stamp of it all.

    Args:
        base: the folder that the model was quantised from.
        settings: what the cache depends on.
    """
    from safetensors.torch import save_file

    from qlora_dist.model.adapter import START_FILE

    with quiet_libraries():
        model.save_pretrained(partial, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(partial)
    if (base / SOURCE_FILE).is_file():
        (partial / SOURCE_FILE).write_bytes((base / SOURCE_FILE).read_bytes())
    if adapter_start:
        save_file(adapter_start, partial / START_FILE, {"format": "pt"})
    files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    (partial / STAMP_FILE).write_text(json.dumps({"settings": settings, "files": files}, indent=2) + "\n")


def holds_anything(folder: Path) -> bool:
    """Whether `folder` is there and not empty."""
    return folder.is_dir() and any(folder.iterdir())


def check_cache(cache: Path, settings: dict[str, Any]) -> None:
    """Refuse a cache that is damaged or was made with other `settings`.

    Raises:
        UserError: naming what differs.
    """
    if not (cache / STAMP_FILE).is_file():
        raise UserError(f"model.cache_quantized: {cache} holds something else than a quantised base; {MEND}.")
    stamp = json.loads((cache / STAMP_FILE).read_text())
    for name, size in stamp["files"].items():
        if not (cache / name).is_file() or (cache / name).stat().st_size != size:
            raise UserError(f"model.cache_quantized: {cache}/{name} is missing or damaged; {MEND}.")
    for key, wanted in settings.items():
        found = stamp["settings"].get(key)
        if found != wanted:
            detail = {
                "base": "it was made from another base model",
                "adapter_init": "it was made with other adapter settings, on which this init_lora_weights depends"
                if wanted
                else "an adapter initialisation has changed its weights",
            }.get(key, f"its {key} is {found}, not {wanted}")
            raise UserError(f"model.cache_quantized: {cache} does not belong to this run, {detail}; {MEND}.")
