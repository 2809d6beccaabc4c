"""Filters, bad rows that are left out and counted, field mapping, ShareGPT, plain text, and what a person is told."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_dist.config.errors import UserError
from qlora_dist.config.load import validate
from qlora_dist.config.schema import DataConfig
from qlora_dist.data.filters import load_rows
from qlora_dist.data.formats import detect_format, to_conversation
from qlora_dist.data.rows import Row
from qlora_dist.data.summary import data_line, data_notices, data_record, example_line, example_pieces
from qlora_dist.data.template import encode_conversations
from qlora_dist.data.tokens import TokenTable, prepare_data


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def write(folder: Path, *rows: Any, name: str = "x.jsonl") -> str:
    """A JSONL file; a string is a line as it is, a pair a question and its answer."""
    objects = [dict(zip(("question", "answer"), row, strict=True)) if isinstance(row, tuple) else row for row in rows]
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in objects)
    (folder / name).write_text(text)
    return str(folder / name)


def kept(config: DataConfig) -> list[str]:
    return [row.data["answer"] for row in load_rows(config)[0]]


def learned(table: TokenTable, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    packs = [table.pack(index) for index in range(table.num_packs)]
    return [tokenizer.decode(ids[mask]) for ids, mask in packs]


# --- bad rows -------------------------------------------------------------------------------------------------------


def test_bad_rows_are_left_out_counted_and_the_first_of_each_kind_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = write(tmp_path, "oops", ("q", "a"), {"question": "q"}, '["x"]', ("q", 3), {"question": "r"}, ("q", "b"))
    config = DataConfig(train=source, on_bad_row="skip")
    rows, intake = load_rows(config)
    assert [row.line for row in rows] == [2, 7]
    assert intake.rows == 7
    assert intake.dropped == {"not JSON": 1, "not an object": 1, "missing key": 2, "wrong type": 1}
    assert intake.first_bad["missing key"].startswith(f"{source}:3 lacks the key `answer`")
    table, _ = prepare_data(config, tokenizer, 0)
    record = data_record("train", table)
    assert (record["rows"], record["documents"], record["dropped"]) == (7, 2, intake.dropped)
    assert "train: 2 of 7 rows" in data_line(record)
    assert "2 dropped (missing key)" in data_line(record)
    assert len(data_notices("train", table)) == 4
    assert data_notices("train", table)[2].startswith(f"train: left out 2 rows (missing key); the first: {source}:3")


def test_the_format_is_that_of_the_first_row_that_has_one(tmp_path: Path) -> None:
    source = write(tmp_path, {"note": "of another kind"}, ("q", "a"))
    assert load_rows(DataConfig(train=source, on_bad_row="skip"))[1].dropped == {"missing key": 1}


def test_bad_rows_are_errors_unless_skipped(tmp_path: Path) -> None:
    source = write(tmp_path, ("q", "a"), "oops")
    with pytest.raises(UserError, match=r"x\.jsonl:2 is not JSON"):
        load_rows(DataConfig(train=source))
    assert len(load_rows(DataConfig(train=source, on_bad_row="skip"))[0]) == 1


def test_a_row_that_the_template_refuses_is_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    source = write(
        tmp_path, {"messages": turns}, {"messages": [*turns, {"role": "tool", "content": "t"}]}, {"messages": turns}
    )
    config = DataConfig(train=source, on_bad_row="skip", chat_template="gemma")
    table, _ = prepare_data(config, AutoTokenizer.from_pretrained(tokenizer.name_or_path), 0)
    assert table.num_packs == 2
    assert data_record("train", table)["dropped"] == {"refused by the chat template": 1}


# --- filters --------------------------------------------------------------------------------------------------------


def test_characters_and_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path, ("q", "z"), ("q", "zz"), ("q", "zzz"), ("q", "zzzz"))
    config = DataConfig(train=source, filter={"min_chars": 3, "max_chars": 4})
    assert kept(config) == ["zz", "zzz"]
    assert load_rows(config)[1].dropped == {"fewer than min_chars": 1, "more than max_chars": 1}
    lengths = prepare_data(DataConfig(train=source), tokenizer, 0)[0].pack_tokens.tolist()
    assert lengths == sorted(set(lengths)), "the rows differ in tokens"
    config = DataConfig(train=source, filter={"min_tokens": lengths[1], "max_tokens": lengths[2]})
    table, _ = prepare_data(config, tokenizer, 0)
    assert table.pack_tokens.tolist() == lengths[1:3]
    assert data_record("train", table)["dropped"] == {"too short": 1, "too long": 1}


def test_empty_answers_alone_are_dropped(tmp_path: Path) -> None:
    source = write(tmp_path, ("q", "a"), ("q", " \n"), ("q", ""))
    _, intake = load_rows(DataConfig(train=source, filter={"drop_empty_answers": True}))
    assert intake.dropped == {"empty answer": 2}
    with pytest.raises(UserError, match=r"x\.jsonl:1: `question` is empty"):
        load_rows(DataConfig(train=write(tmp_path, ("", "a")), filter={"drop_empty_answers": True}))


def test_duplicates_differ_in_white_space_only(tmp_path: Path) -> None:
    source = write(tmp_path, ("q x", "a"), ("q  x\n", " a"), ("q x", "b"), ("qx", "a"), ("q x", "a"))
    rows, intake = load_rows(DataConfig(train=source))
    assert (len(rows), intake.duplicates, intake.dropped) == (5, 2, {})
    rows, intake = load_rows(DataConfig(train=source, filter={"drop_duplicates": True}))
    assert [row.line for row in rows] == [1, 3, 4]
    assert intake.dropped == {"duplicate": 2}


def test_held_out_rows_that_are_training_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train = write(tmp_path, ("q", "a"), ("r", "b"))
    messages = [{"role": "user", "content": "q "}, {"role": "assistant", "content": "a"}]
    held_out = write(tmp_path, {"messages": messages}, {"messages": [messages[0], messages[1] | {"content": "c"}]},
                     name="eval.jsonl")  # fmt: skip
    _, table = prepare_data(DataConfig(train=train, eval=held_out), tokenizer, 0)
    assert table is not None
    assert table.num_packs == 2
    assert data_notices("eval", table) == [
        "eval: 1 held-out rows are training rows too, so the held-out loss flatters; data.filter.drop_leaked: true "
        "leaves them out"
    ]
    _, table = prepare_data(DataConfig(train=train, eval=held_out, filter={"drop_leaked": True}), tokenizer, 0)
    assert table is not None
    assert table.num_packs == 1
    assert data_record("eval", table)["dropped"] == {"leaked": 1}
    assert data_notices("eval", table) == []
    with pytest.raises(UserError, match=r"data\.filter\.drop_leaked leaves no held-out row: all 2 are training rows"):
        prepare_data(DataConfig(train=train, eval=train, filter={"drop_leaked": True}), tokenizer, 0)


def test_no_filter_drops_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path, ("q", "a"), ("q", "a"), ("q", "b"))
    table, _ = prepare_data(DataConfig(train=source), tokenizer, 0)
    assert table.num_packs == 3
    assert data_record("train", table)["dropped"] == {}


def test_limits_that_exclude_each_other() -> None:
    values = {"model": {"name": "m"}, "data": {"train": "x", "filter": {"min_chars": 5, "max_chars": 4}}}
    with pytest.raises(UserError, match=r"data\.filter\.min_chars \(5\) is more than data\.filter\.max_chars \(4\)"):
        validate(values)
    with pytest.raises(UserError, match=r"data\.fields\.prmpt"):
        validate({"model": {"name": "m"}, "data": {"train": "x", "fields": {"prmpt": "q"}}})


# --- formats --------------------------------------------------------------------------------------------------------


def roles_and_texts(data: dict[str, Any]) -> list[tuple[str, str]]:
    row = Row(data, "x.jsonl", 1)
    return [(m["role"], m["content"]) for m in to_conversation(row, detect_format([row])).messages]


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    ],
)
def test_sharegpt(turns: list[dict[str, str]]) -> None:
    assert roles_and_texts({"conversations": turns, "id": "1"}) == [("user", "q"), ("assistant", "a")]
    with_system = [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert roles_and_texts({"conversations": turns, "system": "s"}) == with_system
    assert roles_and_texts({"conversations": [{"from": "system", "value": "s"}, *turns], "system": "t"}) == with_system


def test_an_older_format_wins_over_text_and_conversations() -> None:
    assert detect_format([Row({"instruction": "i", "output": "o", "text": "t"}, "x", 1)]) == "alpaca"
    assert detect_format([Row({"messages": [], "conversations": []}, "x", 1)]) == "messages"
    assert detect_format([Row({"conversations": [], "text": "t"}, "x", 1)]) == "sharegpt"


def test_all_of_a_plain_text_is_learned_without_a_template(tokenizer: PreTrainedTokenizerBase) -> None:
    conversation = to_conversation(Row({"text": "hq qz\n"}, "x", 1), "text")
    [(ids, mask)] = encode_conversations([conversation], tokenizer)
    assert tokenizer.decode(ids) == "hq qz\n<|im_end|>"
    # The first token has nothing before it to be predicted from.
    assert mask.tolist() == [False] + [True] * (len(ids) - 1)
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    assert encode_conversations([conversation], bare)[0][0].tolist() == ids.tolist()


def test_field_mapping(tmp_path: Path) -> None:
    data = {"input": {"title": "T", "body": "B"}, "label": 3, "a.b": "dotted"}
    source = write(tmp_path, data)
    fields = {"prompt": "{input.title}: {{{input.body}}}", "completion": "{label}", "system": "a.b"}
    rows, intake = load_rows(DataConfig(train=source, fields=fields))
    assert intake.format == "prompt_completion"
    assert rows[0].data == {"prompt": "T: {B}", "completion": "3", "system": "dotted"}
    assert rows[0].where == f"{source}:1"
    [row] = load_rows(DataConfig(train=source, fields={"text": "input.body"}))[0]
    assert row.data == {"text": "B"}


def test_mapped_rows_give_the_tokens_of_rows_that_need_no_mapping(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    plain = write(tmp_path, ("q", "a"), ("r", "b"))
    other = write(tmp_path, {"x": "q", "y": "a"}, {"x": "r", "y": "b"}, name="other.jsonl")
    expected, _ = prepare_data(DataConfig(train=plain), tokenizer, 0)
    found, _ = prepare_data(DataConfig(train=other, fields={"question": "x", "answer": "y"}), tokenizer, 0)
    assert found.fingerprint == expected.fingerprint


# --- what is shown --------------------------------------------------------------------------------------------------


def test_the_example_tells_what_bears_loss(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    table, _ = prepare_data(DataConfig(train=write(tmp_path, ("hq", "qz"))), tokenizer, 0)
    pieces = example_pieces(table, tokenizer)
    assert pieces == [
        ("<|im_start|>user\nhq<|im_end|>\n<|im_start|>assistant\n", False),
        ("qz<|im_end|>", True),
        ("\n", False),
    ]
    assert example_line(pieces) == (
        "[no loss] and loss: [<|im_start|>user\\nhq<|im_end|>\\n<|im_start|>assistant\\n]qz<|im_end|>[\\n]"
    )


def test_a_long_example_is_shortened(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    table, _ = prepare_data(DataConfig(train=write(tmp_path, ("x" * 900, "y" * 900))), tokenizer, 0)
    assert len(example_line(example_pieces(table, tokenizer))) < 600
