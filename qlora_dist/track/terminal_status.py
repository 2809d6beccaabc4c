"""`qlora-dist status --watch`: how a run stands, drawn again every second, from the run folder alone."""

import itertools
import statistics
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.stop import is_over
from qlora_dist.track.metrics import FILE as METRICS_FILE
from qlora_dist.track.terminal import Tail
from qlora_dist.track.terminal_log import ranges

EVERY_S = 1.0
PLAIN_EVERY_S = 10.0
# Ranks that get a line each; where there are more, only those that stand out do.
FEW_RANKS = 16
# Columns from which each node's line has room for the speed of each of its ranks.
WIDE = 140
# A rank is heard of once a second; these stand out.
LATE_S = 5.0
STATE_STYLES = {
    "running": "green",
    "starting": "yellow",
    "finished": "bold green",
    "stopped": "yellow",
    "failed": "red",
}
SPARKS = "▁▂▃▄▅▆▇█"


def watch(run_dir: Path, console: Console) -> dict[str, Any]:
    """Show the run until it is over; a full screen on a terminal, a view every ten seconds elsewhere.

    Returns:
        The last status.

    Raises:
        UserError: there is no run in this folder.
    """
    metrics, losses = Tail(run_dir / METRICS_FILE), deque[float](maxlen=400)  # as many as show in one curve

    def look() -> tuple[dict[str, Any], RenderableType]:
        losses.extend(record["loss"] for record in metrics.records() if record.get("loss") is not None)
        status = read_status(run_dir)
        return status, view(status, list(losses), console.width)

    status, shown = look()
    if not console.is_terminal:
        while True:
            console.print(shown)
            if is_over(status):
                return status
            console.print()
            time.sleep(PLAIN_EVERY_S)
            status, shown = look()
    with Live(shown, console=console, screen=True, auto_refresh=False) as live:
        while not is_over(status):
            time.sleep(EVERY_S)
            status, shown = look()
            live.update(shown, refresh=True)
    # The full screen is gone with what was on it.
    console.print(shown)
    return status


def view(status: dict[str, Any], losses: Sequence[float] = (), width: int = 80) -> Group:
    """Everything that is known of a run, for a terminal of `width` columns.

    Args:
        status: what `read_status` returns.
        losses: training losses, oldest first.
    """
    ranks = short_hosts(status["ranks"])
    if status["state"] == "running":
        # Their ages are as of when the status was written.
        since = status.get("age_s") or 0.0
        ranks = [{**rank, "age_s": rank["age_s"] + since} if rank.get("age_s") is not None else rank for rank in ranks]
    status = {**status, "ranks": ranks}
    parts: list[RenderableType] = [_headline(status)]
    if status.get("reason"):
        parts.append(Text.assemble(("why  ", "dim"), status["reason"]))
    parts += ["", _facts(status, losses, width)]
    if status["ranks"]:
        many = len(status["ranks"]) > FEW_RANKS
        slow = {straggler["rank"] for straggler in status.get("stragglers") or []}
        parts += ["", _nodes_table(status["ranks"], slow, width)] if many or len(_by_host(status["ranks"])) > 1 else []
        shown = _outstanding(status["ranks"], slow) if many else status["ranks"]
        if shown:
            parts += ["", *([Text("ranks that stand out", style="dim")] if many else [])]
            parts.append(_ranks_table(shown, slow))
    return Group(*parts)


def _headline(status: dict[str, Any]) -> RenderableType:
    ranks = status["ranks"]
    state = "silent" if status.get("silent") else status["state"]
    left = Text.assemble((status["run_id"], "bold"), "  ", (state, STATE_STYLES.get(state, "red")))
    if ranks:
        hosts = len(_by_host(ranks))
        left.append(f"  attempt {status['generation']}, {_count(len(ranks), 'rank')}, {_count(hosts, 'node')}")
    elif status.get("joined"):
        left.append(f"  ranks {ranges(status['joined'])} have joined")
    line = Table.grid(expand=True, padding=(0, 2, 0, 0))
    line.add_column(ratio=1)
    line.add_column(justify="right", no_wrap=True)
    line.add_row(left, Text(f"heard {span(status.get('age_s') or 0.0)} ago", style="dim"))
    return line


