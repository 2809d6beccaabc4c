"""What a launcher has set in the environment of the processes that it started."""

from collections.abc import Mapping

from qlora_dist.config.errors import UserError

MOST_PORT = 65535


def given(environ: Mapping[str, str], name: str) -> str:
    """A variable that whoever sets RANK and WORLD_SIZE must set too.

    Raises:
        UserError: it is not set.
    """
    if not environ.get(name):
        raise UserError("launched-by-halves", variable=name, found="not set, though RANK and WORLD_SIZE are")
    return environ[name]


def number(environ: Mapping[str, str], name: str, default: int | None = None, most: int | None = None) -> int:
    """Such a variable's whole number, from 0 to `most`.

    Args:
        default: where it is not set; None where it must be.

    Raises:
        UserError: it is not set, or something else.
    """
    if default is not None and name not in environ:
        return default
    text = given(environ, name)
    if not (text.isascii() and text.isdigit()) or (most is not None and int(text) > most):
        wanted = "a whole number" if most is None else f"a whole number up to {most}"
        raise UserError("launched-by-halves", variable=name, found=f"{text!r} and not {wanted}")
    return int(text)
