"""Rows of data, and how they are read from the bytes of a JSONL, JSON, CSV or Parquet file."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal

from qlora_dist.config.errors import UserError

Split = Literal["train", "eval"]
# Rows of a Parquet file that are turned into Python objects at once.
BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a source, and where it stands there.

    Attributes:
        data: column -> value.
        file: the file, as errors name it.
        line: counts from 1; in a file without lines of its own (JSON array, Parquet) the number of the row.
        unit: which of the two it is.
    """

    data: dict[str, Any]
    file: str
    line: int
    unit: Literal["line", "row"] = "line"

    @property
    def where(self) -> str:
        """`file:line` or `file, row N`, as errors name the row."""
        return f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file}, row {self.line}"


class BadRow(UserError):
    """A row that cannot be learned from.

    Args:
        code: the error's code in the catalogue.
        reason: what kind of bad row it is: `data.on_bad_row: skip` leaves it out and counts it by that.
        facts: what the catalogue's texts leave open.
    """

    def __init__(self, code: str, reason: str, /, **facts: object):
        super().__init__(code, **facts)
        self.reason = reason

    def __reduce__(self) -> tuple[Callable[[], "BadRow"], tuple[Any, ...]]:
        return partial(type(self), self.code, self.reason, **self.facts), ()


@dataclass
class BadRows:
    """What becomes of bad rows, and those left out so far: by reason their count and the first one's sentence."""

    on_bad_row: Literal["error", "skip"] = "error"
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, bad: BadRow) -> None:
        """Count it, or raise it."""
        if self.on_bad_row == "error":
            raise bad
        self.counts[bad.reason] = self.counts.get(bad.reason, 0) + 1
        self.first.setdefault(bad.reason, bad.message)


def parse_rows(file: BinaryIO, name: str, bad_rows: BadRows) -> Iterator[Row]:
    """The rows of one open file, whose format its name's ending tells (one of `SUFFIXES`).

    Raises:
        UserError: the file as a whole cannot be read as its format.
        BadRow: a row is malformed and `bad_rows` does not leave it out.
    """
    return PARSERS[PurePosixPath(name).suffix.lower()](file, name, bad_rows)


def parse_jsonl(file: Iterable[bytes], name: str, bad_rows: BadRows) -> Iterator[Row]:
    """One JSON object a line, in UTF-8; blank lines are skipped."""
    for number, raw in enumerate(file, start=1):
        # Editors on Windows put a byte-order mark in front of the first line.
        line = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
        if not line:
            continue
        try:
            data = _parse_object(line, f"{name}:{number}")
        except BadRow as bad:
            bad_rows.add(bad)
            continue
        yield Row(data, name, number)


def parse_json(file: BinaryIO, name: str, bad_rows: BadRows) -> Iterator[Row]:
    """An array of objects, or an object that holds one under `data`; JSON lines are taken too."""
    content = file.read()
    text = _decode(content, name)
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from parse_jsonl(content.split(b"\n"), name, bad_rows)
            return
        raise UserError(
            "json-malformed", place=f"{name}:{error.lineno}", reason=_reason(error), column=error.colno
        ) from error
    except RecursionError as error:
        raise UserError("json-too-deep", place=name) from error
    except ValueError as error:
        raise UserError("json-number-too-long", place=name) from error
    if isinstance(value, dict):
        value = value.get("data")
    if not isinstance(value, list):
        raise UserError("json-not-a-list", file=name)
    for number, data in enumerate(value, start=1):
        row = Row(data, name, number, "row")
        if isinstance(data, dict):
            yield row
        else:
            bad_rows.add(BadRow("row-not-an-object", "not an object", place=row.where, kind=_kind(data)))


def parse_csv(file: BinaryIO, name: str, bad_rows: BadRows) -> Iterator[Row]:
    """Columns named by the first line; commas, or tabs in a .tsv; quoted cells may hold line breaks."""
    text = _decode(file.read(), name)
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if name.lower().endswith(".tsv") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError("csv-malformed", place=f"{name}:{number}", reason=error) from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _header(cells, f"{name}:{number}")
        elif len(cells) != len(header):
            where = f"{name}:{number}"
            bad_rows.add(
                BadRow("csv-cells", "wrong number of cells", place=where, cells=len(cells), columns=len(header))
            )
        else:
            yield Row(dict(zip(header, cells, strict=True)), name, number)


def parse_parquet(file: BinaryIO, name: str, bad_rows: BadRows) -> Iterator[Row]:
    """Rows of a Parquet file; a null column counts as absent."""
    # Half a second that runs on JSONL need not spend.
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(BATCH_ROWS):
            for data in batch.to_pylist():
                number += 1
                yield Row(without_nulls(data), name, number, "row")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError("parquet-unreadable", file=name, reason=error) from error


PARSERS: dict[str, Callable[[Any, str, BadRows], Iterator[Row]]] = {
    ".jsonl": parse_jsonl,
    ".ndjson": parse_jsonl,
    ".json": parse_json,
    ".csv": parse_csv,
    ".tsv": parse_csv,
    ".parquet": parse_parquet,
}
SUFFIXES = tuple(PARSERS)


def without_nulls(data: dict[str, Any]) -> dict[str, Any]:
    """The columns of a typed table that hold something: such a table has every column in every row."""
    return {key: value for key, value in data.items() if value is not None}


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not all(names):
        raise UserError("csv-column-unnamed", place=where, column=names.index("") + 1)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError("csv-column-twice", place=where, column=twice)
    return names


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError("not-utf8", place=f"{name}:{line}", byte=error.start, whole="file") from error


def _parse_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("not-utf8", "not UTF-8", place=where, byte=error.start, whole="line") from error
    except json.JSONDecodeError as error:
        raise BadRow(
            "json-line-malformed", "not JSON", place=where, reason=_reason(error), column=error.colno
        ) from error
    except RecursionError as error:
        raise BadRow("json-too-deep", "not JSON", place=where) from error
    except ValueError as error:
        raise BadRow("json-number-too-long", "not JSON", place=where) from error
    if not isinstance(value, dict):
        raise BadRow("row-not-an-object", "not an object", place=where, kind=_kind(value))
    return value


def _kind(value: Any) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), "a bare value")


def _reason(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at")
