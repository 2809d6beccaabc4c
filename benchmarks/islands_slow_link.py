"""Islands against DDP over a slow link: wall time for the same tokens, both sides really run.

    python -m benchmarks.islands_slow_link [--mbit 100] [--delay-ms 50] [--steps 100] [--sync-every 50]

Two network namespaces joined by a slow cable (slow_link.py), one worker or island in each, on CPUs. What is trained and
exchanged is one adapter of 84 MB in float32, the size of a real model's, made by its rank over a tiny base, so that a
step is short. DDP (gloo) sums its gradients over the cable each step; the islands' coordinator is at the first
namespace, so that the second island's messages cross the cable, both ways, every `sync_every` steps. A wall time is
that of the whole command, from its start to its end; training alone is told beside it, and how long DDP's gradients
take on the cable alone (`ddp_cable_alone_s`), which no faster computer would save.
"""

import argparse
import json
import os
import platform
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.islands_figures import last_summary, parameters_of
from benchmarks.slow_link import SlowCable, slow_cable
from qlora_dist.aggregate.measures import ring_all_reduce_bytes
from qlora_dist.bench import document
from qlora_dist.track.metrics import read_metrics
from tests.cluster.faults import REPOSITORY
from tests.tiny import make_tiny_model

SETTINGS = Path(__file__).with_name("islands_slow_link.yaml")
HIDDEN_SIZE = 256
DDP_PORT, COORDINATOR_PORT = 29_400, 29_500
# What the islands of each side are told beside steps and sync_every.
SIDES = {
    "ddp": [],
    "islands": [],
    "islands, overlap": ["aggregate.overlap=true"],
    "islands, 4 bits": ["aggregate.exchange_bits=4"],
}
# Tensors of 84 MB come and go in every step: glibc would map and unmap each of them.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
}  # fmt: skip
Processes = list[subprocess.Popen[bytes]]


