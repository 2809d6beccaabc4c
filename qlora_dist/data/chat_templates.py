"""Chat templates by name, for base models that bring none or another: `data.chat_template`."""

import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_dist.config.errors import UserError

# A tag of transformers' own, which Jinja alone does not know.
GENERATION_TAGS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def template_names() -> list[str]:
    """The names that `data.chat_template` accepts, sorted."""
    return sorted(entry.name.removesuffix(".jinja") for entry in _folder().iterdir() if entry.name.endswith(".jinja"))


def load_chat_template(name: str) -> str:
    """The text of a template, by its name or the path of a .jinja file.

    Raises:
        UserError: there is none, it cannot be read, or it is not Jinja.
    """
    if name in template_names():
        return _folder().joinpath(f"{name}.jinja").read_text("utf-8")
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError("chat-template-unknown", name=name, names=", ".join(template_names()))
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("chat-template-unreadable", name=name, reason=error) from error
    if not text.strip():
        raise UserError("chat-template-empty", name=name)
    try:
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION_TAGS.sub("", text))
    except TemplateSyntaxError as error:
        raise UserError("chat-template-not-jinja", name=name, line=error.lineno, reason=error.message) from error
    return text


def _folder() -> Traversable:
    return files("qlora_dist.data").joinpath("templates")
