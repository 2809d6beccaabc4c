"""Points of `qlora-dist train`, each in processes of its own: tokens/s, seconds a step and memory of each."""

import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist.bench.document import Record, write
from qlora_dist.bench.spots import OURS, Spot
from qlora_dist.bench.sweep import Point
from qlora_dist.bench.watch import watched
from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.rundir import EVENTS_FILE
from qlora_dist.track.metrics import read_metrics

# What the log of a run says that ended for want of GPU memory, its own words and PyTorch's.
OUT_OF_MEMORY = ("ran out of memory", "CUDA out of memory", "OutOfMemoryError", "CUBLAS_STATUS_ALLOC_FAILED")
TAIL = 3000
NO_TIME, OVER_LIMIT = "no time left", "over the time limit"
# Less than this is not enough for a process to import PyTorch.
LEAST_S = 15.0


def measure(point: Point, settings: Path, scratch: Path, warm_up: int, limit_s: float, number: int = 0) -> Record:
    """Run `qlora-dist train` with the point's overrides; what went wrong is in the record.

    Args:
        settings: the YAML file that the overrides change.
        warm_up: steps before those that are measured.
        number: tells the folders of the points apart.

    Returns:
        outcome ("ok", "out of memory", "over the time limit" or "failed"), seconds, gpu_total_gib,
        host_peak_gib and, if it is ok, what `step_figures` says.
    """
    run_dir = scratch / f"run-{number:03d}"
    log = run_dir.with_suffix(".log")
    command = [sys.executable, "-m", "qlora_dist.cli", "train", str(settings), *point.overrides]
    started = time.time()
    ended = watched([*command, f"output_dir={run_dir}"], log, limit_s, point.environment)
    record: Record = {
        "outcome": outcome(ended.code, ended.over_limit, log),
        "seconds": ended.seconds,
        "gpu_total_gib": ended.gpu_peak_gib,
        "host_peak_gib": ended.host_peak_gib,
    }
    if record["outcome"] != "ok":
        told = log.read_text(errors="replace")
        why = {"why": last_words(told)} if record["outcome"] == "failed" else {}
        return record | why | {"exit_code": ended.code, "log_tail": told[-TAIL:]}
    return record | step_figures(run_dir, warm_up, started)


def outcome(code: int, over_limit: bool, log: Path) -> str:
    """A command's end in a word or two."""
    if over_limit:
        return OVER_LIMIT
    if code == 0:
        return "ok"
    told = log.read_text(errors="replace")
    return "out of memory" if any(sign in told for sign in OUT_OF_MEMORY) else "failed"


