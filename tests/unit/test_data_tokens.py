"""The token table, held-out rows and micro-batch tensors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import DataConfig
from qlora_dist.data.collate import collate, loss_tokens, num_tokens
from qlora_dist.data.rows import Row
from qlora_dist.data.tokens import TokenSummary, TokenTable, build_table, prepare_data, split_rows


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def rows_of(*answers: str) -> list[Row]:
    return [Row({"question": "q", "answer": a}, "x.jsonl", i) for i, a in enumerate(answers, start=1)]


def source(folder: Path, count: int, name: str = "x") -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": f"{name}{i}"}) + "\n" for i in range(count)))
    return str(path)


def texts(table: TokenTable, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The loss-bearing text of each pack."""
    packs = [table.pack(index) for index in range(table.num_packs)]
    return [tokenizer.decode(ids[mask]).removesuffix("<|im_end|>") for ids, mask in packs]


def prompt_length(tokenizer: PreTrainedTokenizerBase) -> int:
    prompt = [{"role": "user", "content": "q"}]
    return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


def test_table_and_summary_by_hand(tokenizer: PreTrainedTokenizerBase) -> None:
    table = build_table(rows_of("z", "zqz"), tokenizer, DataConfig(train="x"))
    prompt = prompt_length(tokenizer)
    # An answer of n tokens bears n + 1 with <|im_end|>; the newline after it is one token more.
    lengths = [prompt + 3, prompt + 5]
    assert table.offsets.tolist() == [0, lengths[0], sum(lengths)]
    assert (table.input_ids.dtype, table.loss_mask.dtype, table.offsets.dtype) == (np.int32, bool, np.int64)
    assert table.pack_tokens.tolist() == lengths
    assert table.pack_loss_tokens.tolist() == [2, 4]
    assert texts(table, tokenizer) == ["z", "zqz"]
    assert table.summary == TokenSummary(
        rows=2,
        documents=2,
        truncated=0,
        dropped={"too_long": 0, "no_loss": 0},
        tokens=sum(lengths),
        loss_tokens=6,
        longest=lengths[1],
        packs=2,
        packing_efficiency=sum(lengths) / (2 * 2048),
    )
    with pytest.raises(IndexError):
        table.pack(-1)


