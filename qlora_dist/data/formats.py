"""What a row looks like, and how it becomes a chat: messages, Alpaca, prompt/completion, question/answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qlora_dist.config.errors import UserError
from qlora_dist.data.rows import Row

FormatName = Literal["messages", "alpaca", "prompt_completion", "question_answer"]
Message = dict[str, Any]

FORMAT_KEYS: dict[FormatName, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "alpaca": (("instruction", "output"),),
    "prompt_completion": (("prompt", "completion"),),
    "question_answer": (("question", "answer"), ("instruction", "response")),
}
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row as chat messages.

    Attributes:
        messages: each a dict with `role` and a non-empty text `content` at least.
        first_loss_message: assistant messages before this index bear no loss (they belong to a prompt).
        plain: the row was a prompt and a completion as strings, which a model without a chat template can take too.
        row: where it came from.
    """

    messages: list[Message]
    row: Row
    first_loss_message: int = 0
    plain: bool = False

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
    if len(found) == 1:
        return found[0]
    seen = ", ".join(sorted(keys)) or "none"
    if found:
        raise UserError(
            f"{rows[0].where} fits the formats {' and '.join(found)} (keys: {seen}); name one of them in data.format."
        )
    raise UserError(f"{rows[0].where} fits no known format (keys: {seen}); data.format accepts {_accepted()}.")


def to_conversation(row: Row, format_: FormatName) -> Conversation:
    """The row as chat messages; keys that the format does not know are left aside.

    Raises:
        UserError: a key is missing, a content is empty or of the wrong type, a role is unknown, or there is no
            assistant message to learn from; names file and line.
    """
    if format_ == "messages":
        conversation = Conversation(_messages(row, "messages"), row)
    elif format_ == "alpaca":
        conversation = _alpaca(row)
    elif format_ == "prompt_completion":
        conversation = _prompt_completion(row)
    else:
        question, answer = next(
            (choice for choice in FORMAT_KEYS[format_] if row.data.keys() >= set(choice)), FORMAT_KEYS[format_][0]
        )
        conversation = _exchange(row, _text(row, question, format_), _text(row, answer, format_))
    _check_turns(conversation)
    return conversation


def _alpaca(row: Row) -> Conversation:
    instruction = _text(row, "instruction", "alpaca")
    # Alpaca's own files hold `"input": ""` where there is none.
    if row.data.get("input") not in (None, ""):
        instruction = f"{instruction}\n\n{_text(row, 'input', 'alpaca')}"
    return _exchange(row, instruction, _text(row, "output", "alpaca"))


def _prompt_completion(row: Row) -> Conversation:
    prompt, completion = (_value(row, key, "prompt_completion") for key in ("prompt", "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(row, "prompt")
        return Conversation(before + _messages(row, "completion"), row, first_loss_message=len(before))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise UserError(f"{row.where}: prompt and completion differ in kind; make both strings or both message lists.")
    return _exchange(
        row, _text(row, "prompt", "prompt_completion"), _text(row, "completion", "prompt_completion"), plain=True
    )


def _exchange(row: Row, user: str, assistant: str, plain: bool = False) -> Conversation:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return Conversation(messages, row, plain=plain)


def _messages(row: Row, key: str) -> list[Message]:
    messages = _value(row, key, "messages" if key == "messages" else "prompt_completion")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{row.where}: `{key}` must be a non-empty list of objects with `role` and `content`.")
    for index, message in enumerate(messages):
        place = f"{row.where}: {key}[{index}]"
        if not isinstance(message, dict):
            raise UserError(f"{place} is not an object; give it a `role` and a `content`.")
        if message.get("role") not in ROLES:
            raise UserError(f"{place} has the role {message.get('role')!r}; use one of {', '.join(ROLES)}.")
        _check_text(message.get("content"), f"{place}: `content`")
    return messages


def _value(row: Row, key: str, format_: FormatName) -> Any:
    if key not in row.data:
        seen = ", ".join(sorted(row.data)) or "none"
        raise UserError(
            f"{row.where} lacks the key `{key}` of the format {format_} (keys: {seen}); "
            "mend the row or name another format in data.format."
        )
    return row.data[key]


def _text(row: Row, key: str, format_: FormatName) -> str:
    value = _value(row, key, format_)
    _check_text(value, f"{row.where}: `{key}`")
    return value


def _check_text(value: Any, place: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{place} is of type {type(value).__name__}; it must be a string.")
    if not value.strip():
        raise UserError(f"{place} is empty; fill it in or remove it.")


def _check_turns(conversation: Conversation) -> None:
    roles = [message["role"] for message in conversation.messages]
    if "assistant" not in roles[conversation.first_loss_message :]:
        raise UserError(f"{conversation.row.where} has no assistant message to learn from; add one or remove the row.")
    if roles[0] == "assistant":
        raise UserError(f"{conversation.row.where} begins with the assistant; put a user message before it.")


def _accepted() -> str:
    return "; ".join(
        f"{format_} ({' or '.join('/'.join(choice) for choice in choices)})" for format_, choices in FORMAT_KEYS.items()
    )
