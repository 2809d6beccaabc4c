"""The token cache: made once, made anew when anything that decides a token changes, and never trusted when damaged."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import DataConfig
from qlora_dist.data import tokens
from qlora_dist.data.cache import tokenizer_digest
from qlora_dist.data.rows import BadRow
from qlora_dist.data.sources import read_rows
from qlora_dist.data.table import TokenTable
from qlora_dist.data.tokens import build_table, prepare_data


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the tokenisation was given."""
    calls: list[int] = []
    encode = tokens.encode_conversations

    def counted(conversations, *args):
        calls.append(len(conversations))
        return encode(conversations, *args)

    monkeypatch.setattr(tokens, "encode_conversations", counted)
    return calls


def source(folder: Path, count: int = 8, first: str = "a") -> Path:
    path = folder / "rows.jsonl"
    lines = [{"question": f"q{n}", "answer": first if n == 0 else f"a{n}"} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config(folder: Path, **settings: Any) -> DataConfig:
    values = {"train": str(folder / "rows.jsonl"), "cache_dir": folder / "cache", "packing": True, "max_length": 64}
    return DataConfig.model_validate(values | settings)


def same(one: TokenTable, other: TokenTable) -> bool:
    """But for what became of the rows before they were tokenised."""
    summaries = [replace(table.summary, intake=None) for table in (one, other)]
    return (one.fingerprint, one.prompts) == (other.fingerprint, other.prompts) and summaries[0] == summaries[1]


def test_a_second_run_neither_reads_nor_tokenises(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, tokenised: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path)
    train, held_out = prepare_data(config(tmp_path, eval_split=2), tokenizer, 0)
    assert tokenised == [6, 2]
    monkeypatch.setattr(tokens, "load_rows", None)
    again, held_out_again = prepare_data(config(tmp_path, eval_split=2), tokenizer, 0)
    assert tokenised == [6, 2]
    assert held_out is not None
    assert held_out_again is not None
    assert same(train, again)
    assert same(held_out, held_out_again)
    assert again.summary == train.summary
    assert again.summary.intake is not None
    mapped = again.input_ids
    assert isinstance(mapped.base, np.memmap)
    assert not mapped.flags.writeable


def test_the_cached_table_is_the_built_one(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = source(tmp_path)
    built = build_table(read_rows(str(path)), tokenizer, config(tmp_path))
    cached, _ = prepare_data(config(tmp_path), tokenizer, 0)
    assert same(built, cached)
    assert built.num_packs == cached.num_packs < built.num_documents
    for pack in range(built.num_packs):
        assert all(map(np.array_equal, built.pack(pack), cached.pack(pack)))


@pytest.mark.parametrize(
    "settings",
    [{"max_length": 65}, {"packing": False}, {"assistant_only_loss": False}, {"max_rows": 5}, {"too_long": "drop"},
     {"eval_split": 2}],
)  # fmt: skip
def test_a_changed_setting_tokenises_anew(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, tokenised: list[int], settings: dict[str, Any]
) -> None:
    source(tmp_path)
    prepare_data(config(tmp_path), tokenizer, 0)
    tokenised.clear()
    prepare_data(config(tmp_path, **settings), tokenizer, 0)
    assert tokenised


def test_what_changes_no_token_does_not_tokenise_anew(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, tokenised: list[int]
) -> None:
    path = source(tmp_path)
    prepare_data(config(tmp_path), tokenizer, 0)
    tokenised.clear()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / path.name).write_bytes(path.read_bytes())
    prepare_data(config(tmp_path, shuffle=False, num_proc=1, train=str(elsewhere / path.name)), tokenizer, 7)
    assert tokenised == []


def test_a_changed_row_tokenizer_or_template_tokenises_anew(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, tokenised: list[int]
) -> None:
    source(tmp_path)
    prepare_data(config(tmp_path), tokenizer, 0)
    source(tmp_path, first="b")
    prepare_data(config(tmp_path), tokenizer, 0)
    assert tokenised == [8, 8]
    tokenizer.add_tokens(["a1"])
    prepare_data(config(tmp_path), tokenizer, 0)
    assert tokenised == [8, 8, 8]
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_end|>")
    prepare_data(config(tmp_path), tokenizer, 0)
    assert tokenised == [8, 8, 8, 8]


def test_bundled_rows_are_known_by_their_content(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, tokenised: list[int]
) -> None:
    for _ in range(2):
        prepare_data(config(tmp_path, train="bundled:home_commands", max_rows=4), tokenizer, 0)
    assert tokenised == [4]


def test_calling_a_tokenizer_does_not_change_its_digest(tokenizer: PreTrainedTokenizerBase) -> None:
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before


def damage_one_byte(folder: Path) -> None:
    content = bytearray((folder / "input_ids.npy").read_bytes())
    content[-3] ^= 1
    (folder / "input_ids.npy").write_bytes(content)


def cut_off(folder: Path) -> None:
    with (folder / "loss_mask.npy").open("r+b") as file:
        file.truncate(100)


def empty(folder: Path) -> None:
    (folder / "offsets.npy").write_bytes(b"")


def lose_a_file(folder: Path) -> None:
    (folder / "pack_offsets.npy").unlink()


def change_the_summary(folder: Path) -> None:
    text = (folder / "table.json").read_text()
    (folder / "table.json").write_text(text.replace('"rows": 8', '"rows": 9'))


def write_no_json(folder: Path) -> None:
    (folder / "table.json").write_text("{")


@pytest.mark.parametrize(
    "damage", [damage_one_byte, cut_off, empty, lose_a_file, change_the_summary, write_no_json]
)  # fmt: skip
def test_a_damaged_folder_is_made_anew(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, tokenised: list[int], damage: Any
) -> None:
    source(tmp_path)
    whole, _ = prepare_data(config(tmp_path), tokenizer, 0)
    fingerprint = whole.fingerprint
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    damage(folder)
    mended, _ = prepare_data(config(tmp_path), tokenizer, 0)
    assert tokenised == [8, 8]
    assert (mended.fingerprint, mended.summary.rows) == (fingerprint, 8)
    prepare_data(config(tmp_path), tokenizer, 0)
    assert tokenised == [8, 8]


def test_a_failed_tokenisation_leaves_nothing_behind(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source(tmp_path)
    with pytest.raises(UserError, match=r"raise it, or set data\.too_long"):
        prepare_data(config(tmp_path, max_length=4, too_long="error"), tokenizer, 0)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_names_the_mend(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source(tmp_path)
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        prepare_data(config(tmp_path), tokenizer, 0)


CHILD = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
from qlora_dist.config.schema import DataConfig
from qlora_dist.data import tokens
folder, model = Path(sys.argv[1]), sys.argv[2]
encode = tokens.encode_conversations
def slow(*args):
    with (folder / "log").open("a") as log:
        log.write("tokenised\\n")
    time.sleep(2)
    return encode(*args)
tokens.encode_conversations = slow
tokenizer = AutoTokenizer.from_pretrained(model)
(folder / f"ready{sys.argv[3]}").touch()
while len(list(folder.glob("ready*"))) < 3:
    time.sleep(0.01)
config = DataConfig(train=str(folder / "rows.jsonl"), cache_dir=folder / "cache", packing=True)
print(tokens.prepare_data(config, tokenizer, 0)[0].fingerprint)
"""


def test_ranks_that_start_together_tokenise_once(tmp_path: Path, tiny_model: Path) -> None:
    source(tmp_path)
    ranks = [
        subprocess.Popen([sys.executable, "-c", CHILD, tmp_path, tiny_model, str(rank)], stdout=subprocess.PIPE)
        for rank in range(3)
    ]
    fingerprints = {rank.communicate(timeout=120)[0] for rank in ranks}
    assert len(fingerprints) == 1
    assert len(fingerprints.pop().strip()) == 64
    assert (tmp_path / "log").read_text() == "tokenised\n"


def test_processes_make_the_table_of_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_rows(str(source(tmp_path, 20)))
    alone = build_table(rows, tokenizer, config(tmp_path))
    monkeypatch.setattr(tokens, "CHUNK_ROWS", 6)
    assert same(build_table(rows, tokenizer, config(tmp_path, num_proc=2)), alone)
    rows[13].data["answer"] = ""
    with pytest.raises(BadRow, match=r"^\S*rows\.jsonl:14: `answer` is empty; fill it in") as caught:
        build_table(rows, tokenizer, config(tmp_path, num_proc=2))
    assert (caught.value.code, caught.value.reason) == ("answer-empty", "empty answer")
