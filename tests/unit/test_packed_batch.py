"""Packed documents train what they train alone: losses and gradients against stock transformers and PEFT.

The base is NF4, everything else fp32, and both models stay in training mode (in evaluation bitsandbytes computes in
bf16 on CPUs that have it). Sums are taken in other orders, which moves a loss or a gradient by about 1e-7 of its
largest value; 1e-5 leaves room for that and is far below what one attended neighbour does.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from qlora_dist.config.errors import UserError
from qlora_dist.data.collate import MicroBatch, collate, loss_tokens, num_tokens
from qlora_dist.data.packing import Packs
from qlora_dist.data.table import TokenTable
from qlora_dist.train.boundaries import check_document_boundaries
from qlora_dist.train.evaluate import answer_prompts, held_out_loss
from qlora_dist.train.step import loss_sum

# Of two, a length of one token, and equal lengths side by side.
LENGTHS = [9, 17, 1, 30, 5, 5, 12]
PACKS = [[0, 3], [1, 2, 4], [5, 6]]


def make_table(packed: bool = True) -> TokenTable:
    draw = np.random.default_rng(1)
    ids = draw.integers(3, 300, sum(LENGTHS)).astype(np.int32)
    mask = draw.random(len(ids)) < 0.6
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
    # In a pack, what precedes a document is another's last token; this must not become its prediction.
    mask[offsets[:-1]] = False
    mask[offsets[1:][np.array(LENGTHS) > 1] - 1] = True
    order = np.array([document for pack in PACKS for document in pack])
    packs = Packs(order, np.concatenate([[0], np.cumsum([len(pack) for pack in PACKS])])) if packed else None
    return TokenTable(ids, mask, offsets, None, tuple(f"prompt {d}" for d in range(len(LENGTHS))), packs)  # type: ignore[arg-type]


def adapted(folder: Path, attention: str) -> Any:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"},
        attn_implementation=attention,
    )  # fmt: skip
    return with_adapter(base)


def with_adapter(base: Any) -> Any:
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def alone(model: Any, table: TokenTable) -> tuple[float, dict[str, torch.Tensor]]:
    """Each document by itself, by transformers' own label shift: nothing packed, padded, or indexed."""
    total = 0.0
    for document in range(table.num_documents):
        ids, mask = table.document(document)
        if not mask.any():
            continue
        ids_1T = torch.from_numpy(ids.astype(np.int64))[None]
        labels_1T = torch.where(torch.from_numpy(mask.copy()), ids_1T, -100)
        loss = model(input_ids=ids_1T, labels=labels_1T).loss * int(mask.sum())
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def packed(
    model: Any, batches: list[MicroBatch], change: Callable[[MicroBatch], MicroBatch] = lambda batch: batch
) -> tuple[float, dict[str, torch.Tensor]]:
    total = 0.0
    for batch in batches:
        loss = loss_sum(model, change(batch))
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def worst(ours: tuple[float, dict[str, torch.Tensor]], theirs: tuple[float, dict[str, torch.Tensor]]) -> float:
    """The largest difference, of the loss over the loss, of a gradient over that tensor's largest value."""
    assert ours[1].keys() == theirs[1].keys()
    assert len(ours[1]) >= 8
    assert min(gradient.abs().max() for gradient in theirs[1].values()) > 0
    of_gradients = [((ours[1][n] - g).abs().max() / g.abs().max()).item() for n, g in theirs[1].items()]
    return max(abs(ours[0] - theirs[0]) / theirs[0], *of_gradients)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batches", [[[0], [1], [2]], [[0, 1, 2]], [[2, 0], [1]]])
def test_a_packed_batch_has_the_loss_and_gradients_of_its_documents(
    tiny_model: Path, attention: str, batches: list[list[int]]
) -> None:
    model, table = adapted(tiny_model, attention), make_table()
    found = packed(model, [collate(table, batch, 0) for batch in batches])
    assert worst(found, alone(model, table)) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_the_borders_the_comparison_fails(tiny_model: Path, attention: str) -> None:
    model, table = adapted(tiny_model, attention), make_table()
    batches = [collate(table, [0, 1, 2], 0)]
    one_document = packed(model, batches, lambda batch: replace(batch, packed=False))
    assert worst(one_document, alone(model, table)) > 0.05


def test_gradient_checkpointing_keeps_the_borders(tiny_model: Path) -> None:
    model, table = adapted(tiny_model, "sdpa"), make_table()
    reference = alone(model, table)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert worst(packed(model, [collate(table, [0, 1, 2], 0)]), reference) < 1e-5


def test_learned_positions_begin_anew() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=300, n_positions=64, attn_pdrop=0, embd_pdrop=0,
        resid_pdrop=0)  # fmt: skip
    model, table = with_adapter(GPT2LMHeadModel(config)), make_table()
    batch = collate(table, [0, 1, 2], 0)
    assert worst(packed(model, [batch]), alone(model, table)) < 1e-5
    # Kept apart, but numbered on: rotary positions would not notice, these do.
    numbered_on = torch.where(batch.position_ids_BT == 0, 0, batch.position_ids_BT + 1)
    assert worst(packed(model, [replace(batch, position_ids_BT=numbered_on)]), alone(model, table)) > 1e-2


def test_a_sliding_window_slides_within_a_document() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=6, head_dim=16,
    )  # fmt: skip
    model, table = with_adapter(MistralForCausalLM(config)), make_table()
    assert worst(packed(model, [collate(table, [0, 1, 2], 0)]), alone(model, table)) < 1e-5


