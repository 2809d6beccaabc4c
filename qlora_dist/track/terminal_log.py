"""The event log as a person reads it: `qlora-dist logs`."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from qlora_dist.config.redact import redact
from qlora_dist.coordinate.ranges import count
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.rundir import EVENTS_FILE
from qlora_dist.coordinate.stop import is_over
from qlora_dist.track.island_lines import island_line, unit_of
from qlora_dist.track.metrics import FILE as METRICS_FILE
from qlora_dist.track.terminal import Tail

POLL_S = 0.5
Line = tuple[str, str, str]  # label, text, style


def show_log(run_dir: Path, console: Console, follow: bool = False) -> None:
    """Print the run's events and evaluations, oldest first.

    Args:
        follow: go on until the run is over.

    Raises:
        UserError: there is no run in this folder.
    """
    read_status(run_dir)
    events, metrics = Tail(run_dir / EVENTS_FILE), Tail(run_dir / METRICS_FILE)
    while True:
        # Before what is new is read, so that nothing written up to the end is missed.
        over = not follow or is_over(read_status(run_dir))
        records = [*events.records(), *(record for record in metrics.records() if "eval_loss" in record)]
        for record in sorted(records, key=lambda record: record["time"]):
            for line in lines(record):
                console.print(_row(record["time"], line), soft_wrap=True)
        if over:
            return
        time.sleep(POLL_S)


def _row(seconds: float, line: Line) -> Text:
    label, text, style = line
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    return Text.assemble((f"{clock}  {label:<9}  ", "dim"), (redact(text), style))


def lines(record: dict[str, Any]) -> Iterator[Line]:
    """What there is to say of an event, or of an evaluation; an event that is not known is shown with its fields."""
    kind = record.get("kind", "eval")
    match kind:
        case "opened":
            yield "opened", f"by pid {record['pid']} on {record['host']}", "dim"
        case "job":
            launcher = {"none": "no launcher", None: "a launcher"}.get(record.get("launcher"), record.get("launcher"))
            where = f" from pid {record['pid']} on {record['host']}" if "host" in record else ""
            before = record["started_generation"]
            yield "job", f"started by {launcher}{where}" + (f", after attempt {before}" if before else ""), ""
        case "joining":
            yield "joining", f"{record['world_size']} worker(s), the first on {record['host']}", "dim"
        case "generation":
            yield "start", f"attempt {record['generation']} on {where_workers_are(record['members'])}", "bold"
        case "committed":
            found = " (found on the disk)" if record.get("found") else ""
            losses = record["metrics"].get("eval_loss")
            shown = "" if losses is None else f", held-out loss {losses:.4f}"
            yield "saved", f"step {record['step']}: {record['folder']}{shown}{found}", "green"
        case "removed":
            gone = " (found gone)" if record.get("found") else ""
            yield "removed", ", ".join(record["folders"]) + gone, "dim"
        case "refused":
            yield "refused", f"the checkpoint of step {record['step']}: {record['reason']}", "yellow"
        case "failed":
            who = "the launcher" if record["rank"] is None else f"rank {record['rank']}"
            at = "" if record.get("step") is None else f" at step {record['step']}"
            for number, text in enumerate(record["message"].splitlines() or [""]):
                yield "failed", f"{who}{at}: {text}" if number == 0 else f"  {text}", "red"
        case "restart":
            verb = "restarting" if record["restart"] else "not restarting"
            yield "restart", f"{verb}: {record['reason']}", "yellow"
        case "resize":
            change = f"from {record['workers_before']} to {record['workers']} workers"
            yield "resize", f"{change}, a checkpoint first: {record['reason']}", "yellow"
        case "held":
            yield "resize", f"all workers hold still after step {record['step']}", ""
        case "resize_off":
            yield "resize", f"called off: {record['reason']}", ""
        case "stop":
            yield "stop", f"asked for, a checkpoint first: {record['reason']}", "yellow"
        case "straggler":
            yield "slow", record["message"], "" if record["over"] else "yellow"
        case "finished":
            summary = record["summary"]
            early = ", stopped early" if summary.get("stopped_early") else ""
            after = f"{record['step']} rounds" if "rounds" in summary else f"step {record['step']}"
            yield "finished", f"after {after}{early}", "bold"
            if summary.get("adapter"):
                yield "adapter", str(summary["adapter"]), ""
        case "eval":
            loss = record["eval_loss"]
            shown = "is not finite" if loss is None else f"{loss:.4f}"
            yield "eval", f"{unit_of(record)} {record['step']}: held-out loss {shown}", "cyan"
        case "example":
            return  # what is in the data is for the person who starts the run
        case "leased":
            packs = count(record["pieces"])
            yield "lease", f"{packs} packs of round {record['round'] + 1} to island {record['island']}", "dim"
        case "contributed":
            tokens, lease = record["tokens"], record["lease"]
            yield "island", f"{record['island']} has contributed lease {lease}, {tokens:,} tokens", "dim"
        case "evaluated" | "island_told" | "leases_ended" | "rounds_resumed":
            return  # the first is a record of the metrics, too
        case _ if (line := island_line(record)) is not None:
            yield line
        case _:
            for text in str(record.get("message") or _fields(record)).splitlines():
                yield kind, text, ""


def where_workers_are(members: list[dict[str, Any]]) -> str:
    """Workers and their hosts, ranks as ranges: `4 workers: n1 0-1, n2 2-3`."""
    hosts: dict[str, list[int]] = {}
    for member in members:
        hosts.setdefault(member["host"], []).append(member["rank"])
    shown = ", ".join(f"{host} {ranges(ranks)}" for host, ranks in list(hosts.items())[:8])
    more = f" and {len(hosts) - 8} more hosts" if len(hosts) > 8 else ""
    return f"{len(members)} worker(s): {shown}{more}"


def ranges(numbers: list[int]) -> str:
    """Whole numbers, runs of them joined: `0-3, 8`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def _fields(record: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in record.items() if key not in ("kind", "time"))
