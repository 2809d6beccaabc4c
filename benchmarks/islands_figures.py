"""The arithmetic, table and plot of islands_tldr.py's records."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qlora_dist.aggregate.measures import ring_all_reduce_bytes
from qlora_dist.track.metrics import parse_lines, read_metrics

Record = dict[str, Any]
# Okabe and Ito's colours, told apart by the colour-blind.
COLOURS = {"ddp": "#000000", "diloco": "#0072B2", "diloco 4 bits": "#56B4E9", "mean": "#E69F00", "svd": "#009E73"}


def parameters_of(adapter: Path) -> int:
    """Elements of a PEFT folder's weights."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in list(file.keys()))


def last_summary(run_dir: Path) -> Record:
    """What the `finished` event of a run of islands says, without what is in its run folder."""
    events = parse_lines((run_dir / "events.jsonl").read_text(encoding="utf-8"))
    told = [event["summary"] for event in events if event["kind"] == "finished"][-1]
    return {key: value for key, value in told.items() if key not in ("adapter", "samples")}


def loss_curve(run_dir: Path, steps: int) -> list[list[float]]:
    """[share of the packs trained, held-out loss in training] in order; a record's step is a round's of islands.

    Args:
        steps: of a run without islands.
    """
    records = read_metrics(run_dir)
    packs = {record["step"]: record["packs_trained"] for record in records if "packs_trained" in record}
    most = max(packs.values(), default=0)
    return [
        [packs.get(record["step"], 0) / most if packs else record["step"] / steps, record["eval_loss"]]
        for record in records
        if "eval_loss" in record
    ]


def times_fewer(moved: float, parameters: int, islands: int, steps: int, dtype: torch.dtype) -> tuple[float, float]:
    """What DDP moves over what an island moved, sent and received together.

    Args:
        moved: bytes that one island sent and received, headers included.
        dtype: in which DDP sums its gradients.

    Returns:
        Against what a DDP worker sends (the stricter count); against what it sends and receives, which is twice that.
    """
    sent = steps * ring_all_reduce_bytes(parameters * dtype.itemsize, islands)
    return sent / moved, 2 * sent / moved


def ordered(records: Sequence[Record]) -> list[Record]:
    """By number of islands, then DDP, DiLoCo, mean, svd; rare exchanges first, and exact ones before rounded ones."""
    methods = ["ddp", "diloco", "mean", "svd"]
    return sorted(
        records, key=lambda r: (r["islands"], methods.index(r["method"]), -r["sync_every"], -r["bits"], r["seed"])
    )


def summarise(records: Sequence[Record]) -> list[Record]:
    """One row a label: losses over its seeds against DDP's of the same seeds, and bytes."""
    records = ordered(records)
    baselines = [record for record in records if record["method"] == "ddp" and not record["overrides"]]
    of_ddp = {(record["islands"], record["seed"]): record["held_out_loss"] for record in baselines}
    rows = []
    for label in dict.fromkeys(record["label"] for record in records):
        same = [record for record in records if record["label"] == label]
        first, losses = same[0], [record["held_out_loss"] for record in same]
        ratios = [r["held_out_loss"] / of_ddp[key] for r in same if (key := (r["islands"], r["seed"])) in of_ddp]
        row = {key: first[key] for key in ("label", "method", "islands", "sync_every", "bits", "steps")}
        row |= {"seeds": len(same), "loss": statistics.mean(losses), "spread": max(losses) - min(losses)}
        row |= {"over_ddp": statistics.mean(ratios) if ratios else None, "worst_over_ddp": max(ratios, default=None)}
        row["packs"] = first["steps"] * first["islands"] * first["batch"]
        parameters = first["parameters"]
        if first["method"] == "ddp":
            row["mb_an_island"] = 2e-6 * first["steps"] * ring_all_reduce_bytes(4 * parameters, first["islands"])
        else:
            moved = statistics.mean(
                (r["summary"]["bytes_sent"] + r["summary"]["bytes_received"]) / r["islands"] for r in same
            )
            row["mb_an_island"] = 1e-6 * moved
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                row[f"fewer_{name}"] = times_fewer(moved, parameters, first["islands"], first["steps"], dtype)
        rows.append(row)
    return rows


