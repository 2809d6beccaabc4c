"""How the facts of an error are worded."""

from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """What another library says is wrong, short enough for the middle of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def and_more(names: Sequence[str]) -> str:
    """The first of `names`, and how many others there are: `a`, `a and 2 more`."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
