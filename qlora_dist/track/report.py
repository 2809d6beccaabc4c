"""report.html: one file that tells a run, opens offline and asks no other host for anything."""

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from qlora_dist.config.redact import redact, redact_tree
from qlora_dist.coordinate.files import write_atomically
from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.rundir import CONFIG_FILE, EVENTS_FILE
from qlora_dist.track.charts import Chart, Line, Points, draw, smooth
from qlora_dist.track.island_lines import island_line, unit_of
from qlora_dist.track.metrics import read_metrics

FILE = "report.html"
Records = list[dict[str, Any]]


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Write the report of the run in `run_dir` to `path` (RUN/report.html where None), and return the path.

    Raises:
        UserError: there is no run in the folder.
        OSError: the report cannot be written.
    """
    path = path or run_dir / FILE
    write_atomically(path, render(run_dir).encode())
    return path


def render(run_dir: Path) -> str:
    """The page."""
    status = redact_tree(read_status(run_dir))
    events = redact_tree(EventLog(run_dir / EVENTS_FILE).read_new())
    records = read_metrics(run_dir)
    config = run_dir / CONFIG_FILE
    finished = [event for event in events if event["kind"] == "finished"]
    template = Environment(
        loader=PackageLoader("qlora_dist.track", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    ).get_template("report.html.j2")  # fmt: skip
    return template.render(
        name=run_dir.resolve().name,
        status=status,
        figures=key_figures(records, status, events),
        charts=[(chart, draw(chart)) for chart in charts(records, events)],
        data=[event["message"].partition(": ") for event in newest(events, "data")],
        splits=[split | {"left_out": left_out(split)} for e in newest(events, "data") for split in e.get("splits", [])],
        example=next((event["pieces"] for event in newest(events, "example")), None),
        model=[event["message"] for event in newest(events, "model")],
        ranks=status.get("ranks") or [],
        timeline=timeline(events),
        samples=finished[-1]["summary"]["samples"] if finished else [],
        adapter=finished[-1]["summary"]["adapter"] if finished else None,
        config=redact(config.read_text(encoding="utf-8")) if config.exists() else "",
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def newest(events: Records, kind: str) -> Records:
    """The events of a kind that the last attempt with any told."""
    chosen = [event for event in events if event["kind"] == kind]
    return [event for event in chosen if event["generation"] == chosen[-1]["generation"]]


def left_out(split: dict[str, Any]) -> str:
    """Why rows of a split were left out, or cut."""
    reasons = [f"{count:,} {reason}" for reason, count in (split.get("dropped") or {}).items() if count]
    cut = [f"{split['truncated']:,} truncated"] if split.get("truncated") else []
    return ", ".join(reasons + cut) or "none"


def series(records: Records, metric: str, scale: float = 1.0) -> Points:
    """(step, value) of a metric where it has one."""
    return [(r["step"], r[metric] * scale) for r in records if r.get(metric) is not None]


def charts(records: Records, events: Records) -> list[Chart]:
    """The plots that the records have something for."""
    loss = series(records, "loss")
    smoothed = [Line("smoothed", smooth(loss))] if len(loss) >= 30 else []
    start = records[0]["time"] if records else 0.0
    duration = records[-1]["time"] - start if records else 0.0
    unit, seconds = next(((u, s) for u, s in (("hours", 3600), ("minutes", 60)) if duration > 2 * s), ("seconds", 1))
    restarts = [e["time"] for e in events if e["kind"] == "generation" and e["generation"] > 1]
    counted = unit_of(records[-1]) if records else "step"
    every = [
        Chart("Training loss", [Line("each step", loss, faint=bool(smoothed)), *smoothed], log=True),
        Chart("Held-out loss", [Line("held-out loss", series(records, "eval_loss"), dots=True)], log=True),
        Chart("Learning rate", [Line("learning rate", series(records, "learning_rate"))], from_zero=True),
        Chart(
            "Gradient norm before clipping",
            [Line("gradient norm", [p for p in series(records, "grad_norm") if p[1] > 0])], log=True,
        ),
        Chart(
            "Throughput",
            [Line("tokens/s", series(records, "tokens_per_second")),
             Line("that bear loss", series(records, "loss_tokens_per_second"))],
            unit="", from_zero=True,
        ),
        Chart("Seconds a step", [Line("seconds", series(records, "seconds_per_step"))], from_zero=True),
        Chart(
            "Islands' changes in a round: distance (0 the same, 1.4 orthogonal) and cosine",
            [Line("distance", series(records, "divergence")), Line("cosine", series(records, "cosine"))],
        ),
        Chart(
            "MB of a round, and of DDP's gradients for the same steps",
            [
                Line("sent", series(records, "bytes_sent", 1e-6)),
                Line("received", series(records, "bytes_received", 1e-6)),
                Line("sent by DDP", series(records, "ddp_bytes_sent", 1e-6)),
            ],
            log=True,
        ),
        Chart(
            "Training loss around an aggregation",
            [Line("last step before", series(records, "train_loss_before")),
             Line("first step after", series(records, "train_loss_after"))],
        ),
        Chart("Memory of rank 0, GiB", [Line("GiB", series(records, "memory_bytes", 2**-30))], from_zero=True),
        Chart(
            f"{counted.capitalize()} over time" + (", restarts dashed" if restarts else ""),
            [Line(counted, [((r["time"] - start) / seconds, r["step"]) for r in records])], x_label=unit,
            marks=[(moment - start) / seconds for moment in restarts if moment >= start],
        ),
    ]  # fmt: skip
    shown = [chart for chart in every if any(line.points for line in chart.lines)]
    return [replace(chart, x_label=counted) if chart.x_label == "step" else chart for chart in shown]


def key_figures(records: Records, status: dict[str, Any], events: Records) -> list[tuple[str, str, str]]:
    """(what, figure, remark) of what one looks for first."""
    figures = []
    steps, held_out, loss = status.get("max_steps"), series(records, "eval_loss"), series(records, "loss")
    at = unit_of(records[-1]) if records else "step"
    if loss:
        step = int(loss[-1][0])
        figures.append((at.capitalize(), f"{step:,}", f"of {steps:,}" if steps else ""))
        figures.append(("Training loss", f"{loss[-1][1]:.4f}", f"{loss[0][1]:.4f} at {at} {int(loss[0][0])}"))
    if held_out:
        best = min(held_out, key=lambda point: point[1])
        figures.append(
            ("Held-out loss", f"{held_out[-1][1]:.4f}", f"{held_out[0][1]:.4f} at {at} {int(held_out[0][0])}")
        )
        figures.append(("Best held-out loss", f"{best[1]:.4f}", f"at {at} {int(best[0])}"))
    speed = mean_speed(records)
    if speed is not None:
        figures.append(("Tokens/s", f"{speed:,.0f}", "mean over steps, all workers"))
    figures.append(("Duration", clock(duration_s(events)), "from the first start, waiting included"))
    if at == "round":
        joined = {event["island"] for event in events if event["kind"] == "island_joined"}
        figures.append(("Islands", str(len(joined)), f"{moved_mb(records):,.0f} MB exchanged"))
    else:
        attempts = sum(event["kind"] == "generation" for event in events)
        figures.append(("Attempts", str(attempts), f"{len(status.get('ranks') or [])} worker(s)"))
    return figures


def moved_mb(records: Records) -> float:
    """What islands have sent and received, in MB."""
    return 1e-6 * sum(r.get("bytes_sent", 0) + r.get("bytes_received", 0) for r in records)


def mean_speed(records: Records) -> float | None:
    """Tokens a second over all logged steps: all their tokens by all their seconds."""
    steps = [r for r in records if r.get("tokens_per_second") and r.get("seconds_per_step")]
    seconds = sum(r["seconds_per_step"] for r in steps)
    return sum(r["tokens_per_second"] * r["seconds_per_step"] for r in steps) / seconds if seconds else None


def duration_s(events: Records) -> float:
    """Seconds from the first to the last event."""
    return float(events[-1]["time"] - events[0]["time"]) if events else 0.0


def timeline(events: Records) -> list[tuple[str, str, str, str]]:
    """(clock since the start, label, text, css class) of what happened to the run."""
    rows = []
    for event in events:
        kind, label, text, css = event["kind"], event["kind"], event.get("message", ""), ""
        if kind == "generation":
            where = ", ".join(sorted({member["host"] for member in event["members"]}))
            label, text = "start", f"attempt {event['generation']}: {len(event['members'])} worker(s) on {where}"
        elif kind == "committed":
            held_out = (event.get("metrics") or {}).get("eval_loss")
            shown = f", held-out loss {held_out:.4f}" if held_out is not None else ""
            label, text = "saved", f"step {event['step']}{shown}"
        elif kind == "failed":
            css, text = "bad", f"rank {event['rank']}, step {event['step']}: {event['message']}"
        elif kind == "restart":
            css, text = "warn", f"{'restarting' if event['restart'] else 'not restarting'}: {event['reason']}"
        elif kind in ("resize", "resize_off"):
            label, css, text = "resize", "warn", f"{'called off: ' if kind != 'resize' else ''}{event['reason']}"
        elif kind == "straggler":
            css = "soft" if event["over"] else "warn"
        elif kind == "held":
            label, text = "resize", f"all workers hold still after step {event['step']}, its checkpoint committed"
        elif kind == "finished":
            unit = "rounds" if "rounds" in event["summary"] else "steps"
            label, text, css = "done", f"{event['step']} {unit}", "good"
        elif (line := island_line(event)) is not None:
            label, text, style = line
            css = {"yellow": "warn"}.get(style, "")
        elif kind not in ("notice", "resumed", "plan"):
            continue
        rows.append((clock(event["time"] - events[0]["time"]), label, text, css))
    return shorten(rows)


def shorten(rows: list[tuple[str, str, str, str]]) -> list[tuple[str, str, str, str]]:
    """Of more than three neighbouring rows of one label, the first and the last, and how many lie between."""
    short: list[tuple[str, str, str, str]] = []
    for label, part in itertools.groupby(rows, key=lambda row: row[1]):
        group = list(part)
        between = ("", label, f"{len(group) - 2:,} more", "soft")
        short += [group[0], between, group[-1]] if label in ("saved", "round") and len(group) > 3 else group
    return short


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
