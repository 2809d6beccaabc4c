"""The chat templates that ship: their text against the published formats written out by hand, and what they teach."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_dist.config.schema import DataConfig
from qlora_dist.data.chat_templates import load_chat_template, template_names
from qlora_dist.data.formats import to_conversation
from qlora_dist.data.rows import Row
from qlora_dist.data.template import encode_conversations
from qlora_dist.data.tokens import prepare_data

EOS, BOS = "<|im_end|>", "<|endoftext|>"
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
    {"role": "assistant", "content": "A2"},
]
PUBLISHED = {
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
    ),
    "llama-3": (
        f"{BOS}<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nU1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nU2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>"
    ),
    "llama-2": (
        f"{BOS}[INST] <<SYS>>\nS\n<</SYS>>\n\nU1 [/INST] A1 {EOS}{BOS}[INST] U2 [/INST] A2 {EOS}"
    ),
    "mistral": f"{BOS}[INST] S\n\nU1 [/INST] A1{EOS}[INST] U2 [/INST] A2{EOS}",
    "gemma": (
        f"{BOS}<start_of_turn>user\nS\n\nU1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nU2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n"
    ),
    "zephyr": f"<|system|>\nS{EOS}\n<|user|>\nU1{EOS}\n<|assistant|>\nA1{EOS}\n<|user|>\nU2{EOS}\n"
    f"<|assistant|>\nA2{EOS}\n",
    "phi-3": "<|system|>\nS<|end|>\n<|user|>\nU1<|end|>\n<|assistant|>\nA1<|end|>\n<|user|>\nU2<|end|>\n"
    "<|assistant|>\nA2<|end|>\n",
    "alpaca": (
        f"S\n\n### Instruction:\nU1\n\n### Response:\nA1{EOS}\n\n### Instruction:\nU2\n\n### Response:\nA2{EOS}\n\n"
    ),
    "vicuna": f"S USER: U1 ASSISTANT: A1{EOS}USER: U2 ASSISTANT: A2{EOS}",
}  # fmt: skip
# What closes an answer and must be learned, or the model would not stop.
MARKS = {"llama-3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi-3": "<|end|>", "chatml": "<|im_end|>"}


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.bos_token = BOS
    return tokenizer


def test_every_template_is_tested() -> None:
    assert template_names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_text_and_what_bears_loss(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = load_chat_template(name)
    [(ids, mask)] = encode_conversations([to_conversation(Row({"messages": CHAT}, "x", 1), "messages")], tokenizer)
    assert tokenizer.decode(ids) == PUBLISHED[name]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int))).reshape(-1, 2)
    mark = MARKS.get(name, EOS)
    learned = [tokenizer.decode(ids[start:end]) for start, end in edges]
    assert [text.strip().replace(" ", "") for text in learned] == [f"A1{mark}", f"A2{mark}"]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_tokenizer_without_special_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = load_chat_template(name)
    tokenizer.bos_token = tokenizer.eos_token = None
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    literal = {"chatml": EOS}.get(name)
    expected = PUBLISHED[name].replace(BOS, "")
    assert text == (expected if literal else expected.replace(EOS, ""))


def test_a_named_template_serves_a_tokenizer_that_has_none_and_replaces_another(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
                                         "{% if add_generation_prompt %}<assistant>{% endif %}")  # fmt: skip
    texts = {}
    for template in ("chatml", "alpaca", str(tmp_path / "mine.jinja")):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        if template == "chatml":
            tokenizer.chat_template = None
        table, _ = prepare_data(DataConfig(train=str(tmp_path / "x.jsonl"), chat_template=template), tokenizer, 0)
        texts[Path(template).name] = tokenizer.decode(table.input_ids)
    assert texts == {
        "chatml": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n",
        "alpaca": "### Instruction:\nq\n\n### Response:\na<|im_end|>\n\n",
        "mine.jinja": "<user>q</><assistant>a</>",
    }
