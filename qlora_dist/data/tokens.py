"""Rows -> one flat table of tokens, made once and the same on every rank."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_dist.config.errors import UserError
from qlora_dist.config.folders import cache_root
from qlora_dist.config.schema import DataConfig
from qlora_dist.data.cache import cached_table, rows_digest, source_digest, table_key
from qlora_dist.data.chat_templates import load_chat_template
from qlora_dist.data.filters import Intake, check_leaks, load_rows
from qlora_dist.data.formats import FormatName, detect_format, to_conversation
from qlora_dist.data.packing import pack_documents
from qlora_dist.data.rows import Row, Split
from qlora_dist.data.table import TokenSummary, TokenTable
from qlora_dist.data.template import encode_conversations

# Rows tokenised at once: enough for the tokenizer's threads, little enough that offsets (tuples) stay small.
CHUNK_ROWS = 1024
SHOWN_PROMPTS = 32
# Fewer rows are tokenised sooner than another process has started.
ROWS_PER_PROCESS = 50_000
# Settings that change no token of a table, or that stand for a source whose content is looked at.
NOT_IN_KEY = {"train", "eval", "shuffle", "num_proc", "cache_dir"}
WHY_NONE_LEFT = {
    "too_long": "too long",
    "too_short": "too short",
    "no_loss": "whose answer lies beyond max_length",
    "refused": "refused by the chat template",
}


@dataclass(frozen=True, slots=True)
class Encoded:
    """Documents of a chunk of rows, one after the other, as in `TokenTable`, and what became of its rows."""

    lengths: np.ndarray
    input_ids: np.ndarray
    loss_mask: np.ndarray
    truncated: int
    dropped: dict[str, int]
    prompts: list[str]


def build_table(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, split: Split = "train"
) -> TokenTable:
    """Tokenise `rows` in their order; `config.too_long` says what becomes of more than `config.max_length` tokens.

    Training documents are packed where `config.packing` says so. Held-out ones never are, so that an evaluation's
    batch means the same with and without packing, and a pack of it is a prompt and its answer.

    Raises:
        UserError: a row is malformed, too long (`too_long: error`), or none is left.
    """
    chunks = list(_encode(rows, detect_format(rows, config.format), tokenizer, config))
    reasons = dict.fromkeys(reason for chunk in chunks for reason in chunk.dropped)
    dropped = {reason: sum(chunk.dropped.get(reason, 0) for chunk in chunks) for reason in reasons}
    lengths = np.concatenate([chunk.lengths for chunk in chunks])
    if not len(lengths):
        why = ", ".join(f"{count} {WHY_NONE_LEFT[reason]}" for reason, count in dropped.items() if count)
        raise UserError("no-document-left", split=split, rows=len(rows), max_length=config.max_length, dropped=why)
    loss_mask = np.concatenate([chunk.loss_mask for chunk in chunks])
    packs = pack_documents(lengths, config.max_length) if config.packing and split == "train" else None
    num_packs = len(lengths) if packs is None else len(packs.offsets) - 1
    summary = TokenSummary(
        rows=len(rows),
        documents=len(lengths),
        truncated=sum(chunk.truncated for chunk in chunks),
        dropped=dropped,
        tokens=int(lengths.sum()),
        loss_tokens=int(loss_mask.sum()),
        longest=int(lengths.max()),
        packs=num_packs,
        packing_efficiency=float(lengths.sum() / (num_packs * config.max_length)),
    )
    return TokenTable(
        input_ids=np.concatenate([chunk.input_ids for chunk in chunks]),
        loss_mask=loss_mask,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        summary=summary,
        prompts=tuple(prompt for chunk in chunks for prompt in chunk.prompts)[:SHOWN_PROMPTS],
        packs=packs,
    )


def prepare_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[TokenTable, TokenTable | None]:
    """The training table and, where the config asks for one, the held-out table: from the cache, or into it.

    `max_rows` takes the first rows of the training source before anything is held out of them. `eval_split` holds
    out rows drawn by `seed`; `max_eval_rows` caps them, and what it leaves stays in training. Rows of a local source
    are not even read where the cache has their tokens.

    Raises:
        UserError: as `load_rows` and `build_table`; `eval` and `eval_split` are both set, or `eval_split` is not a
            share or a whole number of rows, or leaves no row to train on; the cache folder cannot be written.
    """
    if config.eval is not None and config.eval_split:
        raise UserError("eval-twice")

    if config.chat_template is not None:
        tokenizer.chat_template = load_chat_template(config.chat_template)

    @cache
    def taken() -> dict[Split, tuple[list[Row], Intake]]:
        return take_rows(config, seed)

    def content(split: Split) -> str:
        source = config.eval if split == "eval" and config.eval is not None else config.train
        return source_digest(source) or rows_digest(taken()[split][0])

    def table(split: Split) -> TokenTable:
        # Which held-out rows are left depends on the training rows too.
        contents = [content("train")] if split == "train" else [content("train"), content("eval")]
        key = table_key([contents, split, _settings(config, split, seed)], tokenizer)
        folder = (config.cache_dir or cache_root() / "tokens").expanduser().absolute()
        return cached_table(folder / key, lambda: build(split))

    def build(split: Split) -> TokenTable:
        rows, intake = taken()[split]
        built = build_table(rows, tokenizer, config, split)
        return replace(built, summary=replace(built.summary, intake=intake))

    return table("train"), table("eval") if config.eval is not None or config.eval_split else None


def take_rows(config: DataConfig, seed: int) -> dict[Split, tuple[list[Row], Intake]]:
    """The rows of both splits (none are held out where the config asks for none), and what became of the others.

    Raises:
        UserError: as `load_rows`, `split_rows` and `check_leaks`.
    """
    rows, intake = load_rows(config)
    if config.eval is not None:
        eval_rows, eval_intake = load_rows(config, "eval")
    else:
        rows, eval_rows = split_rows(rows, config.eval_split, seed, config.max_eval_rows)
        eval_intake = Intake(len(eval_rows), intake.format)
    return {"train": (rows, intake), "eval": check_leaks(rows, eval_rows, eval_intake, intake.format, config)}


def split_rows(
    rows: Sequence[Row], eval_split: float, seed: int, max_eval_rows: int | None = None
) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows, both in the source's order: a pure function of its arguments.

    `eval_split` below 1 is a share (rounded down, one row at least), from 1 on a number of rows, 0 holds out none.
    """
    if eval_split >= 1 and eval_split != int(eval_split):
        raise UserError("eval-split-fraction", eval_split=eval_split)
    count = int(eval_split) if eval_split >= 1 else max(int(len(rows) * eval_split), int(eval_split > 0))
    if max_eval_rows is not None:
        count = min(count, max_eval_rows)
    if count >= len(rows):
        told = int(eval_split) if eval_split >= 1 else eval_split
        raise UserError("eval-split-takes-all", eval_split=told, held_out=count, rows=len(rows))
    # argsort of raw bits, since numpy keeps a bit generator's stream over versions but not `permutation`.
    held_out = set(np.argsort(np.random.Philox(seed).random_raw(len(rows)), kind="stable")[:count].tolist())
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [rows[index] for index in sorted(held_out)]


