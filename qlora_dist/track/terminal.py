"""What a person sees while a run goes on: read from the run folder, so it is the same for every launcher."""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from qlora_dist.track.island_lines import island_line, unit_of
from qlora_dist.track.metrics import FILE as METRICS_FILE
from qlora_dist.track.metrics import read_metrics

POLL_S = 0.5
PLAIN_LINES_EVERY_S = 10.0
# Columns from which a progress bar has room for everything.
WIDE = 110


class Tail:
    """The complete new lines of a file that grows, is replaced, or is not there yet."""

    def __init__(self, path: Path, from_end: bool = False):
        self.path, self.inode, self.offset = path, 0, 0
        if from_end and path.exists():
            stat = path.stat()
            self.inode, self.offset = stat.st_ino, stat.st_size

    def records(self) -> list[dict[str, Any]]:
        """The JSON objects that were completed since the last call."""
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self.inode:
                    self.inode, self.offset = inode, 0
                file.seek(self.offset)
                data = file.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):  # the launcher tells of the last two
            return []
        complete = data.rpartition(b"\n")[0]
        self.offset += len(complete) + (1 if complete else 0)
        return [json.loads(line) for line in complete.splitlines() if line]


class View:
    """Prints a run's events and metrics: a progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, run_dir: Path, console: Console):
        self.run_dir, self.console = run_dir, console
        self.events = Tail(run_dir / "events.jsonl", from_end=True)
        self.metrics = Tail(run_dir / METRICS_FILE, from_end=True)
        self.status = run_dir / "status.json"
        self.max_steps: int | None = None
        self.seen_step = -1
        self.printed_step = -1
        self.bar = Progress(
            TextColumn("   train  step", style="dim"),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9)),
            BarColumn(bar_width=24 if console.width >= WIDE else 8),
            TextColumn("{task.fields[line]}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
            console=console, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self.task: TaskID | None = None

    def poll(self) -> None:
        """Show what is new, in the order in which it happened."""
        latest = None
        for record in sorted([*self.events.records(), *self.metrics.records()], key=lambda record: record["time"]):
            if "kind" in record:
                if record["kind"] == "finished" and latest is not None:
                    self.show_step(latest)
                    latest = None
                self.show_event(record)
            elif "eval_loss" in record:
                self.show_evaluation(record)
            elif record["step"] > self.seen_step and "learning_rate" in record:
                self.seen_step, latest = record["step"], record
        if latest is not None:
            self.show_step(latest)

    def show_event(self, event: dict[str, Any]) -> None:
        """One line for an event a person wants to know of."""
        kind = event["kind"]
        if kind == "plan":
            self.max_steps = event["max_steps"]
        if kind == "data" and self.console.is_terminal and "splits" in event:
            self.console.print(Padding(data_table(event["splits"]), (0, 0, 0, 10)))
        elif kind == "example" and self.console.is_terminal:
            self.console.print(Padding(learned_text(event["pieces"]), (1, 0, 1, 10)))
        elif kind in ("data", "example", "plan", "model", "memory", "notice", "resumed"):
            for line in event["message"].splitlines():
                self.line(kind, line)
        elif kind == "generation":
            self.seen_step = -1
            where = ", ".join(f"{member['host']}:{member['pid']}" for member in event["members"])
            self.line("start", f"attempt {event['generation']} on {len(event['members'])} worker(s): {where}")
        elif kind == "committed":
            self.line("saved", f"step {event['step']}: {event['folder']}")
        elif kind == "failed" and event["failure"] == "error":
            self.line("failed", f"rank {event['rank']}: {event['message']}", style="red")
        elif kind == "restart":
            verb = "restarting" if event["restart"] else "not restarting"
            self.line("failed", f"{verb}: {event['reason']}", style="yellow")
        elif kind == "straggler":
            self.line("slow", event["message"], style="" if event["over"] else "yellow")
        elif kind == "resize":
            self.line("resize", f"{event['reason']}; a checkpoint first")
        elif kind == "resize_off":
            self.line("resize", f"called off: {event['reason']}")
        elif kind == "finished":
            self.show_end(event["step"], event["summary"])
        elif (line := island_line(event)) is not None:
            self.line(*line)

    def show_end(self, step: int, summary: dict[str, Any]) -> None:
        """What came of the run: held-out loss, the adapter, and sample answers."""
        if self.task is not None:
            self.bar.stop()
        losses = [r["eval_loss"] for r in read_metrics(self.run_dir) if r.get("eval_loss") is not None]
        early = ", stopped early" if summary["stopped_early"] else ""
        skipped = f", {summary['skipped_steps']} non-finite steps skipped" if summary["skipped_steps"] else ""
        fell = ""
        if len(losses) > 1:
            change = 100 * (losses[-1] / losses[0] - 1)
            fell = f"; held-out loss {losses[0]:.4f} -> {losses[-1]:.4f} ({change:+.0f} %)"
        counted = ("round" if "rounds" in summary else "step") + "s" * (step != 1)
        lost = summary.get("packs_dropped")
        dropped = f", {lost:,} of {lost + summary['packs_trained']:,} packs dropped" if lost else ""
        self.line("done", f"{step} {counted}{early}{skipped}{dropped}{fell}", style="yellow" if lost else "")
        self.line("adapter", summary["adapter"])
        for sample in summary["samples"]:
            self.console.print()
            for label in ("prompt", "expected", "before", "after"):
                style = {"before": "red", "after": "green"}.get(label, "")
                self.line(label, _shorten(sample[label]), style)

    def show_evaluation(self, record: dict[str, Any]) -> None:
        """One line for a held-out loss."""
        loss, perplexity = record["eval_loss"], record.get("eval_perplexity")
        when = f"{unit_of(record)} {record['step']}"
        if loss is None:
            self.line("eval", f"{when}: held-out loss is not finite", style="red")
        else:
            shown = f", perplexity {perplexity:.2f}" if perplexity is not None and perplexity < 1e6 else ""
            self.line("eval", f"{when}: held-out loss {loss:.4f}{shown}", style="cyan")

    def show_step(self, record: dict[str, Any]) -> None:
        """The progress of training."""
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        memory = self.memory()
        line = f"loss {loss}  {record['tokens_per_second']:,.0f} tokens/s"
        if not self.console.is_terminal or self.console.width >= WIDE:
            line += f"  {record['seconds_per_step']:.2f} s/step  lr {record['learning_rate']:.2e}"
            line += f"  {memory}" if memory else ""
        step = record["step"]
        if self.console.is_terminal:
            if self.task is None:
                self.task = self.bar.add_task("", total=self.max_steps, line=line)
                self.bar.start()
            self.bar.update(self.task, completed=step, total=self.max_steps, line=line)
            return
        due = record["seconds_per_step"] * (step - self.printed_step) >= PLAIN_LINES_EVERY_S
        if due or step == self.max_steps or step < self.printed_step:
            left = ""
            if self.max_steps:
                left = f"  left {_clock((self.max_steps - step) * record['seconds_per_step'])}"
            self.line("train", f"step {step}/{self.max_steps}  {line}{left}")
            self.printed_step = step

    def memory(self) -> str:
        """The largest worker's memory."""
        try:
            ranks = json.loads(self.status.read_text()).get("ranks", [])
        except (FileNotFoundError, json.JSONDecodeError):
            return ""
        used = max((rank.get("memory_bytes") or 0 for rank in ranks), default=0)
        return f"{used / 2**30:.1f} GiB" if used else ""

    def line(self, label: str, text: str, style: str = "") -> None:
        """Print one line."""
        # In one piece: a progress bar would be drawn between two.
        self.console.print(Text.assemble((f"{label:>8}  ", "dim"), (text, style)), soft_wrap=True)


