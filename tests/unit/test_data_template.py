"""Which tokens bear loss, counted by hand on the tiny tokenizer and against other templates' habits."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_dist.config.errors import UserError
from qlora_dist.data.formats import Conversation, to_conversation
from qlora_dist.data.rows import Row
from qlora_dist.data.template import assistant_span, encode_conversations

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# As Qwen3 does: an empty thinking block in the last turn only, and none in the generation prompt.
THINKING_IN_LAST_TURN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}" + CHATML_PROMPT
)
GENERATION_BLOCKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
BLANK_LINE_CLOSES = (
    "{% for m in messages %}{{ 'Q: ' if m['role'] == 'user' else 'A: ' }}{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def chat(*contents: str, system: str | None = None) -> Conversation:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return to_conversation(Row({"messages": messages}, "x.jsonl", 7), "messages")


def prompt_completion(prompt: object, completion: object) -> Conversation:
    return to_conversation(Row({"prompt": prompt, "completion": completion}, "x.jsonl", 7), "prompt_completion")


def runs(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, **options: bool) -> list[str]:
    """The text of each run of consecutive loss-bearing tokens."""
    [(ids, mask)] = encode_conversations([conversation], tokenizer, **options)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return [tokenizer.decode(ids[start:end]) for start, end in edges.reshape(-1, 2)]


def test_one_exchange_token_by_token(tokenizer: PreTrainedTokenizerBase) -> None:
    [(ids, mask)] = encode_conversations([chat("hq", "qz")], tokenizer)
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    # No merge of the tiny corpus touches "qz".
    assert tokens[-5:] == ["Ċ", "q", "z", "<|im_end|>", "Ċ"]
    assert mask.tolist() == [False] * (len(tokens) - 4) + [True, True, True, False]
    assert ids.tolist() == tokenizer.apply_chat_template(chat("hq", "qz").messages, return_dict=False)


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (chat("hi", "yo"), ["yo<|im_end|>"]),
        (chat("hi", "yo", system="be brief"), ["yo<|im_end|>"]),
        (chat("a", "b", "c", "d", system="s"), ["b<|im_end|>", "d<|im_end|>"]),
        (chat("a", "b", "c"), ["b<|im_end|>"]),
        (chat("same", "same", "same", "same"), ["same<|im_end|>", "same<|im_end|>"]),
        (chat("🙂", "🙂é", "é🙂", "\n👩‍👩‍👧\n"), ["🙂é<|im_end|>", "\n👩‍👩‍👧\n<|im_end|>"]),
        (chat("a", "end", "b", "im_end|"), ["end<|im_end|>", "im_end|<|im_end|>"]),
        (chat("assistant\n", "assistant\n"), ["assistant\n<|im_end|>"]),
        (chat("e\u0301", " \u0301e "), [" \u0301e <|im_end|>"]),
    ],
)
def test_loss_on_every_answer_and_the_mark_that_closes_it(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, expected: list[str]
) -> None:
    assert runs(tokenizer, conversation) == expected


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip()) and "<|" not in text
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), system=st.none() | TEXT)
@pytest.mark.parametrize("template", [CHATML + CHATML_PROMPT, GENERATION_BLOCKS])
def test_any_text_bears_loss_exactly_where_the_assistant_wrote_it(
    tokenizer: PreTrainedTokenizerBase, template: str, turns: list[tuple[str, str]], system: str | None
) -> None:
    tokenizer.chat_template = template
    conversation = chat(*[text for turn in turns for text in turn], system=system)
    assert runs(tokenizer, conversation) == [f"{answer}<|im_end|>" for _, answer in turns]


def test_all_tokens_bear_loss_but_the_first(tokenizer: PreTrainedTokenizerBase) -> None:
    [(_, mask)] = encode_conversations([chat("hi", "yo")], tokenizer, assistant_only_loss=False)
    assert mask.tolist() == [False] + [True] * (len(mask) - 1)


def test_assistant_messages_of_a_prompt_bear_no_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = chat("a", "b", "c", "d").messages
    for template in (CHATML + CHATML_PROMPT, GENERATION_BLOCKS):
        tokenizer.chat_template = template
        assert runs(tokenizer, prompt_completion(messages[:3], messages[3:])) == ["d<|im_end|>"]


def test_a_turn_that_later_turns_change_is_found(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = THINKING_IN_LAST_TURN
    # "think" is in the block's own tags too.
    expected = ["think<|im_end|>", "<think>\n\n</think>\n\nthink<|im_end|>"]
    assert runs(tokenizer, chat("a", "think", "c", "think")) == expected


@pytest.mark.parametrize(
    ("whole", "closed", "content", "learnt"),
    [
        ("A:yes<E>\n", "A:yes<E>\n", "yes", "yes<E>"),
        # Once others follow, the turn gains a block whose tags hold the content too.
        ("A:<yes></yes>yes<E>\nQ:x<E>\n", "A:yes<E>\n", "yes", "<yes></yes>yes<E>"),
        # Once others follow, the turn loses a part of its content, which a later turn quotes.
        ("A:yes<E>\nQ:<t>yes<E>\n", "A:<t>yes<E>\n", "<t>yes", None),
        # The template rewrites the content, but nothing else tells the whole from the turn.
        ("A:YES<E>\n", "A:YES<E>\n", "yes", "YES<E>"),
        ("A:YES<E>\nQ:x", "A:Yes<E>\n", "yes", None),
        ("A:", "A:", "yes", None),
        ("B:yes<E>", "B:yes<E>", "yes", None),
    ],
)
def test_the_span_of_one_turn(whole: str, closed: str, content: str, learnt: str | None) -> None:
    span = assistant_span(whole, "A:", closed, content)
    assert (span and whole[slice(*span)]) == learnt


def test_a_blank_line_that_closes_a_turn_is_learnt_and_a_straddling_token_too(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = BLANK_LINE_CLOSES
    [(ids, _)] = encode_conversations([chat("b", "the")], tokenizer)
    # The border is inside this token: "A: " ends in its space.
    assert "Ġthe" in tokenizer.convert_ids_to_tokens(ids.tolist())
    assert runs(tokenizer, chat("b", "the", "d", "e")) == [" the\n\n", "e\n\n"]


def test_bos_of_the_template_is_not_doubled(tokenizer: PreTrainedTokenizerBase) -> None:
    with_bos(tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + CHATML + CHATML_PROMPT
    [(ids, _)] = encode_conversations([chat("hi", "yo")], tokenizer)
    assert ids.tolist().count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


def test_strings_without_a_template_are_concatenated(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    [(ids, mask)] = encode_conversations([prompt_completion("hi ", "the 🙂")], tokenizer)
    assert tokenizer.decode(ids) == "hi the 🙂<|im_end|>"
    assert tokenizer.decode(ids[mask]) == " the 🙂<|im_end|>"

    with_bos(tokenizer)
    for prompt in ("hi ", "<|endoftext|>hi "):
        [(ids, mask)] = encode_conversations([prompt_completion(prompt, "yo<|im_end|>")], tokenizer)
        assert tokenizer.decode(ids) == "<|endoftext|>hi yo<|im_end|>"
        assert tokenizer.decode(ids[mask]) == "yo<|im_end|>"


def with_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer put `<|endoftext|>` before plain text, as Llama's does with its bos."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<|endoftext|>"
    special = [("<|endoftext|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=special)
    assert tokenizer("hi")["input_ids"][0] == tokenizer.bos_token_id


def test_strings_on_a_chat_model_go_through_its_template(tokenizer: PreTrainedTokenizerBase) -> None:
    assert runs(tokenizer, prompt_completion("hi", "yo")) == ["yo<|im_end|>"]


def test_the_date_of_the_day_stays_out(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + CHATML + CHATML_PROMPT
    [(ids, _)] = encode_conversations([chat("hi", "yo")], tokenizer)
    assert tokenizer.decode(ids).startswith("26 Jul 2024 <|im_start|>")


def test_no_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(
        UserError, match=r"model.name: the tokenizer of .* has no chat template, .* x.jsonl:7 needs; use"
    ):
        encode_conversations([prompt_completion("a", "b"), chat("hi", "yo")], tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        # The generation prompt is not how an assistant turn begins.
        CHATML + "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
        # Something of the whole conversation stands before its first message.
        "{{ messages | length }}" + CHATML + CHATML_PROMPT,
        # The assistant's turns are left out.
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
        # Blocks that are marked but never reached.
        CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}",
    ],
)
def test_a_template_without_a_findable_assistant(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"^x.jsonl:7: the assistant's part .*; set data.assistant_only_loss=false"):
        encode_conversations([chat("hi", "yo")], tokenizer)
    [(_, mask)] = encode_conversations([chat("hi", "yo")], tokenizer, assistant_only_loss=False)
    assert mask[1:].all()


def test_a_template_that_refuses_the_messages(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"^x.jsonl:7: the chat template of .* refuses .*\(roles must alternate\)"):
        encode_conversations([chat("hi", "yo")], tokenizer)
