"""Chat messages -> token ids and a loss mask, with the tokenizer's own chat template.

The conversation is rendered and tokenised once, whole. Which characters the assistant wrote is found by rendering
what comes before each of its turns; the tokenizer's character offsets then say which tokens hold them. No prefix is
ever tokenised alone, because its tokens need not be those of the whole.

What bears loss with `assistant_only_loss`: from the end of the generation prompt to the end of the mark that closes
the turn (`<|im_end|>`), which the model must emit to stop. Whitespace that the template puts after the mark bears
none; where whitespace is all that closes a turn, it is the mark. A token that straddles a border bears loss, so that
every character of an answer is learnt. A template that marks the assistant's part itself with `{% generation %}` is
taken at its word.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_dist.config.errors import UserError
from qlora_dist.data.formats import Conversation, Message

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# The day that Llama 3's template falls back on.
TEMPLATE_DATE = datetime(2024, 7, 26)

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a document, the character spans that bear loss (None: all), and whether bos and eos are missing."""

    text: str
    spans: list[Span] | None
    add_bos_eos: bool = False


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    assistant_only_loss: bool = True,
    skip_refused: bool = False,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids (int32 [T]) and loss mask (bool [T]) of each conversation.

    `loss_mask[t]` says whether predicting token t, from those before it, bears loss; so `loss_mask[0]` is False.
    Special tokens are the template's: none is added to a rendered chat, so a bos in the template is not doubled.
    Prompt/completion strings on a tokenizer without a chat template are concatenated, with eos after them and bos
    before them where the tokenizer puts one; so is plain text, all of which bears loss. With `skip_refused` a row that
    the template refuses gives no tokens.

    Raises:
        UserError: there is no chat template, it refuses the messages, or the assistant's part cannot be found in it.
    """
    template = _chat_template(conversations, tokenizer)
    rendered = [
        _render(conversation, tokenizer, template, assistant_only_loss, skip_refused) for conversation in conversations
    ]
    return _encode(rendered, tokenizer)


def assistant_span(whole: str, prompt: str, closed: str, content: str) -> Span | None:
    """Where in `whole` one assistant turn bears loss; None where it cannot be told.

    Args:
        whole: the rendered conversation.
        prompt: the messages before the turn, rendered with the generation prompt.
        closed: the messages up to and including the turn, rendered.
        content: what the assistant says in it.
    """
    if not (whole.startswith(prompt) and closed.startswith(prompt)):
        return None
    content, turn = content.strip(), closed[len(prompt) :]
    # A template may rewrite a content (thinking, say); what follows it then cannot be told from it.
    ending = turn[turn.rfind(content) + len(content) :] if content in turn else turn
    mark = ending.rstrip() or ending
    if not turn.strip():
        return None
    if whole.startswith(closed):
        return len(prompt), len(closed) - len(ending) + len(mark)
    # A template may also render a turn differently once others follow it (Qwen3 takes the thinking out).
    found = whole.find(content, len(prompt))
    # Past a mark that closes a turn it would be the content of a later one.
    while found >= 0 and content in turn and mark not in whole[len(prompt) : found]:
        end = found + len(content)
        if ending and whole.startswith(ending, end):
            return len(prompt), end + len(mark)
        found = whole.find(content, found + 1)
    return None


def _chat_template(conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase) -> str | None:
    if tokenizer.chat_template is not None:
        # The date of the day would give a resumed run other tokens than it began with.
        return DATE_CALL.sub(lambda call: repr(TEMPLATE_DATE.strftime(call[2])), tokenizer.get_chat_template())
    chat = next((conversation for conversation in conversations if not conversation.plain), None)
    if chat is not None:
        raise UserError("chat-template-absent", model=tokenizer.name_or_path, place=chat.row.where)
    return None


def _render(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    assistant_only_loss: bool,
    skip_refused: bool,
) -> Rendered:
    messages = conversation.messages
    if conversation.text:
        return Rendered(messages[0]["content"], None, add_bos_eos=True)
    if template is None:
        prompt, completion = (message["content"] for message in messages)
        text = prompt + completion
        return Rendered(text, [(len(prompt), len(text))] if assistant_only_loss else None, add_bos_eos=True)
    try:
        if not assistant_only_loss:
            return Rendered(_apply(tokenizer, template, messages), None)
        if GENERATION_BLOCK.search(template):
            text, spans = _render_generation_blocks(conversation, tokenizer, template)
        else:
            text, spans = _render_prefixes(conversation, tokenizer, template)
    except TemplateError as error:
        if skip_refused:
            return Rendered("", [])
        raise UserError(
            "chat-template-refuses",
            place=conversation.row.where,
            model=tokenizer.name_or_path,
            reason=error,
        ) from error
    if not spans:
        raise UserError("answer-not-found", place=conversation.row.where, model=tokenizer.name_or_path)
    return Rendered(text, spans)


def _render_prefixes(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[str, list[Span]]:
    messages = conversation.messages
    whole = _apply(tokenizer, template, messages)
    spans: list[Span] = []
    for index in range(conversation.first_loss_message, len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        prompt = _apply(tokenizer, template, messages[:index], add_generation_prompt=True)
        closed = whole if index + 1 == len(messages) else _apply(tokenizer, template, messages[: index + 1])
        span = assistant_span(whole, prompt, closed, messages[index]["content"])
        if span is None or (spans and span[0] < spans[-1][1]):
            return whole, []
        spans.append(span)
    return whole, spans


def _render_generation_blocks(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[str, list[Span]]:
    special_tokens: dict[str, Any] = tokenizer.special_tokens_map
    # Annotated as a string, it returns the texts and, for each, the spans of its blocks.
    result: Any = render_jinja_template(
        [conversation.messages], chat_template=template, return_assistant_tokens_mask=True, **special_tokens
    )
    text, spans = result[0][0], result[1][0]
    roles = [message["role"] for message in conversation.messages]
    skipped = roles[: conversation.first_loss_message].count("assistant")
    if skipped and len(spans) != roles.count("assistant"):
        return text, []
    return text, [(start, end) for start, end in spans[skipped:] if start < end]


def _apply(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[Message], add_generation_prompt: bool = False
) -> str:
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert isinstance(text, str)
    return text


def _encode(rendered: list[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[tuple[np.ndarray, np.ndarray]]:
    needs_offsets = any(document.spans is not None for document in rendered)
    if needs_offsets and not tokenizer.is_fast:
        raise UserError("tokenizer-without-offsets", model=tokenizer.name_or_path)
    encoded = tokenizer(
        [document.text for document in rendered],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=needs_offsets,
        verbose=False,
    )
    bos = _bos_id(tokenizer) if any(document.add_bos_eos for document in rendered) else None
    documents = []
    for index, document in enumerate(rendered):
        ids = np.array(encoded["input_ids"][index], dtype=np.int32)
        mask = np.ones(len(ids), dtype=bool)
        if document.spans is not None:
            mask = _mask_of_spans(np.array(encoded["offset_mapping"][index]).reshape(-1, 2), document.spans)
        if document.add_bos_eos:
            ids, mask = _with_bos_eos(ids, mask, bos, tokenizer.eos_token_id)
        mask[:1] = False
        documents.append((ids, mask))
    return documents


def _mask_of_spans(offsets_T2: np.ndarray, spans: list[Span]) -> np.ndarray:
    starts, ends = offsets_T2[:, 0], offsets_T2[:, 1]
    mask = np.zeros(len(offsets_T2), dtype=bool)
    for start, end in spans:
        # A token of no width (whitespace that the tokenizer trims from its offsets) belongs where it begins.
        mask |= (starts < end) & np.where(starts == ends, starts >= start, ends > start)
    return mask


def _with_bos_eos(ids: np.ndarray, mask: np.ndarray, bos: int | None, eos: int | None) -> tuple[np.ndarray, np.ndarray]:
    if bos is not None and ids[:1].tolist() != [bos]:
        ids, mask = np.insert(ids, 0, bos), np.insert(mask, 0, False)
    if eos is not None and ids[-1:].tolist() != [eos]:
        ids, mask = np.append(ids, np.int32(eos)), np.append(mask, True)
    return ids, mask


def _bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The bos token where this tokenizer puts one before plain text."""
    first = tokenizer("a")["input_ids"][0]
    return first if first == tokenizer.bos_token_id else None
