"""The lines of an examination as a person reads them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from qlora_dist.cluster.doctor.lines import Line
from qlora_dist.config.redact import redact, redact_tree

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}
# Columns from which the mend has room beside what was found.
WIDE = 140


def shown(lines: Sequence[Line], width: int) -> RenderableType:
    """The table and its sum, for a terminal of `width` columns."""
    wide = width >= WIDE
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=wide, header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("found", ratio=3, overflow="fold")
    if wide:
        table.add_column("mend", ratio=2, overflow="fold")
    before = None
    for line in lines:
        verdict = Text(line.verdict, style=STYLES[line.verdict])
        check = Text("" if line.check == before else line.check, style="bold")
        found = Text(redact(line.found), style="dim" if line.verdict == "skipped" else "")
        mend = Text(redact(line.mend), style="cyan")
        if wide:
            table.add_row(verdict, check, found, mend)
        else:
            table.add_row(verdict, check, found)
            if line.mend:
                table.add_row("", "", Text("-> ", style="cyan") + mend)
        before = line.check
    return Group(table, Text(), Text(total(lines), style=STYLES[worst(lines)]))


def worst(lines: Sequence[Line]) -> str:
    """The gravest verdict."""
    verdicts = {line.verdict for line in lines}
    return next(verdict for verdict in ("fail", "warn", "ok") if verdict in verdicts or verdict == "ok")


def total(lines: Sequence[Line]) -> str:
    """One sentence over all."""
    count = Counter(line.verdict for line in lines)
    bad = list(dict.fromkeys(line.check for line in lines if line.verdict == "fail"))
    parts = [f"{count[verdict]} {verdict}" for verdict in ("ok", "warn", "fail", "skipped") if count[verdict]]
    if bad:
        return f"{', '.join(parts)}. Mend before a run: {', '.join(bad)}."
    return f"{', '.join(parts)}. {'A run can start.' if count['warn'] else 'All is well.'}"


def show(lines: Sequence[Line], console: Console) -> None:
    """Print the table."""
    console.print(shown(lines, console.width))


def as_json(lines: Sequence[Line], found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Verdict, lines, and the facts that they come from, without secrets."""
    told = [{"check": x.check, "verdict": x.verdict, "found": x.found, "mend": x.mend} for x in lines]
    return {"verdict": worst(lines), "lines": redact_tree(told), "ranks": redact_tree(list(found))}
