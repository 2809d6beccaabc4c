"""The same rows from every kind of source give the same tokens; sources that cannot be read say why."""

import csv
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import DataConfig
from qlora_dist.data.hf_datasets import HUB_ID, read_hub
from qlora_dist.data.sources import read_rows
from qlora_dist.data.tokens import prepare_data

QUESTIONS = [
    {"question": 'He said "hi", twice', "answer": "line one\nline two"},
    {"question": "tabs\tand, commas", "answer": "caf\u00e9 \u2028 \U0001f642"},
    {"question": " leading", "answer": "carriage\r\nreturn "},
]
CHATS = [
    {"messages": [{"role": "user", "content": "hi", "tag": {"a": "1"}}, {"role": "assistant", "content": "yo"}]},
    {
        "messages": [
            {"role": "system", "content": "be brief", "tag": {"a": "1", "b": "2"}},
            *[{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")],
        ]
    },
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return path


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    cells = [{key: value if isinstance(value, str) else json.dumps(value) for key, value in r.items()} for r in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(cells)
    return path


def write_every_kind(folder: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    """The same rows in each local kind of source."""
    sources = {"jsonl": write_jsonl(folder / "x.jsonl", rows), "json": folder / "array.json", "data": folder / "d.json"}
    sources["json"].write_text(json.dumps(rows, indent=1))
    sources["data"].write_text(json.dumps({"version": 1, "data": rows}))
    sources["lines"] = folder / "lines.json"
    sources["lines"].write_bytes(sources["jsonl"].read_bytes())
    sources["csv"] = write_csv(folder / "x.csv", rows)
    sources["tsv"] = write_csv(folder / "x.tsv", rows, "\t")
    sources["parquet"] = folder / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sources["parquet"], row_group_size=2)
    sources["folder"] = folder / "parts"
    write_jsonl(folder / "parts" / "deep" / "b.jsonl", rows[1:])
    (folder / "parts" / "a.json").write_text(json.dumps(rows[:1]))
    (folder / "parts" / "README.md").write_text("no rows here")
    sources["dataset"] = folder / "saved"
    datasets.Dataset.from_list(rows).save_to_disk(str(sources["dataset"]))
    sources["dataset_dict"] = folder / "saved_dict"
    both = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    datasets.DatasetDict(both).save_to_disk(str(sources["dataset_dict"]))
    return {name: str(path) for name, path in sources.items()}


def tokens_of(source: str, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    table, _ = prepare_data(DataConfig(train=source), tokenizer, 0)
    return table.input_ids, table.loss_mask


@pytest.mark.parametrize("rows", [QUESTIONS, CHATS], ids=["questions", "chats"])
def test_every_source_gives_the_same_tokens(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    # Renders what a template must not be able to see: nulls of a typed table.
    tokenizer.chat_template = "{% for m in messages %}{{ (m.tag or {}) | length }}{{ m.content }}\n{% endfor %}"
    sources = write_every_kind(tmp_path, rows)
    reference_ids, reference_mask = tokens_of(sources.pop("jsonl"), tokenizer)
    assert reference_mask.any()
    for name, source in sources.items():
        ids, mask = tokens_of(source, tokenizer)
        assert np.array_equal(ids, reference_ids), name
        assert np.array_equal(mask, reference_mask), name


def test_rows_are_named_by_line_or_number(tmp_path: Path) -> None:
    sources = write_every_kind(tmp_path, QUESTIONS)
    where = {name: [row.where.removeprefix(str(tmp_path) + "/") for row in read_rows(s)] for name, s in sources.items()}
    assert where["jsonl"] == ["x.jsonl:1", "x.jsonl:2", "x.jsonl:3"]
    assert where["json"] == ["array.json, row 1", "array.json, row 2", "array.json, row 3"]
    # The first row's answer takes two lines of the file.
    assert where["csv"] == ["x.csv:2", "x.csv:4", "x.csv:5"]
    assert where["parquet"][2] == "x.parquet, row 3"
    assert where["folder"] == ["parts/a.json, row 1", "parts/deep/b.jsonl:1", "parts/deep/b.jsonl:2"]
    assert where["dataset_dict"] == [f"saved_dict, row {number}" for number in (1, 2, 3)]


def test_a_folder_with_splits_never_trains_on_the_held_out_part(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", [{"a": 1}])
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", [{"a": 2}])
    write_jsonl(tmp_path / "test.jsonl", [{"a": 3}])
    write_jsonl(tmp_path / "hard" / "x.jsonl", [{"a": 4}])
    assert [r.data["a"] for r in read_rows(str(tmp_path))] == [1, 2]
    assert [r.data["a"] for r in read_rows(str(tmp_path), split="eval")] == [3]
    assert [r.data["a"] for r in read_rows(f"{tmp_path}#hard")] == [4]
    with pytest.raises(UserError, match=r"data\.train: .* has files for test, train, none for extra; name a split"):
        read_rows(f"{tmp_path}#extra")


def test_splits_of_a_saved_dataset(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_list([{"a": name}]) for name in ("train", "validation", "test", "hard")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    assert read_rows(str(tmp_path / "d"))[0].data == {"a": "train"}
    assert read_rows(str(tmp_path / "d"), split="eval")[0].data == {"a": "validation"}
    assert read_rows(f"{tmp_path / 'd'}#hard")[0].data == {"a": "hard"}
    with pytest.raises(UserError, match=r"has the splits hard, test, train, validation, none of them soft; name one"):
        read_rows(f"{tmp_path / 'd'}#soft")


def test_max_rows_goes_over_the_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"a": name}] * 2)
    (tmp_path / "c.jsonl").write_text("never read\n")
    assert [r.data["a"] for r in read_rows(str(tmp_path), max_rows=3)] == ["a", "a", "b"]


# --- the hub --------------------------------------------------------------------------------------------------------


def test_hub_ids() -> None:
    match = HUB_ID.fullmatch("openai/gsm8k:main@v1.0")
    assert match is not None
    assert match.groupdict() == {"repo": "openai/gsm8k", "subset": "main", "revision": "v1.0"}
    assert HUB_ID.fullmatch("a/b/c") is None
    assert HUB_ID.fullmatch("../b") is None


def test_a_dataset_repository_is_read_by_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `datasets` takes a folder of this name for the repository; what follows the download is the same.
    write_jsonl(tmp_path / "owner" / "name" / "train.jsonl", QUESTIONS)
    write_jsonl(tmp_path / "owner" / "name" / "test.jsonl", QUESTIONS[:1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    match = HUB_ID.fullmatch("owner/name")
    assert match is not None
    rows = list(read_hub(match, "data.train", ("train",)))
    assert [row.data for row in rows] == QUESTIONS
    assert rows[2].where == "owner/name, row 3"
    assert len(list(read_hub(match, "data.eval", ("validation", "test")))) == 1


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for a repository that is gated or missing."""

    def do_GET(self) -> None:
        if "gated" in self.path and "/resolve/" not in self.path:
            body = json.dumps({"id": "owner/gated", "sha": "0" * 40, "gated": "manual", "siblings": []}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        gated = "gated" in self.path
        self.send_response(403 if gated else 401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access to dataset is restricted" if gated else "Repository not found")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


def hub_sentence(tmp_path: Path, source: str, **environment: str) -> str:
    """What reading a hub id ends in, in a process of its own: the hub's address is read when it is imported."""
    code = f"""
        from qlora_dist.config.errors import UserError
        from qlora_dist.data.sources import read_rows
        try:
            read_rows({source!r})
        except UserError as error:
            print("SENTENCE " + error.message)
    """
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env=clean | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])} | environment,
    )  # fmt: skip
    assert "SENTENCE" in result.stdout, result.stderr[-2000:]
    return result.stdout.partition("SENTENCE ")[2].strip()


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_hub_offline(tmp_path: Path) -> None:
    sentence = hub_sentence(tmp_path, "owner/name", HF_HUB_OFFLINE="1")
    assert sentence.startswith("data.train: owner/name does not exist here, and the hub cannot be reached (")
    assert sentence.endswith("or download the dataset where there is a network and give its folder")


def test_hub_missing_and_gated(tmp_path: Path, hub: str) -> None:
    assert hub_sentence(tmp_path, "owner/name", HF_ENDPOINT=hub) == (
        "data.train: owner/name is neither a path here nor a dataset that the hub shows you; mend the name, or set "
        "HF_TOKEN if it is private"
    )
    assert hub_sentence(tmp_path, "owner/gated", HF_ENDPOINT=hub) == (
        "data.train: the hub dataset owner/gated is gated; accept its conditions on the hub, then run `hf auth login` "
        "or set HF_TOKEN"
    )
