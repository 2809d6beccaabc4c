"""Reading JSONL, detecting formats, and every sentence that a malformed source ends in."""

import json
from pathlib import Path

import pytest

from qlora_dist.config.errors import UserError
from qlora_dist.data import sources as sources_module
from qlora_dist.data.formats import detect_format, to_conversation
from qlora_dist.data.rows import Row
from qlora_dist.data.sources import bundled_names, read_rows

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def row(data: dict) -> Row:
    return Row(data, "x.jsonl", 7)


def write(folder: Path, content: bytes) -> str:
    path = folder / "x.jsonl"
    path.write_bytes(content)
    return str(path)


def test_rows_know_their_line_over_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    source = write(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xe2\x80\xa8 \xf0\x9f\x99\x82"}\n{"a": 3}')
    rows = read_rows(source)
    assert [r.line for r in rows] == [1, 4, 5]
    # U+2028 ends a line for str.splitlines, not in JSONL.
    assert [r.data["a"] for r in rows] == [1, "\u2028 🙂", 3]
    assert rows[1].where == f"{source}:4"


def test_max_rows_stops_before_a_later_malformed_line(tmp_path: Path) -> None:
    source = write(tmp_path, b'{"a": 1}\n{"a": 2}\noops\n')
    assert [r.data["a"] for r in read_rows(source, max_rows=2)] == [1, 2]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"a": 1}\n{"a": \n', r"x\.jsonl:2 is not JSON \(.* at column \d+\); put one whole JSON object"),
        (b'{"a": 1}\n["b"]\n', r"x\.jsonl:2 is a list, not a JSON object"),
        (b"3\n", r"x\.jsonl:1 is a bare value, not a JSON object"),
        (b'{"a": 1}\n\n{"a": "\xff"}\n', r"x\.jsonl:3 is not UTF-8 \(byte 7 of the line\); save the file as UTF-8"),
        (b"", r"x\.jsonl holds no rows; put one JSON object on each line"),
        (b"\n \n", r"x\.jsonl holds no rows"),
    ],
)
def test_malformed_sources(tmp_path: Path, content: bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_rows(write(tmp_path, content))


def test_missing_file_and_folder_name_the_field(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.eval: .*nothing\.jsonl does not exist; give the path"):
        read_rows(str(tmp_path / "nothing.jsonl"), split="eval")
    with pytest.raises(UserError, match=r"data\.train: .* holds no file that ends in \.jsonl"):
        read_rows(str(tmp_path))


def test_bundled_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pets.train.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "pets.eval.jsonl").write_text('{"a": 2}\n{"a": 3}\n')
    (tmp_path / "cars.train.jsonl").write_text('{"a": 4}\n')
    monkeypatch.setattr(sources_module, "_bundled_folder", lambda: tmp_path)
    assert bundled_names("train") == ["cars", "pets"]
    assert [r.data["a"] for r in read_rows("bundled:pets")] == [1]
    assert [r.data["a"] for r in read_rows("bundled:pets", 1, split="eval")] == [2]
    with pytest.raises(UserError, match=r"data\.eval: there is no bundled dataset 'cars' with eval rows; use .*: pets"):
        read_rows("bundled:cars", split="eval")


def test_every_dataset_in_the_package_can_be_read_and_converted() -> None:
    for split in ("train", "eval"):
        for name in bundled_names(split):
            rows = read_rows(f"bundled:{name}", split=split)
            name_of_format = detect_format(rows)
            assert all(to_conversation(r, name_of_format).messages for r in rows)


@pytest.mark.parametrize(
    ("data", "format_", "user", "assistant"),
    [
        ({"messages": CHAT, "id": 3}, "messages", "hi", "yo"),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", "i", "o"),
        ({"instruction": "i", "output": "o"}, "alpaca", "i", "o"),
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca", "i\n\nx", "o"),
        ({"prompt": "p", "completion": " c"}, "prompt_completion", "p", " c"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt_completion", "hi", "yo"),
        ({"question": "q", "answer": "a"}, "question_answer", "q", "a"),
        ({"instruction": "q", "response": "a"}, "question_answer", "q", "a"),
    ],
)
def test_detection_and_conversion(data: dict, format_: str, user: str, assistant: str) -> None:
    assert detect_format([row(data)]) == format_
    messages = to_conversation(row(data), format_).messages
    assert [(m["role"], m["content"]) for m in messages] == [("user", user), ("assistant", assistant)]


def test_a_named_format_wins_and_ambiguity_is_refused() -> None:
    both = row({"prompt": "p", "completion": "c", "question": "q", "answer": "a"})
    assert detect_format([both], "question_answer") == "question_answer"
    with pytest.raises(UserError, match=r"x.jsonl:7 fits the formats prompt_completion and question_answer .*; name"):
        detect_format([both])


def test_undetectable_lists_keys_and_formats() -> None:
    with pytest.raises(UserError) as caught:
        detect_format([row({"body": "t", "id": 1})])
    assert caught.value.message == (
        "x.jsonl:7 fits no known format (keys: body, id); map its keys with data.fields, or use those of messages "
        "(messages), alpaca (instruction/output), prompt_completion (prompt/completion), question_answer "
        "(question/answer or instruction/response), sharegpt (conversations), text (text)"
    )


def test_messages_of_a_prompt_bear_no_loss_even_the_assistants() -> None:
    conversation = to_conversation(row({"prompt": [*CHAT, CHAT[0]], "completion": CHAT[1:]}), "prompt_completion")
    assert conversation.first_loss_message == 3
    assert not conversation.plain


@pytest.mark.parametrize(
    ("data", "format_", "sentence"),
    [
        ({"question": "q"}, "question_answer", r"lacks the key `answer` of the format question_answer \(keys: quest"),
        ({"instruction": "q"}, "alpaca", r"lacks the key `output`"),
        ({"instruction": "q", "input": 3, "output": "o"}, "alpaca", r"`input` is of type int; make it a string"),
        ({"question": "q", "answer": 4}, "question_answer", r"`answer` is of type int; make it a string"),
        ({"question": "q", "answer": " \n"}, "question_answer", r"`answer` is empty; fill it in or remove it"),
        ({"prompt": "p", "completion": CHAT}, "prompt_completion", r"prompt and completion differ in kind"),
        ({"messages": "hi"}, "messages", r"`messages` must be a non-empty list"),
        ({"messages": []}, "messages", r"`messages` must be a non-empty list"),
        ({"messages": ["hi"]}, "messages", r"messages\[0\] is not an object"),
        ({"messages": [{"role": "gpt", "content": "x"}]}, "messages", r"messages\[0\] has the role 'gpt'; use one of"),
        ({"messages": [*CHAT, {"role": "assistant"}]}, "messages", r"messages\[2\]: `content` is of type NoneType"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", r"messages\[0\]: `content` is empty"),
        ({"messages": CHAT[:1]}, "messages", r"has no assistant message to learn from"),
        ({"prompt": CHAT, "completion": CHAT[:1]}, "prompt_completion", r"has no assistant message to learn from"),
        ({"messages": CHAT[1:]}, "messages", r"begins with the assistant; put a user message before it"),
    ],
)
def test_malformed_rows(data: dict, format_: str, sentence: str) -> None:
    with pytest.raises(UserError, match=r"^x\.jsonl:7:? " + sentence):
        to_conversation(row(data), format_)


@pytest.mark.parametrize(
    ("name", "user", "assistant"), [("gsm8k", "question", "answer"), ("tldr", "instruction", "response")]
)
def test_detection_on_real_data(name: str, user: str, assistant: str) -> None:
    source = REAL_DATA / name / "train.jsonl"
    if not source.is_file():
        pytest.skip(f"the shared data folder ({name}/train.jsonl beside the repository) is absent")
    rows = read_rows(str(source), max_rows=50)
    assert detect_format(rows) == "question_answer"
    raw = [json.loads(line) for line in source.read_text("utf-8").split("\n")[:50]]
    for r, expected in zip(rows, raw, strict=True):
        contents = [m["content"] for m in to_conversation(r, "question_answer").messages]
        assert contents == [expected[user], expected[assistant]]
