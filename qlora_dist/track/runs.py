"""Runs side by side: a list of those in a folder, and what two of them differ in."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from qlora_dist.config.errors import UserError
from qlora_dist.config.redact import redact
from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.rundir import CONFIG_FILE, EVENTS_FILE, RUN_FILE
from qlora_dist.track.metrics import read_metrics
from qlora_dist.track.report import clock, duration_s, mean_speed, series


@dataclass(frozen=True)
class RunSummary:
    """One run in short.

    Attributes:
        loss, eval_loss: the last logged ones.
        tokens_per_second: mean over steps, all workers.
        started: seconds since the epoch.
        duration_s: seconds between its first and last event.
    """

    name: str
    state: str
    step: int
    max_steps: int | None
    loss: float | None
    eval_loss: float | None
    best_eval_loss: float | None
    tokens_per_second: float | None
    started: float | None
    duration_s: float


def summarise(run_dir: Path) -> RunSummary:
    """The run in `run_dir`.

    Raises:
        UserError: there is none.
    """
    status, records = read_status(run_dir), read_metrics(run_dir)
    events = EventLog(run_dir / EVENTS_FILE).read_new()
    loss, held_out = series(records, "loss"), series(records, "eval_loss")
    plans = [event["max_steps"] for event in events if event["kind"] == "plan"]
    return RunSummary(
        name=run_dir.resolve().name,
        state="silent" if status["silent"] else status["state"],
        step=int(records[-1]["step"]) if records else 0,
        max_steps=plans[-1] if plans else None,
        loss=loss[-1][1] if loss else None,
        eval_loss=held_out[-1][1] if held_out else None,
        best_eval_loss=min(value for _, value in held_out) if held_out else None,
        tokens_per_second=mean_speed(records),
        started=events[0]["time"] if events else None,
        duration_s=duration_s(events),
    )


def find_runs(folder: Path) -> list[Path]:
    """The run folders directly in `folder`, oldest first; `folder` itself where it is one.

    Raises:
        UserError: there is none.
    """
    if (folder / RUN_FILE).exists():
        return [folder]
    found = [path.parent for path in folder.glob(f"*/{RUN_FILE}")]
    if not found:
        raise UserError("no-runs", folder=folder)
    return sorted(found, key=lambda path: (path / RUN_FILE).stat().st_mtime)


def show_runs(folder: Path, console: Console) -> None:
    """Print one line a run."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("name", "state"):
        table.add_column(column, overflow="fold")
    for column in ("step", "loss", "eval loss", "tokens/s", "started", "duration"):
        table.add_column(column, justify="right", no_wrap=True)
    for path in find_runs(folder):
        run = summarise(path)
        steps = f"{run.step}/{run.max_steps}" if run.max_steps else str(run.step)
        table.add_row(
            run.name, run.state, steps, _number(run.loss), _number(run.eval_loss), _whole(run.tokens_per_second),
            time.strftime("%m-%d %H:%M", time.localtime(run.started)) if run.started else "-", clock(run.duration_s),
        )  # fmt: skip
    console.print(table, highlight=False)


def show_comparison(runs: list[Path], console: Console) -> None:
    """Print the settings in which `runs` differ, and what came of each."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("")
    summaries = [summarise(path) for path in runs]
    for path in runs:
        table.add_column(redact(str(path)), overflow="fold")
    for name, values in differences([flat_config(path) for path in runs]).items():
        table.add_row(name, *("-" if value is None else str(value) for value in values))
    table.add_section()
    table.add_row("state", *(run.state for run in summaries))
    table.add_row("step", *(str(run.step) for run in summaries))
    table.add_row("loss", *(_number(run.loss) for run in summaries))
    table.add_row("eval loss", *(_number(run.eval_loss) for run in summaries))
    table.add_row("best eval loss", *(_number(run.best_eval_loss) for run in summaries))
    table.add_row("tokens/s", *(_whole(run.tokens_per_second) for run in summaries))
    table.add_row("duration", *(clock(run.duration_s) for run in summaries))
    console.print(table, highlight=False)


def flat_config(run_dir: Path) -> dict[str, Any]:
    """The settings of a run by dotted name; not those that name or place it."""
    values = yaml.safe_load((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    return {name: value for name, value in _flatten(values) if name not in ("name", "output_dir")}


def differences(configs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The settings that are not the same in all of `configs`, with the value of each (None where it has none)."""
    names = dict.fromkeys(name for config in configs for name in config)
    rows = {name: [config.get(name) for config in configs] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        pairs += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
