"""Rows -> one flat table of tokens in memory, the same on every rank."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import DataConfig
from qlora_dist.data.chat_templates import load_chat_template
from qlora_dist.data.filters import Intake, check_leaks, load_rows
from qlora_dist.data.formats import detect_format, to_conversation
from qlora_dist.data.rows import Row, Split
from qlora_dist.data.template import encode_conversations

# Rows tokenised at once: enough for the tokenizer's threads, little enough that offsets (tuples) stay small.
CHUNK_ROWS = 1024
SHOWN_PROMPTS = 32


@dataclass(frozen=True, slots=True)
class TokenSummary:
    """What became of the rows.

    Attributes:
        rows: rows read.
        documents: rows kept.
        truncated: documents cut at `max_length`.
        dropped: rows left out, by reason: `too_long`, `no_loss` (no loss-bearing token within `max_length`),
            `too_short`, `refused` (by the chat template).
        tokens: tokens of all documents.
        loss_tokens: predictions that bear loss (a document's first token is never one).
        longest: tokens of the longest document.
        intake: what became of the rows before this; None where they came from no source.
    """

    rows: int
    documents: int
    truncated: int
    dropped: dict[str, int]
    tokens: int
    loss_tokens: int
    longest: int
    intake: Intake | None = None


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Documents one after the other. A pack is what takes one line of a micro-batch: one document, for now.

    Attributes:
        input_ids: int32 [tokens].
        loss_mask: bool [tokens]; whether predicting this token bears loss, False at a document's first token.
        offsets: int64 [documents + 1]; document d is `offsets[d]:offsets[d + 1]`.
        summary: what became of the rows.
        prompts: the last message before the answer, of the first documents, to show beside a model's answer.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    summary: TokenSummary
    prompts: tuple[str, ...] = ()

    @property
    def num_packs(self) -> int:
        return len(self.offsets) - 1

    def pack(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32 [T]) and loss mask (bool [T]) of a pack, as views."""
        if not 0 <= index < self.num_packs:
            raise IndexError(f"pack {index} of {self.num_packs}")
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.input_ids[start:end], self.loss_mask[start:end]

    @cached_property
    def pack_tokens(self) -> np.ndarray:
        """Tokens of each pack, int64 [packs]."""
        return np.diff(self.offsets)

    @cached_property
    def pack_loss_tokens(self) -> np.ndarray:
        """Loss-bearing predictions of each pack, int64 [packs]."""
        return np.diff(np.concatenate([[0], np.cumsum(self.loss_mask, dtype=np.int64)])[self.offsets])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokens, the mask and the documents' borders; a resumed run compares it."""
        digest = hashlib.sha256()
        for array, dtype in ((self.offsets, "<i8"), (self.input_ids, "<i4"), (self.loss_mask, "|b1")):
            digest.update(np.ascontiguousarray(array, dtype=dtype).data)
        return digest.hexdigest()


def build_table(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, split: Split = "train"
) -> TokenTable:
    """Tokenise `rows` in their order; `config.too_long` says what becomes of more than `config.max_length` tokens.

    Raises:
        UserError: a row is malformed, too long (`too_long: error`), or none is left.
    """
    format_ = detect_format(rows, config.format)
    documents: list[tuple[np.ndarray, np.ndarray]] = []
    prompts: list[str] = []
    dropped = {"too_long": 0, "no_loss": 0}
    truncated = 0
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        conversations = [to_conversation(row, format_) for row in chunk]
        encoded = encode_conversations(
            conversations, tokenizer, config.assistant_only_loss, config.on_bad_row == "skip"
        )
        for conversation, (ids, mask) in zip(conversations, encoded, strict=True):
            row = conversation.row
            too_long = len(ids) > config.max_length
            if too_long and config.too_long == "error":
                raise UserError(
                    f"{row.where} has {len(ids)} tokens, data.max_length is {config.max_length}; raise it, or set "
                    "data.too_long to truncate or drop."
                )
            reason = _left_out(len(ids), config)
            if reason is not None:
                dropped[reason] = dropped.get(reason, 0) + 1
            elif not mask[: config.max_length].any():
                dropped["no_loss"] += 1
            else:
                truncated += too_long
                documents.append((ids[: config.max_length], mask[: config.max_length]))
                if len(prompts) < SHOWN_PROMPTS:
                    prompts.append(conversation.last_prompt)
    if not documents:
        raise UserError(
            f"data.{split}: no row is left of {len(rows)}, none has a token to learn within "
            f"data.max_length={config.max_length} tokens; raise data.max_length."
        )
    return _table(documents, len(rows), truncated, dropped, prompts)


def prepare_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[TokenTable, TokenTable | None]:
    """The training table and, where the config asks for one, the held-out table.

    `max_rows` takes the first rows of the training source before anything is held out of them. `eval_split` holds
    out rows drawn by `seed`; `max_eval_rows` caps them, and what it leaves stays in training.

    Raises:
        UserError: as `read_rows` and `build_table`; `eval` and `eval_split` are both set, or `eval_split` is not a
            share or a whole number of rows, or leaves no row to train on.
    """
    if config.eval is not None and config.eval_split:
        raise UserError("data.eval and data.eval_split are both set; remove one of them.")
    if config.chat_template is not None:
        tokenizer.chat_template = load_chat_template(config.chat_template)
    rows, intake = load_rows(config)
    if config.eval is not None:
        eval_rows, eval_intake = load_rows(config, "eval")
    else:
        rows, eval_rows = split_rows(rows, config.eval_split, seed, config.max_eval_rows)
        eval_intake = Intake(len(eval_rows), intake.format)
    eval_rows, eval_intake = check_leaks(rows, eval_rows, eval_intake, intake.format, config)
    train = _with_intake(build_table(rows, tokenizer, config), intake)
    if not eval_rows:
        return train, None
    return train, _with_intake(build_table(eval_rows, tokenizer, config, split="eval"), eval_intake)


def split_rows(
    rows: Sequence[Row], eval_split: float, seed: int, max_eval_rows: int | None = None
) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows, both in the source's order: a pure function of its arguments.

    `eval_split` below 1 is a share (rounded down, one row at least), from 1 on a number of rows, 0 holds out none.
    """
    if eval_split >= 1 and eval_split != int(eval_split):
        raise UserError(f"data.eval_split={eval_split} is neither a share below 1 nor a whole number of rows; mend it.")
    count = int(eval_split) if eval_split >= 1 else max(int(len(rows) * eval_split), int(eval_split > 0))
    if max_eval_rows is not None:
        count = min(count, max_eval_rows)
    if count >= len(rows):
        raise UserError(
            f"data.eval_split={eval_split} holds out {count} of {len(rows)} rows and leaves none to train on; lower it."
        )
    # argsort of raw bits, since numpy keeps a bit generator's stream over versions but not `permutation`.
    held_out = set(np.argsort(np.random.Philox(seed).random_raw(len(rows)), kind="stable")[:count].tolist())
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [rows[index] for index in sorted(held_out)]


def _with_intake(table: TokenTable, intake: Intake) -> TokenTable:
    return replace(table, summary=replace(table.summary, intake=intake))


def _left_out(length: int, config: DataConfig) -> str | None:
    """Why a row of so many tokens is left out, if it is."""
    if length == 0:
        return "refused"
    if config.filter.min_tokens is not None and length < config.filter.min_tokens:
        return "too_short"
    dropped_above = [config.filter.max_tokens, config.max_length if config.too_long == "drop" else None]
    return "too_long" if any(limit is not None and length > limit for limit in dropped_above) else None


def _table(
    documents: list[tuple[np.ndarray, np.ndarray]],
    num_rows: int,
    truncated: int,
    dropped: dict[str, int],
    prompts: list[str],
) -> TokenTable:
    lengths = np.array([len(ids) for ids, _ in documents], dtype=np.int64)
    loss_mask = np.concatenate([mask for _, mask in documents])
    summary = TokenSummary(
        rows=num_rows,
        documents=len(documents),
        truncated=truncated,
        dropped=dropped,
        tokens=int(lengths.sum()),
        loss_tokens=int(loss_mask.sum()),
        longest=int(lengths.max()),
    )
    return TokenTable(
        input_ids=np.concatenate([ids for ids, _ in documents]),
        loss_mask=loss_mask,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        summary=summary,
        prompts=tuple(prompts),
    )
