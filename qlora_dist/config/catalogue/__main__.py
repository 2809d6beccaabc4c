"""`python -m qlora_dist.config.catalogue` prints docs/errors.md."""

import re
import sys
from string import Formatter

from qlora_dist.config.catalogue import AREAS

INTRO = """# Errors that you can mend

What is wrong with a configuration, data, a model, a checkpoint or the machines ends in one sentence on stderr and exit
code 2, without a traceback. The sentence names the field, file or line, and after a semicolon what to do about it.
Committed checkpoints stay as they are. Any other failure keeps its traceback and ends with exit code 1.

These are all of them; what stands in *italics* is filled in. `make docs` writes this page from
`qlora_dist/config/catalogue/`.
"""


def errors_page() -> str:
    """docs/errors.md: a section for each area, in it for each code its sentence and its mend."""
    parts = [INTRO]
    for area, entries in AREAS.items():
        parts.append(f"## {area}\n")
        for code, entry in entries.items():
            parts.append(f"### {code}\n\n{shown(entry.sentence)}\n\n**Mend:** {shown(entry.mend)}\n")
    return "\n".join(parts)


def shown(text: str) -> str:
    """A catalogue text as Markdown, its facts in italics: `{max_steps}` is *max steps*."""
    parts = []
    # Markdown has no italics between backticks.
    for literal, fact, _, _ in Formatter().parse(re.sub(r"`(\{[^{}]*\})`", r"\1", text)):
        parts.append(escaped(literal))
        if fact is not None:
            parts.append(f"*{fact.replace('_', ' ')}*")
    return "".join(parts)


def escaped(text: str) -> str:
    """`text` with a backslash before what Markdown or HTML would take for markup, outside of `code`."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*<\[\]])", r"\\\1", piece) for piece in pieces)


if __name__ == "__main__":
    sys.stdout.write(errors_page())