def _facts(status: dict[str, Any], losses: Sequence[float], width: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    step, most = status.get("step"), status.get("max_steps")
    if step is not None:
        table.add_row("step", _progress(step, most, status.get("seconds_left"), width))
    if status.get("loss") is not None:
        line = Text(f"{status['loss']:.4f}")
        if len(losses) > 1:
            line.append("  " + spark(losses, min(48, width - 30)), style="cyan")
        table.add_row("loss", line)
    if status.get("tokens_per_second"):
        pace = next((rank["seconds_per_step"] for rank in status["ranks"] if rank.get("seconds_per_step")), None)
        per_step = f", {pace:.2f} s a step" if pace else ""
        table.add_row("speed", f"{status['tokens_per_second']:,.0f} tokens/s{per_step}")
    if memory := [rank["memory_bytes"] for rank in status["ranks"] if rank.get("memory_bytes")]:
        table.add_row(
            "memory", f"{_gib(max(memory))} GiB at most, {_gib(statistics.median(memory))} GiB the median rank"
        )
    if (rounds := status.get("rounds")) is not None:
        does = ", ".join(f"{name} {what}" for name, what in rounds["islands"].items())
        table.add_row("islands", does)
        done = f"{rounds['packs_trained']} of {rounds['packs']} packs, {rounds['packs_dropped']} dropped"
        table.add_row("rounds", f"{rounds['round']} committed: {done}")
        return table
    table.add_row("saved", _checkpoint(status))
    restarts = status.get("restarts", [])
    for number, restart in enumerate(restarts[-3:], max(0, len(restarts) - 3) + 1):
        at = "before the first step" if restart["step"] is None else f"at step {restart['step']}"
        verb = "resized" if restart["planned"] else "restarted"
        table.add_row(f"{verb} {number}", Text(f"{at}, after attempt {restart['generation']}: {restart['reason']}"))
    for straggler in status.get("stragglers") or []:
        table.add_row(
            Text("straggler", style="yellow"), Text(str(straggler.get("sentence", straggler)), style="yellow")
        )
    return table


def _progress(step: int, most: int | None, seconds_left: float | None, width: int) -> RenderableType:
    if not most:
        return f"{step:,}"
    line = Table.grid(padding=(0, 2, 0, 0))
    left = "" if seconds_left is None else f"{span(seconds_left)} left"
    bar = ProgressBar(total=most, completed=step, width=max(8, min(50, width - 54)))
    line.add_row(f"{step:,} of {most:,}", bar, f"{100 * step / most:.0f} %", left)
    return line


def _checkpoint(status: dict[str, Any]) -> str:
    last = status.get("last_checkpoint")
    if last is None:
        return "nothing yet"
    loss = (last.get("metrics") or {}).get("eval_loss")
    shown = "" if loss is None else f", held-out loss {loss:.4f}"
    age_s = max(0.0, status["time"] + (status.get("age_s") or 0.0) - last["time"])
    return f"step {last['step']:,}, {span(age_s)} ago{shown} ({last['folder']})"


def _nodes_table(ranks: list[dict[str, Any]], slow: set[int], width: int) -> Table:
    wide = width >= WIDE
    table = _table()
    table.add_column("node", overflow="fold", min_width=8)
    table.add_column("ranks", overflow="fold", min_width=5)
    for name in ("tokens/s", "GiB", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("phase", no_wrap=True)
    table.add_column("heard", justify="right", no_wrap=True)
    table.add_column("tokens/s of each rank" if wide else "a rank", no_wrap=not wide)
    for host, members in _by_host(ranks).items():
        speeds = [rank["tokens_per_second"] for rank in members if rank.get("tokens_per_second")]
        memory = [rank["memory_bytes"] for rank in members if rank.get("memory_bytes")]
        steps = [rank["step"] for rank in members if rank.get("step") is not None]
        (phase, count), *_ = Counter(rank.get("phase") or "-" for rank in members).most_common(1)
        others = len(members) - count
        table.add_row(
            host, ranges([rank["rank"] for rank in members]), f"{sum(speeds):,.0f}" if speeds else "-",
            _gib(max(memory)) if memory else "-", _low_high(steps, ","), f"{phase} +{others}" if others else phase,
            _age(_longest(members)),
            Text(" ").join(_speed(rank, slow) for rank in members) if wide else _low_high(speeds, ",.0f"),
        )  # fmt: skip
    return table


def _longest(ranks: list[dict[str, Any]]) -> float | None:
    """Seconds since the rank was heard of that has been silent for longest; None where one never was."""
    ages = [rank.get("age_s") for rank in ranks]
    return None if None in ages else max(age for age in ages if age is not None)


def _ranks_table(ranks: list[dict[str, Any]], slow: set[int]) -> Table:
    table = _table()
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("node", overflow="fold", min_width=8)
    for name in ("pid", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("phase", no_wrap=True)
    for name in ("tokens/s", "GiB", "heard"):
        table.add_column(name, justify="right", no_wrap=True)
    for rank in ranks:
        table.add_row(
            str(rank["rank"]), rank["host"], str(rank["pid"]),
            "-" if rank.get("step") is None else f"{rank['step']:,}", rank.get("phase") or "-",
            _speed(rank, slow), _gib(rank["memory_bytes"]) if rank.get("memory_bytes") else "-",
            _age(rank.get("age_s")),
        )  # fmt: skip
    return table


def _table() -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)


def short_hosts(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same ranks, their hosts without a domain, where the names before it still tell the hosts apart."""
    hosts = {rank["host"] for rank in ranks}
    short = {host: host if host.replace(".", "").isdigit() else host.partition(".")[0] for host in hosts}
    if len(set(short.values())) < len(hosts):
        return ranks
    return [{**rank, "host": short[rank["host"]]} for rank in ranks]


def _by_host(ranks: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    hosts: dict[str, list[dict[str, Any]]] = {}
    for rank in ranks:
        hosts.setdefault(rank["host"], []).append(rank)
    return hosts


def _outstanding(ranks: list[dict[str, Any]], slow: set[int]) -> list[dict[str, Any]]:
    """Ranks that are silent, stragglers, at another step, or busy while most wait for them."""
    steps = [rank["step"] for rank in ranks if rank.get("step") is not None]
    step = statistics.mode(steps) if steps else None
    waiting = sum(rank.get("phase") == "collective" for rank in ranks) >= 0.9 * len(ranks)

    def stands_out(rank: dict[str, Any]) -> bool:
        return (
            (rank.get("age_s") or 0.0) > LATE_S
            or rank["rank"] in slow
            or (rank.get("step") is not None and step is not None and rank["step"] < step)
            or (waiting and rank.get("phase") == "compute")
        )

    return [rank for rank in ranks if stands_out(rank)][:FEW_RANKS]


def _speed(rank: dict[str, Any], slow: set[int]) -> Text:
    speed = rank.get("tokens_per_second")
    if not speed:
        return Text("-")
    return Text(f"{speed:,.0f}", style="yellow" if rank["rank"] in slow else "")


def _low_high(numbers: Sequence[float], form: str) -> str:
    if not numbers:
        return "-"
    low, high = format(min(numbers), form), format(max(numbers), form)
    return low if low == high else f"{low}-{high}"


def _age(seconds: float | None) -> Text:
    if seconds is None:
        return Text("never", style="red")
    return Text(span(seconds), style="red" if seconds > LATE_S else "")


def spark(values: Sequence[float], width: int) -> str:
    """A curve in one line of at most `width` characters, each the mean of its part."""
    width = max(1, min(width, len(values)))
    cuts = [round(part * len(values) / width) for part in range(width + 1)]
    means = [statistics.fmean(values[low:high]) for low, high in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((mean - low) * scale)] for mean in means)


def span(seconds: float) -> str:
    """A length of time as a person says it: 12 s, 5 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def _gib(bytes_: float) -> str:
    return f"{bytes_ / 2**30:.1f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