def test_truncation_keeps_what_fits_and_drops_what_has_nothing_to_learn(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [*rows_of("z", "zqz"), Row({"question": "q" * 50, "answer": "z"}, "x.jsonl", 3)]
    config = DataConfig(train="x", max_length=prompt_length(tokenizer) + 2)
    table = build_table(rows, tokenizer, config)
    assert texts(table, tokenizer) == ["z", "zq"]
    assert table.pack_tokens.tolist() == [config.max_length] * 2
    assert table.summary.truncated == 2
    assert table.summary.dropped == {"too_long": 0, "no_loss": 1}
    assert (table.summary.rows, table.summary.documents, table.summary.loss_tokens) == (3, 2, 4)


def test_too_long_rows_can_be_dropped_or_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    limit = prompt_length(tokenizer) + 3
    dropping = build_table(rows_of("z", "zqz"), tokenizer, DataConfig(train="x", max_length=limit, too_long="drop"))
    assert texts(dropping, tokenizer) == ["z"]
    assert dropping.summary.dropped == {"too_long": 1, "no_loss": 0}
    with pytest.raises(UserError, match=rf"^x.jsonl:2 has {limit + 2} tokens, data.max_length is {limit}; raise it"):
        build_table(rows_of("z", "zqz"), tokenizer, DataConfig(train="x", max_length=limit, too_long="error"))
    with pytest.raises(UserError, match=r"data.train: no row is left of 2, .*; raise data.max_length"):
        build_table(rows_of("z", "zqz"), tokenizer, DataConfig(train="x", max_length=3))


def test_prompts_are_those_of_the_first_documents_kept(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    rows = [
        Row({"prompt": "p" * 500, "completion": "too long"}, "x.jsonl", 1),
        Row({"prompt": "p", "completion": "q"}, "x.jsonl", 2),
        Row({"prompt": turns, "completion": turns[1:2]}, "x.jsonl", 3),
    ]
    assert build_table(rows, tokenizer, DataConfig(train="x", max_length=100)).prompts == ("p", "c")


def test_a_malformed_row_behind_the_first_names_its_line(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [*rows_of("z", "q"), Row({"question": "q"}, "x.jsonl", 3)]
    with pytest.raises(UserError, match=r"^x.jsonl:3 lacks the key `answer`"):
        build_table(rows, tokenizer, DataConfig(train="x"))


def test_a_table_of_several_chunks_is_the_table_of_one(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(*[f"answer {i}" for i in range(7)])
    whole = build_table(rows, tokenizer, DataConfig(train="x"))
    monkeypatch.setattr("qlora_dist.data.tokens.CHUNK_ROWS", 3)
    assert build_table(rows, tokenizer, DataConfig(train="x")).fingerprint == whole.fingerprint


def test_the_fingerprint_sees_tokens_mask_and_borders(tokenizer: PreTrainedTokenizerBase) -> None:
    def fingerprint(*answers: str, **options: bool) -> str:
        return build_table(rows_of(*answers), tokenizer, DataConfig(train="x", **options)).fingerprint

    base = fingerprint("z", "zqz")
    assert len(base) == 64
    assert fingerprint("z", "zqz") == base
    others = {fingerprint("zqz", "z"), fingerprint("z", "zzz"), fingerprint("z", "zqz", assistant_only_loss=False)}
    assert len(others | {base}) == 4
    ids, mask = np.arange(4, dtype=np.int32), np.array([False, True, False, True])
    tables = [TokenTable(ids, mask, np.array(borders), None) for borders in ([0, 2, 4], [0, 3, 4])]
    assert tables[0].fingerprint != tables[1].fingerprint


def test_held_out_rows_by_share_number_and_cap(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train_file = source(tmp_path, 20)
    everything = {f"x{i}" for i in range(20)}

    def answers(seed: int = 1, **options: float) -> tuple[list[str], list[str]]:
        train, held_out = prepare_data(DataConfig(train=train_file, **options), tokenizer, seed)
        assert held_out is not None
        return texts(train, tokenizer), texts(held_out, tokenizer)

    for options, count in (({"eval_split": 0.25}, 5), ({"eval_split": 3}, 3), ({"eval_split": 0.001}, 1)):
        train, held_out = answers(**options)
        assert len(held_out) == count
        assert set(train) | set(held_out) == everything
        assert not set(train) & set(held_out)
        assert answers(**options) == (train, held_out)
    assert len({tuple(answers(seed, eval_split=0.25)[1]) for seed in range(5)}) == 5
    train, held_out = answers(eval_split=0.5, max_eval_rows=4)
    assert (len(train), len(held_out)) == (16, 4)
    train, held_out = answers(eval_split=0.5, max_rows=6)
    assert sorted(train + held_out) == [f"x{i}" for i in range(6)]


def test_no_held_out_rows_unless_asked_for(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    train, held_out = prepare_data(DataConfig(train=source(tmp_path, 3)), tokenizer, 0)
    assert (train.num_packs, held_out) == (3, None)


def test_an_eval_file_of_its_own(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = DataConfig(train=source(tmp_path, 3), eval=source(tmp_path, 5, "y"), max_rows=2, max_eval_rows=4)
    train, held_out = prepare_data(config, tokenizer, 0)
    assert texts(train, tokenizer) == ["x0", "x1"]
    assert held_out is not None
    assert texts(held_out, tokenizer) == ["y0", "y1", "y2", "y3"]


def test_a_held_out_part_that_cannot_be(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"eval_split=1.5 is neither a share below 1 nor a whole number"):
        split_rows(rows_of("a", "b"), 1.5, 0)
    with pytest.raises(UserError, match=r"eval_split=2.* holds out 2 of 2 rows and leaves none to train on"):
        split_rows(rows_of("a", "b"), 2, 0)
    both = DataConfig(train=source(tmp_path, 3), eval=source(tmp_path, 3))
    # The configuration may refuse this itself; whoever comes here without it gets the same answer.
    object.__setattr__(both, "eval_split", 0.5)
    with pytest.raises(UserError, match=r"data.eval and data.eval_split are both set"):
        prepare_data(both, tokenizer, 0)


def small_table() -> TokenTable:
    documents = [([5, 6, 7], [0, 0, 1]), ([8, 9], [0, 1]), ([1, 2, 3, 4], [0, 1, 0, 1])]
    ids = np.array([i for document, _ in documents for i in document], dtype=np.int32)
    mask = np.array([m for _, masks in documents for m in masks], dtype=bool)
    return TokenTable(ids, mask, np.array([0, 3, 5, 9]), None)


def test_micro_batch_by_hand() -> None:
    batch = collate(small_table(), [2, 1], pad_token_id=99)
    assert batch.packs == (2, 1)
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4], [8, 9, 99, 99]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.predict_index_N.tolist() == [0, 2, 4]
    assert batch.target_N.tolist() == [2, 4, 9]
    assert (batch.num_tokens, batch.num_loss_tokens) == (6, 3)
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert [tensor.dtype for tensor in tensors] == [torch.int64] * 7
    assert (batch.kept_K.tolist(), batch.kept_index_N.tolist()) == ([0, 2], [0, 1, 0])
    assert batch.to("cpu").num_loss_tokens == 3


def test_counts_need_no_collation() -> None:
    table = small_table()
    for packs in ([2, 1], [0], [0, 1, 2], []):
        batch = collate(table, packs, 0)
        assert (num_tokens(table, packs), loss_tokens(table, packs)) == (batch.num_tokens, batch.num_loss_tokens)
    assert (num_tokens(table, np.array([0, 2])), loss_tokens(table, np.array([0, 2]))) == (7, 3)


def test_loss_equals_transformers_on_the_same_documents(tiny_model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = rows_of("z", "the capital of France", "7 * 12 = 84 🙂")
    table = build_table(rows, tokenizer, DataConfig(train="x"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    batch = collate(table, [0, 1, 2], tokenizer.pad_token_id)
    with torch.no_grad():
        logits_BTV = model(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            position_ids=batch.position_ids_BT,
        ).logits
        logits_NV = logits_BTV.flatten(0, 1)[batch.predict_index_N]
        ours = torch.nn.functional.cross_entropy(logits_NV, batch.target_N, reduction="sum")
        # Each document by itself, by transformers' own label shift and mean: nothing padded, nothing indexed.
        theirs = 0.0
        for pack in range(3):
            ids, mask = table.pack(pack)
            ids_1T = torch.from_numpy(ids.astype(np.int64))[None]
            labels_1T = torch.where(torch.from_numpy(mask.copy()), ids_1T, -100)
            theirs += model(input_ids=ids_1T, labels=labels_1T).loss.double() * int(mask.sum())
    # transformers computes its loss in fp32, whatever the model's dtype.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_an_empty_micro_batch_runs_and_weighs_nothing(tiny_model: Path) -> None:
    batch = collate(small_table(), [], pad_token_id=0)
    assert (batch.packs, batch.num_tokens, batch.num_loss_tokens) == ((), 0, 0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    logits_BTV = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    logits_NV = logits_BTV.flatten(0, 1)[batch.predict_index_N]
    loss = torch.nn.functional.cross_entropy(logits_NV, batch.target_N, reduction="sum")
    loss.backward()
    assert loss.item() == 0
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
