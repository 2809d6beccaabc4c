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
    """Whether `folder` is there and not empty; a file in its place holds something."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def check_cache(cache: Path, settings: dict[str, Any]) -> None:
    """Refuse a cache that is damaged or was made with other `settings`.

    Raises:
        UserError: naming what differs.
    """
    if cache.exists() and not cache.is_dir():
        raise UserError("cache-is-a-file", cache=cache)
    if not (cache / STAMP_FILE).is_file():
        raise UserError("cache-not-ours", cache=cache)
    try:
        stamp = json.loads((cache / STAMP_FILE).read_text())
        files, found_settings = dict(stamp["files"]), dict(stamp["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("cache-stamp-damaged", file=cache / STAMP_FILE) from error
    for name, size in files.items():
        if not (cache / name).is_file() or (cache / name).stat().st_size != size:
            raise UserError("cache-damaged", file=cache / name)
    for key, wanted in settings.items():
        found = found_settings.get(key)
        if found == wanted:
            continue
        if key == "base":
            raise UserError("cache-of-another-base", cache=cache)
        if key == "adapter_init" and wanted:
            raise UserError("cache-of-another-adapter", cache=cache)
        if key == "adapter_init":
            raise UserError("cache-of-a-changed-base", cache=cache)
        raise UserError("cache-of-other-settings", cache=cache, setting=key, found=found, wanted=wanted)