def last_words(log: str) -> str:
    """The line of a log that names the exception, else its last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines or ["nothing was said"])[-1][:200]


def step_figures(run_dir: Path, warm_up: int, started: float) -> Record:
    """Medians over the steps after `warm_up`, and the ranks' largest peaks, from a finished run's folder.

    Returns:
        tokens_per_second (non-padding, all ranks together) and loss_tokens_per_second, tokens_per_second_spread,
        seconds_per_step, steps (measured ones), workers, peak_allocated_gib and peak_reserved_gib (of PyTorch's
        allocator; None on a CPU), seconds_to_first_step (from `started`), notes (what the run said of memory and what
        it noticed), losses, grad_norms, and what `of_ranks` says.
    """
    steps = [record for record in read_metrics(run_dir) if "loss" in record]
    measured, ranks = steps[warm_up:], read_status(run_dir)["ranks"]
    speeds = [step["tokens_per_second"] for step in measured]
    on_gpu = any(rank.get("memory_reserved_bytes") for rank in ranks)
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_spread": [min(speeds), max(speeds)],
        "loss_tokens_per_second": statistics.median(step["loss_tokens_per_second"] for step in measured),
        "seconds_per_step": statistics.median(step["seconds_per_step"] for step in measured),
        "steps": len(measured),
        "workers": len(ranks),
        "peak_allocated_gib": _largest(ranks, "memory_bytes") if on_gpu else None,
        "peak_reserved_gib": _largest(ranks, "memory_reserved_bytes") if on_gpu else None,
        "seconds_to_first_step": steps[0]["time"] - started,
        "notes": told_notes(run_dir),
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        **of_ranks(ranks, measured),
    }


def of_ranks(ranks: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> Record:
    """What each rank told the coordinator, over the measured steps; nothing of a run of 256 steps or more.

    Args:
        ranks: those of the run's status.
        measured: their records in metrics.jsonl, a record a step.

    Returns:
        mean_tokens_per_second: all tokens of these steps by all their seconds, as metrics.jsonl has them.
        ranks: [{rank, host, tokens_per_second (its own tokens, not padding, by the same seconds: they add up to
        mean_tokens_per_second), busy_s (of a step, outside collectives; None in a short run), peak_gib}].
        nodes: [{host, ranks, tokens_per_second, busy_s (of its slowest rank), peak_gib (the largest)}].
    """
    tokens = {rank["rank"]: dict(rank.get("step_tokens") or []) for rank in ranks}
    counted = [step for step in measured if all(step["step"] in told for told in tokens.values())]
    seconds = sum(step["seconds_per_step"] for step in counted)
    if not counted or not seconds:
        return {"mean_tokens_per_second": None, "ranks": [], "nodes": []}
    rows: list[Record] = [
        {
            "rank": rank["rank"],
            "host": rank["host"],
            "tokens_per_second": sum(tokens[rank["rank"]][step["step"]] for step in counted) / seconds,
            "busy_s": rank.get("busy_s"),
            "peak_gib": rank["memory_bytes"] / 2**30,
        }
        for rank in ranks
    ]
    nodes: dict[str, list[Record]] = {}
    for row in rows:
        nodes.setdefault(row["host"], []).append(row)
    return {
        "mean_tokens_per_second": sum(s["tokens_per_second"] * s["seconds_per_step"] for s in counted) / seconds,
        "ranks": rows,
        "nodes": [_node(host, members) for host, members in nodes.items()],
    }


def _node(host: str, ranks: list[Record]) -> Record:
    busy = [rank["busy_s"] for rank in ranks if rank["busy_s"] is not None]
    return {
        "host": host,
        "ranks": [rank["rank"] for rank in ranks],
        "tokens_per_second": sum(rank["tokens_per_second"] for rank in ranks),
        "busy_s": max(busy, default=None),
        "peak_gib": max(rank["peak_gib"] for rank in ranks),
    }


def told_notes(run_dir: Path) -> list[str]:
    """What a run said of its plan for memory, and its notices."""
    events = EventLog(run_dir / EVENTS_FILE).read_new()
    return [event["message"] for event in events if event["kind"] in ("memory", "notice")]


def _largest(ranks: list[dict[str, Any]], key: str) -> float:
    return float(max(rank.get(key) or 0 for rank in ranks)) / 2**30


@dataclass(frozen=True)
class Task:
    """Something that is measured once: its name, what its record holds in any case, and how, given seconds."""

    name: str
    facts: Record
    run: Callable[[float], Record]


def run_tasks(
    tasks: Sequence[Task],
    document: dict[str, Any],
    out: Path,
    task_limit_s: float,
    limit_s: float,
    tell: Callable[[Record], None],
) -> None:
    """Measure the tasks that `document` has no record of, in their order, into `document` and `out`.

    A task gets `task_limit_s` seconds, or what is left of `limit_s` for all of them; one that nothing is left for
    is a record that says so, and is measured when the command is run again with --resume.
    """
    started = time.monotonic()
    document["records"] = [record for record in document["records"] if record["outcome"] != NO_TIME]
    done = {record["name"] for record in document["records"]}
    for task in tasks:
        if task.name in done:
            continue
        left_s = limit_s - (time.monotonic() - started)
        measured = task.run(min(task_limit_s, left_s)) if left_s >= LEAST_S else {"outcome": NO_TIME}
        if measured["outcome"] == OVER_LIMIT and left_s < task_limit_s:
            measured = {"outcome": NO_TIME}
        record = {"name": task.name, **task.facts, **measured}
        document["records"].append(record)
        write(out, document)
        tell(record)


def spots(document: dict[str, Any]) -> list[Spot]:
    """The points of the plane, by what PyTorch allocated; on a CPU by the host's peak. Tokens/s a worker."""
    records = [record for record in document["records"] if record["outcome"] == "ok"]
    return [
        Spot(
            record.get("series", OURS),
            record.get("label", record["name"]),
            record["peak_allocated_gib"] or record["host_peak_gib"],
            record["tokens_per_second"] / record["workers"],
        )
        for record in records
    ]
