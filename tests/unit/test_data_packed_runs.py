"""Packing and the cache at work: how full packs of real data are, how long many rows take, and a whole packed run."""

import json
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_dist.checkpoint.manifest import list_checkpoints
from qlora_dist.config.schema import DataConfig
from qlora_dist.data.sources import read_rows
from qlora_dist.data.tokens import build_table, prepare_data
from tests.distributed.group import series
from tests.single import small_config, train_here
from tests.tiny import CHAT_TEMPLATE, CORPUS

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"


def byte_level_bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"needs {GSM8K.parent.name} in shared/data beside the repository")
def test_packs_of_gsm8k_are_98_percent_full(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    tokenizer = byte_level_bpe([line["question"] + line["answer"] for line in lines[:1000]], 4000)
    config = DataConfig(train=str(GSM8K), max_length=2048, packing=True, cache_dir=tmp_path)
    table, _ = prepare_data(config, tokenizer, 0)
    summary = table.summary
    assert (summary.rows, summary.documents) == (7473, 7473)
    assert summary.packing_efficiency == sum(table.pack_tokens) / (table.num_packs * 2048) >= 0.98
    assert table.pack_tokens.max() <= 2048
    assert sum(table.pack_loss_tokens) == summary.loss_tokens


@pytest.mark.slow
def test_a_hundred_thousand_rows_in_a_minute_and_not_twice(tiny_model: Path, tmp_path: Path) -> None:
    """Some 75 tokens a row, as in short instructions."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    words = CORPUS[2].split()
    with (tmp_path / "rows.jsonl").open("w") as file:
        for n in range(100_000):
            text = [" ".join(words[(n * k + j) % len(words)] for j in range(4 + n % (7 * k))) for k in (1, 3)]
            file.write(json.dumps({"question": f"{n}: {text[0]}", "answer": text[1]}) + "\n")
    config = DataConfig(train=str(tmp_path / "rows.jsonl"), packing=True, cache_dir=tmp_path / "cache")
    started = time.monotonic()
    table, _ = prepare_data(config, tokenizer, 0)
    first = time.monotonic() - started
    started = time.monotonic()
    again, _ = prepare_data(config, tokenizer, 0)
    second = time.monotonic() - started
    print(f"{table.summary.tokens:,} tokens: {first:.1f} s, then {second:.2f} s")
    assert table.summary.documents == 100_000
    assert table.summary.packing_efficiency > 0.98
    assert again.fingerprint == table.fingerprint
    assert first < 60
    assert second < 5


def test_a_packed_run_trains_resumes_exactly_and_samples_documents(tiny_model: Path, tmp_path: Path) -> None:
    sections = {
        "data": {"packing": True, "max_length": 256, "eval": "bundled:home_commands", "max_eval_rows": 6},
        "eval": {"sample_prompts": 3, "sample_max_new_tokens": 4},
    }
    outcome = train_here(small_config(tmp_path / "run", tiny_model, **sections))
    assert outcome["state"] == "finished"
    assert len({sample["prompt"] for sample in outcome["summary"]["samples"]}) == 3
    assert "packs (" in (tmp_path / "run" / "events.jsonl").read_text()
    from_step_2 = next(c.path for c in list_checkpoints(tmp_path / "run") if c.step == 2)
    later = small_config(tmp_path / "later", tiny_model, run={"resume": str(from_step_2)}, **sections)
    assert train_here(later)["state"] == "finished"
    whole, rest = (series(folder, "loss") for folder in (tmp_path / "run", tmp_path / "later"))
    assert rest == {step: loss for step, loss in whole.items() if step > 2}
    assert len(rest) == 4
    other = sections | {"data": sections["data"] | {"packing": False}}
    refused = train_here(small_config(tmp_path / "run", tiny_model, train={"max_steps": 8}, **other))
    assert refused["exit_code"] == 2
    assert "different data.packing (to 256 tokens instead of off)" in refused["message"]


def test_held_out_rows_are_never_packed(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = DataConfig(train="bundled:home_commands", packing=True)
    rows = read_rows("bundled:home_commands", 6, split="eval")
    assert build_table(rows, tokenizer, config, split="eval").num_packs == 6
    assert build_table(rows, tokenizer, config).num_packs == 1
