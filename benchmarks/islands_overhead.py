"""What a round of islands costs against a step: two islands of one GPU each, with and without overlap.

    python -m benchmarks.islands_overhead --out benchmarks/results/islands_overhead_8b_h200.json

The islands exchange the whole adapter (8B shape, r=16, 168 MB in float32) through the coordinator on their host. The
overhead of a round is what `sync_every` steps and an exchange take beyond `sync_every` times a step in the middle of a
round, by the clock of each island; beside it stands what the islands themselves say that training waited for. With
overlap the exchange goes on behind the next round's steps. Each side is a run of its own.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.islands_figures import last_summary, parameters_of
from benchmarks.process_tree import end_tree
from qlora_dist.bench import document
from qlora_dist.bench.workload import write_rows
from qlora_dist.track.metrics import read_metrics

SETTINGS = Path(__file__).with_name("islands_overhead.yaml")
SIDES = {
    "no overlap": [],
    "overlap": ["aggregate.overlap=true"],
    "no overlap, 4 bits": ["aggregate.exchange_bits=4"],
    "overlap, 4 bits": ["aggregate.overlap=true", "aggregate.exchange_bits=4"],
}
ISLANDS = 2


def round_overhead(records: Sequence[dict[str, Any]], sync_every: int) -> dict[str, Any]:
    """What rounds cost one island: seconds of a step, and of each round beyond its steps.

    A step's seconds are the median of those in the middle of rounds: neither the first two after an exchange, when what
    waited is made up for, nor the last one, whose record waits for the device. The first round, which warms up, counts
    for nothing, so the overheads are those of rounds 2, 3, ... up to the last exchange before the last round's steps.

    Args:
        records: one a step, in order, with `step` and `time`, seconds.
    """
    ended = {record["step"]: record["time"] for record in records if "loss" in record}
    last = max(ended)
    middle = [
        ended[step] - ended[step - 1]
        for step in ended
        if step > sync_every and step - 1 in ended and 3 <= (step - 1) % sync_every + 1 < sync_every
    ]
    step_s = statistics.median(middle)
    ends = [step for step in range(sync_every, last + 1, sync_every) if step in ended]
    overheads = [ended[b] - ended[a] - (b - a) * step_s for a, b in itertools.pairwise(ends)]
    return {
        "seconds_per_step": step_s,
        "overheads_s": overheads,
        "overhead_s": statistics.mean(overheads),
        "overhead_in_steps": statistics.mean(overheads) / step_s,
        "overhead_of_a_round": statistics.mean(overheads) / (sync_every * step_s),
    }


def measure(name: str, folder: Path, rows: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one side; its record.

    Raises:
        RuntimeError: it failed, or took longer than `--limit-s`; with what it has printed last.
    """
    run = folder / name.replace(",", "").replace(" ", "-")
    words = [sys.executable, "-m", "qlora_dist.cli", "train", str(SETTINGS), f"output_dir={run}", f"data.train={rows}"]
    words += [f"train.max_steps={arguments.sync_every * arguments.rounds}", f"aggregate.islands={ISLANDS}"]
    words += [f"aggregate.sync_every={arguments.sync_every}", *SIDES[name], *arguments.set]
    started = time.monotonic()
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output)
        try:
            code = process.wait(timeout=arguments.limit_s)
        except BaseException as error:
            end_tree(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
    if code != 0:
        logs = [path.read_text(errors="replace")[-1500:] for path in sorted(run.glob("logs/*/*.log"))]
        told = (folder / "output.txt").read_text(errors="replace")[-1500:]
        raise RuntimeError("\n\n".join([f"{name} ended with exit code {code}", told, *logs]))
    rounds = [record for record in read_metrics(run) if "participants" in record]
    islands = [of_island(run / "islands" / str(island), arguments.sync_every) for island in range(ISLANDS)]
    return {
        "name": name, "wall_s": time.monotonic() - started, "sync_every": arguments.sync_every,
        "rounds": arguments.rounds, "islands": islands, "parameters": parameters_of(run / "adapter"),
        "seconds_per_step": statistics.mean(one["seconds_per_step"] for one in islands),
        "overhead_s": statistics.mean(one["overhead_s"] for one in islands),
        "overhead_in_steps": statistics.mean(one["overhead_in_steps"] for one in islands),
        "overhead_of_50_steps": statistics.mean(one["overhead_in_steps"] for one in islands) / 50,
        "outer_step_s": [record.get("outer_step_seconds") for record in rounds], "summary": last_summary(run),
    }  # fmt: skip


def of_island(run: Path, sync_every: int) -> dict[str, Any]:
    """The figures of one island's run folder, with what it says of its exchanges itself."""
    records = read_metrics(run)
    said = {
        key: [record[key] for record in records if record.get(key) is not None]
        for key in ("exchange_seconds", "exposed_seconds")
    }
    tokens = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return round_overhead(records, sync_every) | said | {"tokens_per_second": statistics.median(tokens)}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a side."""
    lines = [
        "| exchange | step, s | a round's overhead, s | in steps | of 50 steps | exchange itself, s |",
        "|" + 6 * "---|",
    ]
    for record in records:
        exchanges = [seconds for island in record["islands"] for seconds in island["exchange_seconds"][1:]]
        lines.append(
            f"| {record['name']} | {record['seconds_per_step']:.3f} | {record['overhead_s']:.2f} "
            f"| {record['overhead_in_steps']:.2f} | {100 * record['overhead_of_50_steps']:.1f} % "
            f"| {statistics.mean(exchanges) if exchanges else float('nan'):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the sides one after the other; the JSON is written anew after each and says what is there already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", default=["no overlap", "overlap"], choices=SIDES)
    parser.add_argument("--sync-every", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--set", nargs="*", default=[], help="overrides of both sides")
    parser.add_argument("--limit-s", type=float, default=130.0, help="for one side")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = document.begin(
        arguments.out, resume=True, what="overhead of a round of islands against a step", cpu_cores=os.cpu_count(),
        settings=SETTINGS.read_text(), overrides=arguments.set,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="overhead-") as scratch:
        rows = Path(scratch) / "rows.jsonl"
        write_rows(rows)
        for name in arguments.sides:
            if any(record["name"] == name for record in found["records"]):
                continue
            found["records"].append(measure(name, Path(scratch), rows, arguments))
            document.write(arguments.out, found)
            print(json.dumps({k: v for k, v in found["records"][-1].items() if k != "summary"}), flush=True)
    print(table(found["records"]))


if __name__ == "__main__":
    main()
