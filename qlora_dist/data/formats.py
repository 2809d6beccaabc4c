"""What a row looks like, and how it becomes a chat: messages, ShareGPT, Alpaca, prompt/completion, plain text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora_dist.data.rows import BadRow, Row

FormatName = Literal["messages", "alpaca", "prompt_completion", "question_answer", "sharegpt", "text"]
Message = dict[str, Any]

FORMAT_KEYS: dict[FormatName, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "alpaca": (("instruction", "output"),),
    "prompt_completion": (("prompt", "completion"),),
    "question_answer": (("question", "answer"), ("instruction", "response")),
    "sharegpt": (("conversations",),),
    "text": (("text",),),
}
# Datasets carry these keys beside those of another format; they count where nothing else fits.
LAST_RESORTS: tuple[FormatName, ...] = ("sharegpt", "text")
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
EMPTY_ANSWER = "empty answer"
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row as chat messages.

    Attributes:
        messages: each a dict with `role` and a non-empty text `content` at least.
        first_loss_message: assistant messages before this index bear no loss (they belong to a prompt).
        plain: the row was a prompt and a completion as strings, which a model without a chat template can take too.
        text: the row was plain text: the one message holds it, all of it bears loss, no chat template is applied.
        row: where it came from.
    """

    messages: list[Message]
    row: Row
    first_loss_message: int = 0
    plain: bool = False
    text: bool = False

    @property
    def last_prompt(self) -> str:
        """What the first answer that is learned answers."""
        learned = (i for i, m in enumerate(self.messages) if i >= self.first_loss_message and m["role"] == "assistant")
        return str(self.messages[max(0, next(learned, 1) - 1)]["content"])


def detect_format(rows: Sequence[Row], name: FormatName | Literal["auto"] = "auto") -> FormatName:
    """The format of `rows`: `name` where it is not `auto`, else what the first row's keys say.

    Raises:
        UserError: the keys fit no format, or more than one.
    """
    if name != "auto":
        return name
    keys = rows[0].data.keys()
    found = [format_ for format_, choices in FORMAT_KEYS.items() if any(keys >= set(choice) for choice in choices)]
    chosen = [format_ for format_ in found if format_ not in LAST_RESORTS] or found[:1]
    if len(chosen) == 1:
        return chosen[0]
    seen = ", ".join(sorted(keys)) or "none"
    if found:
        raise BadRow(
            "row-format-ambiguous", "unknown format", place=rows[0].where, formats=" and ".join(chosen), keys=seen
        )
    raise BadRow("row-format-unknown", "unknown format", place=rows[0].where, keys=seen, accepted=_accepted())


def to_conversation(row: Row, format_: FormatName) -> Conversation:
    """The row as chat messages; keys that the format does not know are left aside.

    Raises:
        UserError: a key is missing, a content is empty or of the wrong type, a role is unknown, or there is no
            assistant message to learn from; names file and line.
    """
    if format_ == "text":
        message = {"role": "assistant", "content": _text(row, "text", format_, EMPTY_ANSWER)}
        return Conversation([message], row, plain=True, text=True)
    if format_ == "messages":
        conversation = Conversation(_with_system(row, _messages(row, "messages", format_)), row)
    elif format_ == "sharegpt":
        conversation = Conversation(_with_system(row, _messages(row, "conversations", format_)), row)
    elif format_ == "alpaca":
        conversation = _alpaca(row)
    elif format_ == "prompt_completion":
        conversation = _prompt_completion(row)
    else:
        question, answer = next(
            (choice for choice in FORMAT_KEYS[format_] if row.data.keys() >= set(choice)), FORMAT_KEYS[format_][0]
        )
        conversation = _exchange(row, _text(row, question, format_), _text(row, answer, format_, EMPTY_ANSWER))
    _check_turns(conversation)
    return conversation


def _alpaca(row: Row) -> Conversation:
    instruction = _text(row, "instruction", "alpaca")
    # Alpaca's own files hold `"input": ""` where there is none.
    if row.data.get("input") not in (None, ""):
        instruction = f"{instruction}\n\n{_text(row, 'input', 'alpaca')}"
    return _exchange(row, instruction, _text(row, "output", "alpaca", EMPTY_ANSWER))