def verdicts(records: Sequence[Record]) -> dict[str, dict[str, bool]]:
    """What acceptance 2 of islands asks of DiLoCo, a row that it speaks of: its loss, and its bytes by either count."""
    told = {}
    for row in summarise(records):
        if (
            row["method"] != "diloco"
            or row["over_ddp"] is None
            or row["sync_every"] < (20 if row["bits"] == 32 else 40)
        ):
            continue
        most, least, dtype = (1.01, 20, "fp32") if row["bits"] == 32 else (1.015, 100, "bf16")
        strict, both = row[f"fewer_{dtype}"]
        told[row["label"]] = {
            f"loss at most {most} of DDP's": row["over_ddp"] <= most,
            f"{least} times fewer bytes than DDP sends in {dtype}": strict >= least,
            f"{least} times fewer bytes than DDP sends and receives in {dtype}": both >= least,
        }
    return told


def table(records: Sequence[Record]) -> str:
    """Markdown: a row a label."""
    lines = [
        "| run | steps an island | held-out loss (spread of the seeds) | against DDP | MB an island "
        "| fewer than DDP fp32 | fewer than DDP bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summarise(records):
        against = "" if row["over_ddp"] is None else f"{100 * (row['over_ddp'] - 1):+.2f} %"
        fewer = [_factors(row.get(f"fewer_{name}")) for name in ("fp32", "bf16")]
        lines.append(
            f"| {row['label']} | {row['steps']} | {row['loss']:.4f} ({row['spread']:.4f}; {row['seeds']}) "
            f"| {'' if row['method'] == 'ddp' else against} | {row['mb_an_island']:,.1f} | {' | '.join(fewer)} |"
        )
    return "\n".join(lines)


def _factors(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.0f} ({pair[1]:.0f})"


def draw(records: Sequence[Record], path: Path) -> None:
    """Held-out loss over the course of training, and at the end against DDP's; a column a number of islands."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = sorted({record["islands"] for record in records})
    figure = Figure(figsize=(5.2 * len(counts), 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(counts), squeeze=False)
    for column, islands in enumerate(counts):
        here = ordered([record for record in records if record["islands"] == islands])
        above, below = axes[0][column], axes[1][column]
        of_ddp = {r["seed"]: r["held_out_loss"] for r in here if r["method"] == "ddp" and not r["overrides"]}
        for label in dict.fromkeys(record["label"] for record in here):
            same = [record for record in here if record["label"] == label]
            style = _style(same[0])
            shares, losses = mean_curve(record["curve"] for record in same)
            above.plot(shares, losses, label=label, **style)
            megabytes = summarise(same)[0]["mb_an_island"]
            over = [100 * (r["held_out_loss"] / of_ddp[r["seed"]] - 1) for r in same if r["seed"] in of_ddp]
            if not over:
                continue
            below.plot([megabytes] * len(over), over, "o", markersize=5, color=style["color"])
            below.annotate(
                _short(same[0]), (megabytes, statistics.mean(over)), textcoords="offset points", xytext=(7, 0),
                fontsize=7, color=style["color"], va="center",
            )  # fmt: skip
        ends = [end for end in (mean_curve([record["curve"]])[1][-1:] for record in here) if end]
        if ends:
            above.set_ylim(0.985 * min(end[0] for end in ends), 1.25 * max(end[0] for end in ends))
        above.set(title=f"{islands} islands", xlabel="share of the packs trained", ylabel="held-out loss in training")
        above.legend(fontsize=7, frameon=False)
        below.axhline(1.0, color="0.5", linestyle="--", linewidth=0.8)
        below.set(
            xscale="log", xlabel="MB that an island sends and receives",
            ylabel="held-out loss at the end, % above DDP's of the seed",
        )  # fmt: skip
        below.margins(x=0.25)
        for one in (above, below):
            one.grid(alpha=0.25)
            one.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def mean_curve(curves: Iterable[Sequence[Sequence[float]]]) -> tuple[list[float], list[float]]:
    """The shares that all curves have, and the mean loss at each."""
    tables = [{round(share, 4): loss for share, loss in curve if loss is not None} for curve in curves]
    shares = sorted(set.intersection(*(set(one) for one in tables))) if tables else []
    return shares, [statistics.mean(one[share] for one in tables) for share in shares]


def _style(record: Record) -> dict[str, Any]:
    kind = "diloco 4 bits" if record["bits"] == 4 else record["method"]
    twice = record["steps"] // record["sync_every"] > 10 and record["method"] != "ddp"
    return {"color": COLOURS[kind], "linestyle": ":" if twice else "-", "linewidth": 1.4}


def _short(record: Record) -> str:
    words = [record["method"]]
    if record["method"] != "ddp":
        words += [f"H={record['sync_every']}", *([f"\n{record['bits']} bits"] if record["bits"] != 32 else [])]
    return " ".join([*words, *(override.split(".")[-1] for override in record["overrides"])])
