"""Token tables kept in folders of .npy files, made once and then memory-mapped by every rank and every later run.

A folder's name is a digest of all that decides its tokens: the sources' bytes, the tokenizer with its chat template,
the settings, and the code of this room. What is found in it is checked against the table's fingerprint, so a damaged
folder is made anew.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from qlora_dist.config.folders import folder_lock, publish_folder
from qlora_dist.data.filters import Intake
from qlora_dist.data.packing import Packs
from qlora_dist.data.rows import Row
from qlora_dist.data.table import TokenSummary, TokenTable

# What opening a damaged folder raises: files that are missing, cut off, empty, or hold something else.
DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError)


def cached_table(folder: Path, build: Callable[[], TokenTable]) -> TokenTable:
    """The table in `folder`, memory-mapped; where there is no whole one, one process builds it and the others wait.

    Raises:
        UserError: the folder's parent cannot be written, or what `build` raises.
    """
    table = _open(folder)
    if table is not None:
        return table
    with folder_lock(folder, "data.cache_dir"):
        table = _open(folder)
        if table is None:
            built = build()
            publish_folder(folder, lambda partial: _write(partial, built), replace=True)
            table = _open(folder)
    if table is None:
        raise OSError(f"{folder} does not hold what was just written to it")
    return table


def table_key(parts: Iterable[Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the folder for what `parts` (JSON values), the tokenizer and this room's code make."""
    whole = [*parts, tokenizer_digest(tokenizer), _code_digest()]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]


def source_digest(source: str) -> str | None:
    """SHA-256 (hex) of a local file's or folder's names and bytes; None for what is not on this disk."""
    path = Path(source).expanduser()
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        # The name, for its ending says how a file is read.
        _add_file(digest, str(file.relative_to(path)) if path.is_dir() else file.name, file)
    return digest.hexdigest()


def rows_digest(rows: Sequence[Row]) -> str:
    """SHA-256 (hex) of the rows' content, for sources whose bytes are elsewhere."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.data, default=str).encode() + b"\n")
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of everything that decides which tokens a text becomes, the chat template included."""
    digest = hashlib.sha256()
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        # Calls set these two as they go.
        backend |= {"padding": None, "truncation": None}
        digest.update(json.dumps(backend, sort_keys=True).encode())
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
                _add_file(digest, file.name, file)
    described = [type(tokenizer).__qualname__, tokenizer.special_tokens_map, tokenizer.chat_template]
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@cache
def _code_digest() -> str:
    digest = hashlib.sha256(f"{transformers.__version__} {tokenizers.__version__}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        _add_file(digest, file.name, file)
    return digest.hexdigest()


def _add_file(digest: Any, name: str, path: Path) -> None:
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    digest.update(f"{name}\0{content}\n".encode())


def _write(folder: Path, table: TokenTable) -> None:
    for name, array in _arrays(table).items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    about = {
        "summary": asdict(table.summary),
        "prompts": table.prompts,
        "packed": table.packs is not None,
        "fingerprint": table.fingerprint,
    }
    (folder / "table.json").write_text(json.dumps({"about": about, "sha256": _digest_of(about)}))


def _open(folder: Path) -> TokenTable | None:
    if not folder.is_dir():
        return None
    try:
        described = json.loads((folder / "table.json").read_text())
        about = described["about"]
        if described["sha256"] != _digest_of(about):
            return None
        table = TokenTable(
            _map(folder, "input_ids"),
            _map(folder, "loss_mask"),
            _map(folder, "offsets"),
            _summary(about["summary"]),
            tuple(about["prompts"]),
            Packs(_map(folder, "pack_documents"), _map(folder, "pack_offsets")) if about["packed"] else None,
        )
        return table if table.fingerprint == about["fingerprint"] else None
    except DAMAGE:
        return None


def _summary(saved: dict[str, Any]) -> TokenSummary:
    intake = saved["intake"]
    return TokenSummary(**(saved | {"intake": None if intake is None else Intake(**intake)}))


def _arrays(table: TokenTable) -> dict[str, np.ndarray]:
    arrays = {"input_ids": table.input_ids, "loss_mask": table.loss_mask, "offsets": table.offsets}
    if table.packs is not None:
        arrays |= {"pack_documents": table.packs.documents, "pack_offsets": table.packs.offsets}
    return arrays


def _map(folder: Path, name: str) -> np.ndarray:
    # As a plain array: slices of numpy's memmap class are slow to make.
    return np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))


def _digest_of(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