def _prompt_completion(row: Row) -> Conversation:
    prompt, completion = (_value(row, key, "prompt_completion") for key in ("prompt", "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _with_system(row, _messages(row, "prompt", "prompt_completion"))
        after = _messages(row, "completion", "prompt_completion")
        return Conversation(before + after, row, first_loss_message=len(before))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise BadRow("prompt-completion-kinds", "wrong type", place=row.where)
    answer = _text(row, "completion", "prompt_completion", EMPTY_ANSWER)
    return _exchange(row, _text(row, "prompt", "prompt_completion"), answer, plain=True)


def _exchange(row: Row, user: str, assistant: str, plain: bool = False) -> Conversation:
    messages = _with_system(row, [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])
    return Conversation(messages, row, plain=plain and len(messages) == 2)


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The messages after the row's `system` text, where it has one and they do not begin with their own."""
    system = row.data.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] in ("system", "developer"):
        return messages
    _check_text(system, f"{row.where}: `system`")
    return [{"role": "system", "content": system}, *messages]


def _messages(row: Row, key: str, format_: FormatName) -> list[Message]:
    messages = _value(row, key, format_)
    # A CSV cell has no other way to hold a list.
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        try:
            messages = json.loads(messages)
        except ValueError as error:
            raise BadRow("messages-not-json", "not JSON", place=f"{row.where}: `{key}`", reason=error) from error
    if not isinstance(messages, list) or not messages:
        raise BadRow("messages-not-a-list", "wrong type", place=f"{row.where}: `{key}`", keys=_turn_keys(format_))
    return [_message(message, f"{row.where}: {key}[{index}]", format_) for index, message in enumerate(messages)]


def _message(message: Any, place: str, format_: FormatName) -> Message:
    if not isinstance(message, dict):
        raise BadRow("message-not-an-object", "wrong type", place=place, keys=_turn_keys(format_))
    content = "content"
    if format_ == "sharegpt" and "from" in message:
        content = "value"
        speaker = str(message["from"])
        message = {"role": SHAREGPT_ROLES.get(speaker, speaker), "content": message.get("value")}
    if message.get("role") not in ROLES:
        accepted = (*SHAREGPT_ROLES, *ROLES) if format_ == "sharegpt" else ROLES
        raise BadRow(
            "role-unknown", "unknown role", place=place, role=message.get("role"), accepted=", ".join(accepted)
        )
    reason = EMPTY_ANSWER if message["role"] == "assistant" else "empty text"
    _check_text(message.get("content"), f"{place}: `{content}`", reason)
    return _drop_nulls(message)


def _drop_nulls(value: Any) -> Any:
    """Without nulls: typed tables hold every key in every message, and a template must not see the difference."""
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


def _value(row: Row, key: str, format_: FormatName) -> Any:
    if key not in row.data:
        seen = ", ".join(sorted(row.data)) or "none"
        raise BadRow("row-lacks-key", "missing key", place=row.where, key=key, format=format_, keys=seen)
    return row.data[key]


def _text(row: Row, key: str, format_: FormatName, empty: str = "empty text") -> str:
    value = _value(row, key, format_)
    _check_text(value, f"{row.where}: `{key}`", empty)
    return value


def _check_text(value: Any, place: str, empty: str = "empty text") -> None:
    if not isinstance(value, str):
        raise BadRow("text-not-a-string", "wrong type", place=place, type=type(value).__name__)
    if not value.strip():
        if empty == EMPTY_ANSWER:
            raise BadRow("answer-empty", EMPTY_ANSWER, place=place)
        raise BadRow("text-empty", empty, place=place)
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow("half-a-surrogate", "not UTF-8", place=place)


def _check_turns(conversation: Conversation) -> None:
    roles = [message["role"] for message in conversation.messages]
    if "assistant" not in roles[conversation.first_loss_message :]:
        raise BadRow("no-assistant-message", "no assistant message", place=conversation.row.where)
    if roles[0] == "assistant":
        raise BadRow("begins-with-assistant", "begins with the assistant", place=conversation.row.where)


def _turn_keys(format_: FormatName) -> str:
    return "`from` and `value`" if format_ == "sharegpt" else "`role` and `content`"


def _accepted() -> str:
    return ", ".join(
        f"{format_} ({' or '.join('/'.join(choice) for choice in choices)})" for format_, choices in FORMAT_KEYS.items()
    )
