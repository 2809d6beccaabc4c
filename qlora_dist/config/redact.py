"""Takes secrets out of whatever is written down: logs, config dumps, reports, checkpoints, W&B.

A secret is recognised by where it stands (credentials in a URL, a signed query, a value under a telling name), by its
shape (tokens with a known prefix), and by being the value of a telling environment variable.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

SHOWN = "***"
# Shorter values (a count, a yes) would be replaced in unrelated text.
SHORTEST = 8
_TELLING = re.compile(
    r"(?i)(^|_)(api_?key|access_?key(_id)?|secret|token|passw(or)?d|passphrase|credentials?|auth)(_|$)|_key(_id)?$"
)
# These name where something is, not what it is.
_WHERE = re.compile(r"(?i)_(file|path|dir|sock|url|uri|host|port)$")
# A password may hold an unescaped slash, as AWS keys do; a port before a path is no password.
_URL_USER = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)(?:[^\s/@:'\"]*:(?!\d+/)[^\s@'\"]*|[^\s/@:'\"]+)@")
_URL_QUERY = re.compile(
    r"(?i)([?&](?:(?:[a-z0-9_-]*[_-])?(?:token|signature|credential|secret|password|key)|sig)=)[^\s&'\"#]+"
)
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|wandb_v\d_[A-Za-z0-9_]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}"
    r"|sk-[A-Za-z0-9_-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|xox[abpr]-[A-Za-z0-9-]{10,})"
)


def is_telling(name: str) -> bool:
    """Whether a setting or variable of this name holds a secret, such as WANDB_API_KEY or AWS_ACCESS_KEY_ID."""
    return bool(_TELLING.search(name)) and not _WHERE.search(name)


def holds_credentials(url: str) -> bool:
    """Whether a URL has user and password, or a token, before its host."""
    return bool(_URL_USER.search(url))


def environment_secrets(environ: Mapping[str, str] | None = None) -> list[str]:
    """The values of telling environment variables, longest first."""
    environ = os.environ if environ is None else environ
    values = {v.strip() for name, v in environ.items() if is_telling(name) and len(v.strip()) >= SHORTEST}
    return sorted(values, key=len, reverse=True)


def redact(text: str) -> str:
    """`text` with `***` in place of every secret in it; text without secrets comes back as it is."""
    for value in environment_secrets():
        text = text.replace(value, SHOWN)
    text = _URL_USER.sub(rf"\g<1>{SHOWN}@", text)
    text = _URL_QUERY.sub(rf"\g<1>{SHOWN}", text)
    return _SHAPES.sub(SHOWN, text)


def redact_tree(value: Any, name: str = "") -> Any:
    """A JSON-like value with every text in it redacted, and whole texts where the name of their field is telling."""
    if isinstance(value, dict):
        return {key: redact_tree(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_tree(inner, name) for inner in value]
    if isinstance(value, str):
        # Special tokens of a tokenizer, such as <|im_end|>, go by the same name.
        return SHOWN if is_telling(name) and not value.startswith("<") else redact(value)
    return value
