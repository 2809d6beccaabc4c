"""The records of a benchmark as Markdown."""

from collections.abc import Callable, Sequence
from typing import Any

from qlora_dist.bench.document import Record
from qlora_dist.bench.side_by_side import with_ratios

Column = tuple[str, Callable[[Record], str]]


def number(key: str, form: str = ",.0f") -> Callable[[Record], str]:
    """Shows `key` of a record; a dash where it has none."""
    return lambda record: "-" if record.get(key) is None else format(record[key], form)


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


def page(document: dict[str, Any]) -> str:
    """The page of a result: what was measured on what, and its tables."""
    if document["what"] == "kernels":
        return heading(document) + kernels_tables(document)
    if document["what"] == "peers":
        return heading(document) + peers_tables(document)
    return heading(document) + markdown_table(THROUGHPUT, document["records"]) + workers_table(document["records"])


WORKERS: list[Column] = [
    ("point", lambda row: str(row["point"])),
    ("node", lambda row: str(row["host"])),
    ("rank", lambda row: str(row["rank"])),
    ("tokens/s", number("tokens_per_second", ",.1f")),
    ("s a step outside collectives", number("busy_s", ".3f")),
    ("peak GiB", number("peak_gib", ".1f")),
]


def workers_table(records: Sequence[Record]) -> str:
    """Each node and each rank of the points with more than one worker, below the sum that they add up to."""
    rows: list[Record] = []
    for record in records:
        if len(record.get("ranks", ())) < 2:
            continue
        point = {"point": record["name"]}
        rows.append({**point, "host": "all", "rank": "all", "tokens_per_second": record["mean_tokens_per_second"]})
        for node in record["nodes"]:
            rows.append({**point, **node, "rank": "all"})
            rows += [{**point, **rank} for rank in record["ranks"] if rank["host"] == node["host"]]
    if not rows:
        return ""
    told = "Of each node and rank, all tokens of the measured steps by their seconds:"
    return f"\n{told}\n\n{markdown_table(WORKERS, rows)}"


def ratio(key: str) -> Callable[[Record], str]:
    """Shows a ratio with two digits; a dash where there is none."""
    return number(key, ".2f")


PEERS: list[Column] = [
    ("who", lambda record: str(record["title"])),
    ("batch x tokens", lambda record: f"{record['size']['batch']} x {record['size']['length']}"),
    ("tokens/s", tokens_or_outcome),
    ("ours / theirs, same batch", ratio("ours_same_size")),
    ("ours / theirs, no more memory", ratio("ours_no_more_memory")),
    ("of the bound", number("of_bound", ".0%")),
    ("loss-bearing tokens/s", number("loss_tokens_per_second")),
    ("s a step", number("seconds_per_step", ".3f")),
    *MEMORY,
    ("first loss", lambda record: f"{record['losses'][0]:.4f}" if record.get("losses") else "-"),
    ("steps", number("steps", "d")),
    ("note", lambda record: str(record.get("note") or "")),
]


def peers_tables(document: dict[str, Any]) -> str:
    """Everybody's points with the ratios, then the rates and the bounds that they are held against."""
    rates = document.get("rates", {})
    told = markdown_table(PEERS, with_ratios(document["records"], rates))
    sizes = {size: measured for size, measured in rates.items() if isinstance(measured, dict)}
    if not sizes:
        return told + (f"\nThe rates were not measured: {rates['why']}\n" if "why" in rates else "")
    rows: list[Record] = []
    for size, measured in sizes.items():
        kinds = {**measured["gemms"], **{f"attention, {kind}": of for kind, of in measured["attention"].items()}}
        rows += [{"size": size, "kind": kind, **of} for kind, of in kinds.items()]
    columns: list[Column] = [
        ("batch x tokens", lambda row: str(row["size"])),
        ("of a layer, or the head", lambda row: str(row["kind"])),
        ("forward ms", number("forward_ms", ".3f")),
        ("backward ms", number("backward_ms", ".3f")),
        ("forward TFLOP/s", number("forward_tflop_s")),
        ("backward TFLOP/s", number("backward_tflop_s")),
    ]
    bound = [
        f"- {size}: {measured['bound']['kept']:,.0f} tokens/s with nothing recomputed, "
        f"{measured['bound']['recomputed']:,.0f} with all layers recomputed but for their down projections\n"
        for size, measured in sizes.items()
    ]
    return (
        f"{told}\nRates of this GPU in the same run (copy {rates['copy_gb_s']:,.0f} GB/s):\n\n"
        f"{markdown_table(columns, rows)}\nWhat GEMMs and attention alone allow, the bound above being the first:\n\n"
        f"{''.join(bound)}"
    )


KERNELS: list[Column] = [
    ("kernel", lambda record: str(record["name"])),
    ("shape", lambda record: str(record.get("shape", ""))),
    ("ms", lambda record: f"{record['ms']:.3f}" if record["outcome"] == "ok" else tokens_or_outcome(record)),
    ("GB/s", number("gb_s")),
    ("TFLOP/s", number("tflop_s")),
    ("of its ceiling", number("of_ceiling", ".0%")),
    ("host us", number("host_us")),
    ("peers' ms", lambda record: "; ".join(f"{name} {_ms(ms)}" for name, ms in record.get("peers", {}).items()) or "-"),
]


def _ms(measured: float | str) -> str:
    return measured if isinstance(measured, str) else f"{measured:.3f}"


def kernels_tables(document: dict[str, Any]) -> str:
    """Each kernel beside its ceiling and its peers."""
    ceilings = (
        f"Ceilings of the same run: copy {document['copy_gb_s']:,.0f} GB/s; a GEMM's is cuBLAS's of its shape.\n\n"
    )
    return ceilings + markdown_table(KERNELS, document["records"])
