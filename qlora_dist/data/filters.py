"""Which rows are learned from: bad rows, the field mapping, and the filters of `data.filter`."""

import hashlib
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import DataConfig
from qlora_dist.data.formats import EMPTY_ANSWER, Conversation, FormatName, detect_format, to_conversation
from qlora_dist.data.rows import BadRow, BadRows, Row, Split
from qlora_dist.data.sources import read_rows

WHITE_SPACE = re.compile(r"\s+")
# A file may begin with bad rows; past so many the format is not worth guessing.
DETECTION_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Intake:
    """What became of the rows before they were tokenised.

    Attributes:
        rows: rows read, bad ones included.
        format: what the rows are.
        dropped: rows left out, by reason.
        first_bad: for each reason of a bad row, the sentence of the first.
        duplicates: rows that repeat an earlier one but for white space; dropped with `drop_duplicates`.
        leaked: held-out rows that are training rows too, but for white space; dropped with `drop_leaked`.
    """

    rows: int
    format: FormatName
    dropped: dict[str, int] = field(default_factory=dict)
    first_bad: dict[str, str] = field(default_factory=dict)
    duplicates: int = 0
    leaked: int = 0


def load_rows(config: DataConfig, split: Split = "train") -> tuple[list[Row], Intake]:
    """The rows of a split that are learned from, each of which `to_conversation` takes.

    Raises:
        UserError: as `read_rows` and `to_conversation`; no row is left.
    """
    source = config.train if split == "train" else str(config.eval)
    bad_rows = BadRows(config.on_bad_row)
    rows = read_rows(source, config.max_rows if split == "train" else config.max_eval_rows, split, bad_rows)
    count = len(rows) + sum(bad_rows.counts.values())
    if config.fields:
        rows = map_fields(rows, config.fields, bad_rows)
    format_ = _format(rows, config)
    dropped: dict[str, int] = {}
    kept, seen, duplicates = [], set(), 0
    for row in rows:
        try:
            conversation = to_conversation(row, format_)
        except BadRow as bad:
            if bad.reason == EMPTY_ANSWER and config.filter.drop_empty_answers:
                dropped[EMPTY_ANSWER] = dropped.get(EMPTY_ANSWER, 0) + 1
            else:
                bad_rows.add(bad)
            continue
        key = content_key(conversation)
        again = key in seen
        seen.add(key)
        duplicates += again
        reason = "duplicate" if again and config.filter.drop_duplicates else _wrong_length(conversation, config)
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            kept.append(row)
    dropped |= bad_rows.counts
    if not kept:
        why = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
        first = next(iter(bad_rows.first.values()), None)
        if first is None:
            raise UserError("no-row-left", split=split, source=source, rows=count, dropped=why)
        raise UserError("no-good-row-left", split=split, source=source, rows=count, dropped=why, first=first)
    return kept, Intake(count, format_, dropped, bad_rows.first, duplicates)


def check_leaks(
    train: Sequence[Row], held_out: Sequence[Row], intake: Intake, format_: FormatName, config: DataConfig
) -> tuple[list[Row], Intake]:
    """The held-out rows and their `Intake`, which counts those that are training rows too.

    Args:
        intake: that of the held-out rows.
        format_: the format of the training rows.

    Raises:
        UserError: every held-out row is dropped.
    """
    if not held_out:
        return [], intake
    known = {content_key(to_conversation(row, format_)) for row in train}
    leaks = [content_key(to_conversation(row, intake.format)) in known for row in held_out]
    intake = replace(intake, leaked=sum(leaks))
    if not (intake.leaked and config.filter.drop_leaked):
        return list(held_out), intake
    if all(leaks):
        raise UserError("all-leaked", rows=len(leaks))
    kept = [row for row, leaked in zip(held_out, leaks, strict=True) if not leaked]
    return kept, replace(intake, dropped=intake.dropped | {"leaked": intake.leaked})


def content_key(conversation: Conversation) -> bytes:
    """A digest of who says what, in which white space counts as one blank and none at the ends."""
    digest = hashlib.blake2b(digest_size=16)
    for message in conversation.messages:
        content = WHITE_SPACE.sub(" ", message["content"]).strip()
        digest.update(f"{message['role']}\0{content}\0".encode())
    return digest.digest()


def map_fields(rows: Iterable[Row], fields: Mapping[Any, str], bad_rows: BadRows) -> list[Row]:
    """The rows with the keys of `fields` alone, as `data.fields` says where each comes from.

    Raises:
        UserError: a text with `{column}` is malformed.
        BadRow: a row lacks a column.
    """
    mapped = []
    for row in rows:
        try:
            mapped.append(replace(row, data={name: _mapped(row, name, path) for name, path in fields.items()}))
        except BadRow as bad:
            bad_rows.add(bad)
    if not mapped:
        raise UserError("fields-fit-no-row", first=next(iter(bad_rows.first.values())))
    return mapped


def _mapped(row: Row, name: str, path: str) -> Any:
    if "{" not in path:
        return _column(row, name, path)
    try:
        pieces = list(string.Formatter().parse(path))
    except ValueError as error:
        raise UserError("fields-pattern", field=name, text=path, reason=error) from error
    text = ""
    for literal, column, _, _ in pieces:
        text += literal
        if column is not None:
            text += str(_column(row, name, column))
    return text


def _column(row: Row, name: str, path: str) -> Any:
    if path in row.data:
        return row.data[path]
    value: Any = row.data
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            seen = ", ".join(sorted(row.data)) or "none"
            raise BadRow("row-lacks-column", "missing column", place=row.where, column=path, field=name, columns=seen)
        value = value[part]
    return value


def _format(rows: Sequence[Row], config: DataConfig) -> FormatName:
    """What the rows are; where bad rows are skipped, as the first one that fits says."""
    if config.on_bad_row == "skip":
        for row in rows[:DETECTION_ROWS]:
            try:
                return detect_format([row], config.format)
            except BadRow:
                continue
    return detect_format(rows, config.format)


def _wrong_length(conversation: Conversation, config: DataConfig) -> str | None:
    low, high = config.filter.min_chars, config.filter.max_chars
    if low is None and high is None:
        return None
    chars = sum(len(message["content"]) for message in conversation.messages)
    if low is not None and chars < low:
        return "fewer than min_chars"
    return "more than max_chars" if high is not None and chars > high else None
