"""Errors that a person can mend: one sentence that names the field or file, and what to do about it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from qlora_dist.config.catalogue import told
from qlora_dist.config.catalogue.entry import plain_facts
from qlora_dist.config.redact import redact


class UserError(Exception):
    """A mistake in what the person gave us (config, data, credentials, memory, a missing file).

    The command line prints the sentence without a traceback and exits with code 2. Workers return it to the
    launcher instead of raising it, so that nothing retries what cannot succeed.

    Args:
        code: the error's code in the catalogue.
        facts: what the catalogue's texts leave open; kept as numbers and one-line texts.

    Raises:
        KeyError: there is no such code, or a fact is missing.
    """

    def __init__(self, code: str, /, **facts: object):
        self.code = code
        self.facts = plain_facts(facts)
        self.message = redact(told(code, **self.facts))
        super().__init__(self.message)

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds of it; `from_dict` makes it again."""
        return {"code": self.code, "facts": self.facts}

    @staticmethod
    def from_dict(told: dict[str, Any]) -> "UserError":
        """The error that another process raised."""
        return UserError(told["code"], **told["facts"])

    def __reduce__(self) -> tuple[Callable[[], "UserError"], tuple[()]]:
        # It crosses from processes that tokenise and from workers; the default would take the sentence for a code.
        return partial(type(self), self.code, **self.facts), ()
