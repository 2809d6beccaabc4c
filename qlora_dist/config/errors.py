"""Errors that a person can mend: one sentence that names the field or file, and what to do about it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from qlora_dist.config.catalogue import CATALOGUE, told


class UserError(Exception):
    """A mistake in what the person gave us (config, data, credentials, memory, a missing file).

    The command line prints the sentence without a traceback and exits with code 2. Workers return it to the
    launcher instead of raising it, so that nothing retries what cannot succeed.

    Args:
        code: the error's code in the catalogue.
        facts: what the catalogue's texts leave open.
    """

    def __init__(self, code: str, /, **facts: object):
        self.code, self.facts = code, facts
        self.message = told(code, **facts) if code in CATALOGUE or facts else code
        super().__init__(self.message)

    def __reduce__(self) -> tuple[Callable[[], "UserError"], tuple[Any, ...]]:
        # It crosses from processes that tokenise; the default would take the sentence for a code and lose the facts.
        return partial(type(self), self.code, **self.facts), ()
