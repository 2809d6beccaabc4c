"""JSONL sources: a file on disk, or a dataset that ships with the project."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from qlora_dist.config.errors import UserError

BUNDLED_PREFIX = "bundled:"
Split = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class Row:
    """One JSON object of a source, and where it stands there (`line` counts from 1)."""

    data: dict[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        """`file:line`, as errors name the row."""
        return f"{self.file}:{self.line}"


def read_rows(source: str, max_rows: int | None = None, split: Split = "train") -> list[Row]:
    """Read the first `max_rows` rows (all where None) of a UTF-8 JSONL file; blank lines are skipped.

    Args:
        source: a path, or `bundled:NAME`, which is NAME.train.jsonl or NAME.eval.jsonl by `split`.
        split: the part of a bundled dataset to read; also names the config field in errors.

    Raises:
        UserError: the source is missing, unreadable or empty, or a line is not a JSON object in UTF-8.
    """
    if source.startswith(BUNDLED_PREFIX):
        resource = _bundled_resource(source, split)
        with resource.open("rb") as lines:
            return _parse_lines(lines, resource.name, max_rows)
    path = Path(source).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"data.{split}: {source} {what}; give the path of a JSONL file or `bundled:NAME`.")
    try:
        with path.open("rb") as lines:
            return _parse_lines(lines, source, max_rows)
    except OSError as error:
        raise UserError(f"data.{split}: {source} cannot be read ({error.strerror}); check its permissions.") from error


def bundled_names(split: Split) -> list[str]:
    """The names that `bundled:NAME` accepts for `split`, sorted."""
    suffix = f".{split}.jsonl"
    folder = _bundled_folder()
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix))


def _bundled_folder() -> Traversable:
    return files("qlora_dist.data").joinpath("bundled")


def _bundled_resource(source: str, split: Split) -> Traversable:
    name = source.removeprefix(BUNDLED_PREFIX)
    names = bundled_names(split)
    if name not in names:
        have = ", ".join(names) or "none"
        raise UserError(f"data.{split}: there is no bundled dataset {name!r} with {split} rows; use one of: {have}.")
    return _bundled_folder().joinpath(f"{name}.{split}.jsonl")


def _parse_lines(lines: Iterable[bytes], file: str, max_rows: int | None) -> list[Row]:
    rows: list[Row] = []
    for number, raw in enumerate(lines, start=1):
        if max_rows is not None and len(rows) == max_rows:
            break
        # Editors on Windows put a byte-order mark in front of the first line.
        line = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
        if line:
            rows.append(Row(_parse_object(line, file, number), file, number))
    if not rows:
        raise UserError(f"{file} holds no rows; put one JSON object on each line.")
    return rows


def _parse_object(line: bytes, file: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}:{number} is not UTF-8 (byte {error.start}); save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}:{number} is not JSON ({error.msg} at column {error.colno}); put one whole JSON object "
            "on each line."
        ) from error
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(value), "a bare value")
        raise UserError(f"{file}:{number} is {kind}, not a JSON object; put one {{...}} on each line.")
    return value
