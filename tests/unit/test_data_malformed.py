"""Malformed data: each input ends in one sentence that names file and place, and the mend."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import DataConfig
from qlora_dist.data.tokens import prepare_data

GOOD = b'{"question": "q", "answer": "a"}\n'


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def parquet(columns: dict[str, list[Any]]) -> Callable[[Path], object]:
    return lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path)


def cut_parquet(path: Path) -> None:
    parquet({"question": ["q"] * 100, "answer": ["a"] * 100})(path)
    path.write_bytes(path.read_bytes()[:-20])


def damaged_dataset(path: Path) -> None:
    datasets.Dataset.from_list([{"question": "q", "answer": "a"}] * 10).save_to_disk(str(path))
    (file,) = path.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:200])


def chat(*messages: Any) -> bytes:
    return json.dumps({"messages": list(messages)}).encode()


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
# What, file name, content (bytes, or what writes it), further settings, the sentence after the folder's name.
MALFORMED: list[tuple[str, str, Any, dict[str, Any], str]] = [
    ("cut line", "x.jsonl", GOOD + b'{"question": "q", "answ\n', {},
     r"x\.jsonl:2 is not JSON \(Unterminated string starting at column 19\); put one whole JSON object on each line"),
    ("python literal", "x.jsonl", b"{'question': 'q'}\n", {}, r"x\.jsonl:1 is not JSON \(.*\); put one whole"),
    ("latin-1 line", "x.jsonl", GOOD + b'{"question": "caf\xe9", "answer": "a"}', {},
     r"x\.jsonl:2 is not UTF-8 \(byte 17 of the line\); save the file as UTF-8"),
    ("utf-16", "x.jsonl", GOOD.decode().encode("utf-16"), {}, r"x\.jsonl:1 is not UTF-8 \(byte 0 of the line\); save"),
    ("array in jsonl", "x.jsonl", b'[{"question": "q"}]\n', {}, r"x\.jsonl:1 is a list, not a JSON object; put one"),
    ("deep nesting", "x.jsonl", b"[" * 200_000, {}, r"x\.jsonl:1 is nested too deeply; mend it"),
    ("huge number", "x.jsonl", b'{"question": ' + b"1" * 5000 + b"}", {},
     r"x\.jsonl:1 holds a number of too many digits; mend"),
    ("half a surrogate", "x.jsonl", GOOD + rb'{"question": "q\ud800", "answer": "a"}', {},
     r"x\.jsonl:2: `question` holds half of a surrogate pair, which is no character; remove it"),
    ("cut json", "x.json", b'[{"question": "q"},\n{"question"', {},
     r"x\.json:2 is not JSON \(.* at column \d+\); mend it"),
    ("json without rows", "x.json", b'{"rows": []}', {},
     r"x\.json is not a list of rows; make it \[\{\.\.\.\}, \.\.\.\]"),
    ("json of strings", "x.json", b'[{"question": "q", "answer": "a"}, "b"]', {},
     r"x\.json, row 2 is a string, not a JSON object; put"),
    ("empty json", "x.json", b"", {}, r"x\.json holds no rows"),
    ("empty array", "x.json", b"[]", {}, r"x\.json holds no rows"),
    ("latin-1 json", "x.json", b'[{"question":\n"caf\xe9"}]', {},
     r"x\.json:2 is not UTF-8 \(byte 18 of the file\); save"),
    ("short csv row", "x.csv", b'question,answer\n"q\n1",a\nq2\n', {},
     r"x\.csv:4 has 1 cells where the first line names 2 columns; mend the row, or quote cells"),
    ("unquoted comma", "x.csv", b"question,answer\nq,a,b\n", {}, r"x\.csv:2 has 3 cells where the first line names 2"),
    ("open quote", "x.csv", b'question,answer\nq,"a\nq,a\n', {},
     r"x\.csv:2 is not CSV \(unexpected end of data\); mend"),
    ("nameless column", "x.csv", b"question,,answer\nq,x,a\n", {},
     r"x\.csv:1: column 2 has no name; name every column"),
    ("column twice", "x.csv", b"question,question\nq,a\n", {},
     r"x\.csv:1 names the column `question` twice; rename one"),
    ("only a header", "x.csv", b"question,answer\n", {}, r"x\.csv holds no rows"),
    ("latin-1 csv", "x.csv", b"question,answer\nq,caf\xe9\n", {},
     r"x\.csv:2 is not UTF-8 \(byte 21 of the file\); save"),
    ("semicolons", "x.csv", b"question;answer\nq;a\n", {},
     r"x\.csv:2 fits no known format \(keys: question;answer\); map"),
    ("cut parquet", "x.parquet", cut_parquet, {}, r"x\.parquet is not a readable Parquet file \(.*\); write it again"),
    ("text named parquet", "x.parquet", GOOD, {}, r"x\.parquet is not a readable Parquet file \(.*\); write it again"),
    ("null in parquet", "x.parquet", parquet({"question": ["q", "q"], "answer": ["a", None]}), {},
     r"x\.parquet, row 2 lacks the key `answer` of the format question_answer \(keys: question\); mend the row"),
    ("numbers in parquet", "x.parquet", parquet({"question": ["q"], "answer": [4]}), {},
     r"x\.parquet, row 1: `answer` is of type int; make it a string"),
    ("damaged dataset", "d", damaged_dataset, {}, r"d is not a whole `datasets` folder \(.*\); save it again"),
    ("folder of nothing", "d", lambda path: path.mkdir(), {},
     r"d holds no file that ends in \.jsonl, .*; put one there"),
    ("unknown ending", "x.xlsx", b"PK", {}, r"x\.xlsx has \.xlsx, which tells no format; use one of \.jsonl"),
    ("no such file", "gone.jsonl", None, {}, r"gone\.jsonl does not exist; give the path of a file \(.*\), a folder"),
    ("no answer key", "x.jsonl", GOOD + b'{"question": "q"}\n', {}, r"x\.jsonl:2 lacks the key `answer` of the format"),
    ("empty answer", "x.jsonl", GOOD + b'{"question": "q", "answer": " "}\n', {},
     r"x\.jsonl:2: `answer` is empty; fill it in or remove it; data\.filter\.drop_empty_answers"),
    ("null answer", "x.jsonl", GOOD + b'{"question": "q", "answer": null}\n', {},
     r"x\.jsonl:2: `answer` is of type NoneType; make it a string"),
    ("no known keys", "x.jsonl", b'{"body": "b"}\n', {},
     r"x\.jsonl:1 fits no known format \(keys: body\); map its keys"),
    ("unknown role", "x.jsonl", chat(USER, {"role": "narrator", "content": "x"}), {},
     r"x\.jsonl:1: messages\[1\] has the role 'narrator'; use one of system, developer, user, assistant, tool"),
    ("message as text", "x.jsonl", chat(USER, "yo"), {},
     r"x\.jsonl:1: messages\[1\] is not an object; give it `role` and `content`"),
    ("no assistant", "x.jsonl", chat(USER), {}, r"x\.jsonl:1 has no assistant message to learn from; add one"),
    ("messages in csv", "x.csv", b'messages\n"[{""role"": ""user"""\n', {},
     r"x\.csv:2: `messages` is not JSON \(.*\); mend the list"),
    ("sharegpt speaker", "x.jsonl", b'{"conversations": [{"from": "alien", "value": "x"}]}', {},
     r"x\.jsonl:1: conversations\[0\] has the role 'alien'; use one of human, gpt,"),
    ("sharegpt without value", "x.jsonl", b'{"conversations": [{"from": "human", "text": "x"}]}', {},
     r"x\.jsonl:1: conversations\[0\]: `value` is of type NoneType; make it a string"),
    ("text of a number", "x.jsonl", b'{"text": 3}', {}, r"x\.jsonl:1: `text` is of type int; make it a string"),
    ("unknown column", "x.jsonl", GOOD, {"fields": {"prompt": "q", "completion": "answer"}},
     r"x\.jsonl:1 lacks the column `q` that data\.fields\.prompt names \(columns: answer, question\); name one"),
    ("broken mapping", "x.jsonl", GOOD, {"fields": {"prompt": "{question", "completion": "answer"}},
     r"data\.fields\.prompt is '\{question' \(expected '\}' before end of string\); write \{\{ for a brace"),
    ("half a mapping", "x.jsonl", GOOD, {"fields": {"prompt": "question"}},
     r"x\.jsonl:1 fits no known format \(keys: prompt\); map its keys"),
    ("no such template", "x.jsonl", GOOD, {"chat_template": "chatlm"},
     r"data\.chat_template: chatlm is neither a file nor one of alpaca, chatml, .*; use one of them"),
    ("all too short", "x.jsonl", GOOD * 3, {"filter": {"min_chars": 9}},
     r"data\.train: no row of .*x\.jsonl is left of 3 \(3 fewer than min_chars\); loosen data\.filter"),
    ("all too few tokens", "x.jsonl", GOOD * 3, {"filter": {"min_tokens": 99}},
     r"data\.train: no row is left of 3, with data\.max_length=2048 tokens \(3 too short\); raise data\.max_length"),
    ("all bad", "x.jsonl", b"oops\n" * 3, {"on_bad_row": "skip"},
     r"data\.train: .*x\.jsonl holds no row that can be read; mend its rows, .* the first: .*x\.jsonl:1 is not JSON"),
    ("template refuses", "x.jsonl", chat(USER, ANSWER, {"role": "tool", "content": "t"}), {"chat_template": "gemma"},
     r"x\.jsonl:1: the chat template of .* refuses these messages \(gemma knows the roles .*\); mend the row"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "settings", "sentence"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED]
)
def test_malformed_input_ends_in_one_sentence(
    name: str,
    content: Any,
    settings: dict[str, Any],
    sentence: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template)
    path = tmp_path / name
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        prepare_data(DataConfig(train=str(path), **settings), tokenizer, 0)
    message = caught.value.message
    assert "\n" not in message
    assert "; " in message
    assert name in message or "data." in message


def test_a_broken_template_file_is_named_with_its_line(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    template = tmp_path / "mine.jinja"
    config = DataConfig(train=str(tmp_path / "x.jsonl"), chat_template=str(template))
    for content, sentence in [
        ("hi\n{% for m in messages %}", r"mine\.jinja:2 is not Jinja \(Unexpected end of template.*\); mend it there"),
        ("{% fro m in messages %}", r"mine\.jinja:1 is not Jinja \(Encountered unknown tag 'fro'.*\); mend it there"),
        (" \n", r"mine\.jinja is empty; write a Jinja template there"),
    ]:
        template.write_text(content)
        with pytest.raises(UserError, match=sentence):
            prepare_data(config, tokenizer, 0)