class Side:
    """One side's processes in the two namespaces, and their run folder."""

    def __init__(self, cable: SlowCable, folder: Path, base: Path, settings: Sequence[str]) -> None:
        self.cable, self.folder = cable, folder
        folder.mkdir()
        self.settings = [f"model.name={base}", *settings]
        self.environment = os.environ | ENVIRONMENT | {"QLORA_DIST_TOKEN": secrets.token_hex(16)}

    def start(self, node: int, command: str, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """A command of ours in a namespace; its output goes to a file of the folder."""
        line = [sys.executable, "-m", "qlora_dist.cli", command, str(SETTINGS), *self.settings, *words]
        with (self.folder / f"{command}-{node}.txt").open("ab") as output:
            return subprocess.Popen(
                self.cable.command(node, *line), env=self.environment | environment, cwd=REPOSITORY, stdout=output,
                stderr=output, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    def ddp(self, steps: int) -> Processes:
        """Two workers of one group, as torchrun on two machines would start them."""
        common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        common |= {"MASTER_ADDR": self.cable.addresses[0], "MASTER_PORT": str(DDP_PORT)}
        words = [f"output_dir={self.folder / 'run'}", "launch.backend=torchrun", "launch.num_workers=2"]
        words += [f"train.max_steps={steps}", "train.global_batch_size=2"]
        return [self.start(node, "train", *words, **common, RANK=str(node)) for node in range(2)]

    def islands(self, steps: int, sync_every: int, more: Sequence[str]) -> Processes:
        """The coordinator and an island in the first namespace, the other island in the second."""
        words = [f"train.max_steps={steps}", "train.global_batch_size=1", f"aggregate.sync_every={sync_every}"]
        words += ["launch.backend=none", "launch.num_workers=1", "aggregate.islands=2", *more]
        address = self.cable.addresses[0]
        place = [f"output_dir={self.folder / 'run'}"]
        started = [
            self.start(0, "coordinate", *words, *place, "--host", address, "--port", str(COORDINATOR_PORT)),
        ]
        for node in range(2):
            joins = [f"aggregate.coordinator={address}:{COORDINATOR_PORT}", f"aggregate.island=node-{node}"]
            started.append(self.start(node, "train", *words, *joins, f"output_dir={self.folder / f'island-{node}'}"))
        return started

    def finish(self, processes: Processes, limit_s: float) -> None:
        """Wait for all.

        Raises:
            RuntimeError: one failed, or the time is over; with what it has printed last.
        """
        deadline = time.monotonic() + limit_s
        while any(process.poll() is None for process in processes):
            failed = [process for process in processes if process.poll()]
            if failed or time.monotonic() > deadline:
                told = [path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.txt"))]
                raise RuntimeError("\n\n".join(["a process failed, or the time is over", *told]))
            time.sleep(0.05)


def measure(name: str, cable: SlowCable, folder: Path, base: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one side; its record."""
    side = Side(cable, folder / name.replace(" ", "-").replace(",", ""), base, arguments.set)
    before = [cable.bytes_sent(node) for node in range(2)]
    started = time.monotonic()
    if name == "ddp":
        processes = side.ddp(arguments.steps)
    else:
        processes = side.islands(arguments.steps, arguments.sync_every, SIDES[name])
    try:
        side.finish(processes, arguments.limit_s)
    finally:
        for node in range(2):
            cable.kill(node)
    wall = time.monotonic() - started
    crossed = [cable.bytes_sent(node) - earlier for node, earlier in zip(range(2), before, strict=True)]
    run = side.folder / "run"
    records = read_metrics(run)
    # The first island is at the coordinator; what the second one waits for crosses the cable.
    own = records if name == "ddp" else read_metrics(side.folder / "island-1")
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    parameters = parameters_of(run / "adapter")
    record = {
        "name": name, "wall_s": wall, "training_s": training_seconds(own), "steps_a_worker": arguments.steps,
        "sync_every": None if name == "ddp" else arguments.sync_every, "crossed_mb": [1e-6 * one for one in crossed],
        "adapter_mb_fp32": 4e-6 * parameters, "parameters": parameters, "held_out_loss": [losses[0], losses[-1]],
        "seconds_per_step": statistics.median(one["seconds_per_step"] for one in own if "seconds_per_step" in one),
    }  # fmt: skip
    if name != "ddp":
        record["exchange_s"] = [one["exchange_seconds"] for one in own if one.get("exchange_seconds") is not None]
        record["exposed_s"] = [one["exposed_seconds"] for one in own if one.get("exposed_seconds") is not None]
        record["summary"] = last_summary(run)
    return record


def training_seconds(records: Sequence[dict[str, Any]]) -> float:
    """From the first record to the last one: without start-up, and without the steps before the first record."""
    times = [record["time"] for record in records]
    return float(max(times) - min(times))


def main() -> None:
    """Measure the cable, run the sides one after the other, and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=100.0)
    parser.add_argument("--delay-ms", type=float, default=50.0, help="of each direction")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sync-every", type=int, default=50)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--set", nargs="*", default=[], help="overrides of both sides")
    parser.add_argument("--limit-s", type=float, default=2400.0, help="for one side")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/islands_slow_link.json"))
    arguments = parser.parse_args()
    # Namespaces and what runs in them would outlive it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found = document.begin(
        arguments.out, resume=True, what="wall time of islands against DDP over a slow link", mbit=arguments.mbit,
        delay_ms_each_way=arguments.delay_ms, cpu=cpu_name(), cores=os.cpu_count(), kernel=platform.release(),
        settings=SETTINGS.read_text(),
    )  # fmt: skip
    with (
        tempfile.TemporaryDirectory(prefix="slow-") as scratch,
        slow_cable(arguments.mbit, arguments.delay_ms) as cable,
    ):
        os.environ["QLORA_DIST_CACHE"] = str(Path(scratch) / "cache")
        base = make_tiny_model(Path(scratch) / "model", hidden_size=HIDDEN_SIZE)
        found["cable"] = cable.probe()
        print(json.dumps(found["cable"]), flush=True)
        for name in arguments.sides:
            if any(record["name"] == name for record in found["records"]):
                continue
            # What else the machine does stretches steps, and so islands more than DDP, which waits for the cable.
            busy = psutil.cpu_percent(interval=1.0) / 100
            record = {"cores_busy_before": busy * (os.cpu_count() or 1)}
            record |= measure(name, cable, Path(scratch), base, arguments)
            record["load_after"] = os.getloadavg()[0]
            found["records"].append(record)
            document.write(arguments.out, found)
            print(json.dumps({key: value for key, value in record.items() if key != "summary"}), flush=True)
    found["of_ddp"] = shares(found["records"])
    for record in found["records"]:
        if record["name"] == "ddp":
            sent = record["steps_a_worker"] * ring_all_reduce_bytes(4 * record["parameters"], 2)
            found["ddp_cable_alone_s"] = 8 * sent / (1e6 * arguments.mbit)
    document.write(arguments.out, found)
    print(json.dumps(found["of_ddp"], indent=1))


def shares(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each side's wall time over DDP's."""
    ddp = next((record["wall_s"] for record in records if record["name"] == "ddp"), None)
    return {} if ddp is None else {one["name"]: one["wall_s"] / ddp for one in records if one["name"] != "ddp"}


def cpu_name() -> str:
    """What /proc/cpuinfo calls the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
