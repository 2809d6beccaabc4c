"""The records of a benchmark as Markdown."""

from collections.abc import Callable, Sequence
from typing import Any

from qlora_dist.bench.document import Record

Column = tuple[str, Callable[[Record], str]]


def number(key: str, form: str = ",.0f", scale: float = 1.0) -> Callable[[Record], str]:
    """Shows `key` of a record; a dash where it has none."""
    return lambda record: "-" if record.get(key) is None else format(record[key] * scale, form)


def markdown_table(columns: Sequence[Column], records: Sequence[Record]) -> str:
    """One row a record; a row's cells after its name are one sentence where it has no figures."""
    lines = ["| " + " | ".join(title for title, _ in columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for record in records:
        cells = [show(record) for _, show in columns]
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def tokens_or_outcome(record: Record) -> str:
    """Tokens a second, or in a word why there are none."""
    if record["outcome"] == "ok":
        return f"{record['tokens_per_second']:,.0f}"
    return f"{record['outcome']}: {record['why']}" if record.get("why") else str(record["outcome"])


MEMORY: list[Column] = [
    ("peak allocated GiB", number("peak_allocated_gib", ".1f")),
    ("peak reserved GiB", number("peak_reserved_gib", ".1f")),
    ("GPU in use GiB", number("gpu_total_gib", ".1f")),
    ("host peak GiB", number("host_peak_gib", ".1f")),
]
THROUGHPUT: list[Column] = [
    ("point", lambda record: str(record["name"])),
    ("tokens/s", tokens_or_outcome),
    ("loss-bearing tokens/s", number("loss_tokens_per_second")),
    ("s a step", number("seconds_per_step", ".3f")),
    *MEMORY,
]


def heading(document: dict[str, Any]) -> str:
    """What was measured, on what."""
    versions = ", ".join(f"{package} {number}" for package, number in document["versions"].items())
    gpus = f"{document['gpus']} x " if document["gpus"] > 1 else ""
    return f"{document['title']}\n\n{gpus}{document['device']}; {versions}.\n\n"


def throughput_page(document: dict[str, Any]) -> str:
    """The page of `bench throughput`."""
    return heading(document) + markdown_table(THROUGHPUT, document["records"])