def _settings(config: DataConfig, split: Split, seed: int) -> dict[str, Any]:
    """The settings that decide which tokens the table of `split` holds."""
    unused = set(NOT_IN_KEY)
    if split == "eval":
        unused.add("packing")
    elif config.eval is not None:
        unused.add("max_eval_rows")
    return config.model_dump(mode="json", exclude=unused) | ({"seed": seed} if config.eval_split else {})


def _encode(
    rows: Sequence[Row], format_: FormatName, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Iterator[Encoded]:
    chunks = [rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)]
    num_proc = config.num_proc or min(len(os.sched_getaffinity(0)), max(1, len(rows) // ROWS_PER_PROCESS))
    # A class that the model's own repository brought is unknown to a fresh process.
    if num_proc == 1 or len(chunks) == 1 or not type(tokenizer).__module__.startswith("transformers."):
        for chunk in chunks:
            yield _encode_chunk(chunk, format_, tokenizer, config)
        return
    # Spawned, since a fork copies the locks of CUDA's, gloo's and the tokenizer's threads, but not the threads.
    with ProcessPoolExecutor(
        min(num_proc, len(chunks)), get_context("spawn"), _start_process, (format_, tokenizer, config)
    ) as pool:
        yield from pool.map(_encode_in_process, chunks)


def _start_process(*context: Any) -> None:
    global _context
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _context = context


def _encode_in_process(chunk: Sequence[Row]) -> Encoded:
    return _encode_chunk(chunk, *_context)


_context: tuple[Any, ...] = ()


def _encode_chunk(
    rows: Sequence[Row], format_: FormatName, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Encoded:
    conversations = [to_conversation(row, format_) for row in rows]
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    prompts: list[str] = []
    dropped = {"too_long": 0, "no_loss": 0}
    truncated = 0
    encoded = encode_conversations(conversations, tokenizer, config.assistant_only_loss, config.on_bad_row == "skip")
    for conversation, (ids, mask) in zip(conversations, encoded, strict=True):
        too_long = len(ids) > config.max_length
        if too_long and config.too_long == "error":
            raise UserError("row-too-long", place=conversation.row.where, tokens=len(ids), max_length=config.max_length)
        reason = _left_out(len(ids), config)
        if reason is not None:
            dropped[reason] = dropped.get(reason, 0) + 1
        elif not mask[: config.max_length].any():
            dropped["no_loss"] += 1
        else:
            truncated += too_long
            kept.append((ids[: config.max_length], mask[: config.max_length]))
            if len(prompts) < SHOWN_PROMPTS:
                prompts.append(conversation.last_prompt)
    return Encoded(
        lengths=np.array([len(ids) for ids, _ in kept], dtype=np.int64),
        input_ids=np.concatenate([ids for ids, _ in kept] or [np.empty(0, np.int32)]),
        loss_mask=np.concatenate([mask for _, mask in kept] or [np.empty(0, bool)]),
        truncated=truncated,
        dropped=dropped,
        prompts=prompts,
    )


def _left_out(length: int, config: DataConfig) -> str | None:
    """Why a row of so many tokens is left out, if it is."""
    if length == 0:
        return "refused"
    if config.filter.min_tokens is not None and length < config.filter.min_tokens:
        return "too_short"
    dropped_above = [config.filter.max_tokens, config.max_length if config.too_long == "drop" else None]
    return "too_long" if any(limit is not None and length > limit for limit in dropped_above) else None