def data_table(splits: list[dict[str, Any]]) -> Table:
    """The numbers of every split, a line each, and why rows were left out."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("data")
    for name in ("rows read", "kept", "tokens", "bear loss", "longest", "packs"):
        table.add_column(name, justify="right")
    table.add_column("left out")
    for split in splits:
        numbers = [f"{split[key]:,}" for key in ("rows", "documents", "tokens", "loss_tokens", "longest", "packs")]
        if split["packing_efficiency"] is not None:
            numbers[-1] += f" ({100 * split['packing_efficiency']:.1f} % full)"
        reasons = [f"{count:,} {reason}" for reason, count in split["dropped"].items()]
        reasons += [f"({split['truncated']:,} truncated)"] if split["truncated"] else []
        table.add_row(split["split"], *numbers, Text(", ".join(reasons) or "none"))
    return table


def learned_text(pieces: list[tuple[str, bool]]) -> Text:
    """An example of the data, dimmed where it bears no loss."""
    text = Text()
    for piece, learned in pieces:
        text.append(piece, style="" if learned else "dim")
    return text


def _shorten(text: str, length: int = 160) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= length else one_line[: length - 3] + "..."


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextmanager
def watching(run_dir: Path, console: Console | None = None) -> Iterator[View]:
    """Show the run in `run_dir` while the block runs."""
    # The stream of now: a launcher may send what libraries print elsewhere.
    view = View(run_dir, console or Console(file=sys.stdout))
    done = threading.Event()

    def follow() -> None:
        while not done.wait(POLL_S):
            view.poll()

    thread = threading.Thread(target=follow, name="terminal", daemon=True)
    thread.start()
    try:
        yield view
    finally:
        done.set()
        thread.join()
        view.poll()
        if view.task is not None:
            view.bar.stop()
