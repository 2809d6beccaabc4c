"""Errors that a person can mend: one sentence that names the field or file, and what to do about it."""


class UserError(Exception):
    """A mistake in what the person gave us (config, data, credentials, memory, a missing file).

    The command line prints the sentence without a traceback and exits with code 2. Workers return it to the
    launcher instead of raising it, so that nothing retries what cannot succeed.

    Args:
        message: one plain sentence naming the field, file or line, and the mend.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message