def varlen_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """What flash attention's varlen function computes on [tokens, heads, head_dim], one sequence at a time."""
    assert options["causal"]
    assert q.ndim == 3
    borders = options["cu_seqlens_q"].tolist()
    assert borders == options["cu_seqlens_k"].tolist()
    assert borders[-1] == len(q)
    assert options["max_seqlen_q"] == max(np.diff(borders))
    out = []
    for start, end in pairwise(borders):
        one = (t[start:end].transpose(0, 1)[None] for t in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(
            *one, is_causal=True, scale=options.get("softmax_scale"), enable_gqa=True
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


def test_flash_attention_is_given_the_borders(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention needs a GPU; here its varlen function is replaced by its definition."""
    from transformers import modeling_flash_attention_utils as flash

    calls = []

    def varlen(q, k, v, **options):
        calls.append(options["cu_seqlens_q"].dtype)
        return varlen_attention(q, k, v, **options)

    def keep(**options: Any) -> dict[str, Any]:
        kept = {"causal": options["is_causal"], "softmax_scale": options.get("softmax_scale")}
        return kept | {f"max_seqlen_{x}": options[f"max_seqlen_{x}"] for x in "qk" if f"max_seqlen_{x}" in options}

    model, table = adapted(tiny_model, "sdpa"), make_table()
    reference = alone(model, table)
    batches = [collate(table, packs, 0, flat=True) for packs in ([0, 1], [2])]
    assert [tuple(batch.input_ids_BT.shape) for batch in batches] == [(1, 62), (1, 17)]
    model.get_base_model().config._attn_implementation = "flash_attention_2"
    functions = (None, varlen, None, None, None)
    # Releases differ in whether one for paged caches stands beside it.
    keeps = (keep, None) if hasattr(flash, "_process_with_kvcache_kwargs_fn") else keep
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: (functions, keeps))

    assert worst(packed(model, batches), reference) < 1e-5
    assert calls == [torch.int32] * 4


def test_packed_micro_batch_by_hand() -> None:
    ids = np.array([5, 6, 7, 8, 9, 1, 2, 3, 4], dtype=np.int32)
    mask = np.array([0, 0, 1, 0, 1, 0, 1, 0, 1], dtype=bool)
    table = TokenTable(ids, mask, np.array([0, 3, 5, 9]), None, (), Packs(np.array([0, 2, 1]), np.array([0, 2, 3])))  # type: ignore[arg-type]
    batch = collate(table, [0, 1], pad_token_id=99)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 1, 2, 3, 4], [8, 9, 99, 99, 99, 99, 99]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]
    assert batch.attention_mask_BT.sum(1).tolist() == [7, 2]
    assert (batch.predict_index_N.tolist(), batch.target_N.tolist()) == ([1, 3, 5, 7], [7, 2, 4, 9])
    assert (batch.num_tokens, batch.num_loss_tokens, batch.packed, batch.longest_document) == (9, 4, True, 4)
    assert table.pack_tokens.tolist() == [7, 2]
    assert table.pack_loss_tokens.tolist() == [3, 1]
    assert (num_tokens(table, [1]), loss_tokens(table, [1, 0])) == (2, 4)
    assert not collate(table, [1], 99).packed
    flat = collate(table, [1, 0], 99, flat=True)
    assert flat.input_ids_BT.tolist() == [[8, 9, 5, 6, 7, 1, 2, 3, 4]]
    assert flat.position_ids_BT.tolist() == [[0, 1, 0, 1, 2, 0, 1, 2, 3]]
    assert flat.cu_seqlens_D1 is not None
    assert flat.cu_seqlens_D1.tolist() == [0, 2, 5, 9]
    assert flat.target_N.tolist() == [9, 7, 2, 4]
    assert flat.to("cpu").packed


def test_held_out_loss_of_packs_is_that_of_the_documents(tiny_model: Path) -> None:
    model = adapted(tiny_model, "sdpa")
    # evaluate() switches to evaluation, where bitsandbytes may compute in bf16; this holds it back.
    model.eval = model.train
    losses = [
        held_out_loss(model, make_table(packed=by_pack), 2, 0, 1, 0, torch.float32, torch.device("cpu"))
        for by_pack in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_prompts_are_those_of_documents_whatever_the_packs(tiny_model: Path) -> None:
    model, tokenizer = adapted(tiny_model, "sdpa"), AutoTokenizer.from_pretrained(tiny_model)
    by_pack, by_document = (
        answer_prompts(model, tokenizer, make_table(packed), [0, 3, 6], 4, torch.float32, torch.device("cpu"))
        for packed in (True, False)
    )
    assert by_pack == by_document
    assert [answer["prompt"] for answer in by_pack] == ["prompt 0", "prompt 3", "prompt 6"]


def test_a_model_that_lets_documents_see_each_other_is_refused(tiny_model: Path) -> None:
    model = adapted(tiny_model, "sdpa")
    state = torch.random.get_rng_state()
    check_document_boundaries(model, False, torch.float32, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), state)
    forward = model.get_base_model().forward

    def blind(position_ids=None, **inputs):
        return forward(**inputs)

    model.get_base_model().forward = blind
    with pytest.raises(UserError, match=r"LlamaForCausalLM lets the documents .* data\.packing=false"):
        check_document_boundaries(model, False, torch.float32, torch.device("cpu"))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UserError, match=r"MambaForCausalLM .*set data\.packing=false"):
        check_document_boundaries(mamba, False, torch.float32, torch.device("cpu"))
