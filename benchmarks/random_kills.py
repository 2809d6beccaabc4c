"""Random kills in real runs: is a committed checkpoint ever lost, and does a rank that was cut off ever commit?

    python -m benchmarks.random_kills [--kills 50] [--freezes 4] [--seed 0] [--out benchmarks/results/random_kills.json]

Runs of the tests' tiny model (NF4 base, CPU) on a Ray cluster of two raylets on this machine,
launch.num_workers=[1, 2], a checkpoint every second step. What is killed, and when, comes from the seed:

- worker: SIGKILL to one rank;
- node: SIGKILL to the second node's raylet and everything on it; the node comes back later;
- driver: SIGKILL to the process that the person started; then the same command again;
- coordinator: SIGKILL to the process of its actor;
- freeze: SIGSTOP to the second node's raylet and everything on it, so that a rank is cut off and nobody can end it;
  released when the next attempt has committed.

A third of the kills come while the run is still recovering from the one before. After each, the event log is read:

- every checkpoint that it calls committed, and that retention kept, is there with every byte as it was committed;
- none was found missing by the coordinator without retention having taken it;
- no generation begins before the newest checkpoint that was committed when it started;
- nothing was committed by a generation after another had taken its place (the freezes are there for this).
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import yaml

from qlora_dist.checkpoint.manifest import verify
from tests.cluster.two_nodes import RayNodes, namespaces_work
from tests.single import small_config
from tests.tiny import make_tiny_model

KINDS = ("worker", "node", "driver", "coordinator")
KEEP_LAST = 3
PATIENCE_S = 400.0
Event = dict[str, Any]


class Run:
    """One run on the two nodes: its driver, its run folder, and what was done to it."""

    def __init__(self, nodes: RayNodes, folder: Path, model: Path, seed: int):
        self.nodes, self.folder = nodes, folder
        folder.mkdir(parents=True)
        config = small_config(
            folder / "run", model,
            run={"seed": seed},
            data={"max_rows": 200},
            train={"max_steps": 100_000, "global_batch_size": 8, "lr_scheduler_type": "constant"},
            checkpoint={"save_steps": 2, "keep_last": KEEP_LAST},
            launch={
                "backend": "ray", "num_workers": [1, 2], "address": nodes.address, "device": "cpu",
                "collective_timeout_s": 20, "max_restarts": 1000,
            },
            track={"tensorboard": False},
        )  # fmt: skip
        self.config, self.run_dir = folder / "config.yaml", config.run_dir
        self.config.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self.starts = 0
        self.start()

    def start(self) -> None:
        """The command, as a person gives it (again)."""
        self.starts += 1
        with (self.folder / "output.txt").open("a") as output:
            words = [sys.executable, "-m", "qlora_dist.cli", "train", str(self.config)]
            self.driver = self.nodes.popen(0, *words, stdout=output, stderr=output)

    def start_again_if_ended(self) -> bool:
        """Whether the driver had ended by itself (its guards against endless restarts, say) and was started again."""
        if self.driver.poll() is None:
            return False
        self.start()
        return True

    def events(self, *kinds: str) -> list[Event]:
        """The event log's whole lines, of `kinds` where any are given."""
        path = self.run_dir / "events.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith(b"\n")]
        return [event for event in events if not kinds or event["kind"] in kinds]

    def generation(self) -> Event:
        """The newest attempt; {} before the first."""
        return next(reversed(self.events("generation")), {})

    def newest(self) -> tuple[int, int]:
        """(generation, step) of the newest commit; (0, 0) before the first."""
        return max(((e["generation"], e["step"]) for e in self.events("committed")), default=(0, 0))

    def wait(self, what: str, true: Callable[[], bool]) -> int:
        """Wait until `true()`; how often the driver had to be started again meanwhile."""
        deadline, again = time.monotonic() + PATIENCE_S, 0
        while not true():
            again += self.start_again_if_ended()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} did not come within {PATIENCE_S:.0f} s; see {self.folder}/output.txt")
            time.sleep(0.2)
        return again

    def end(self) -> None:
        """End the driver and, with its Ray job, all of the run's processes."""
        os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait()


def kill(run: Run, kind: str, draw: random.Random) -> str:
    """Do it; what was hit, in words."""
    nodes = run.nodes
    if kind == "node":
        count = len(nodes.nodes.processes(1))
        nodes.kill(1)
        return f"node 1 with {count} processes"
    if kind == "driver":
        run.end()
        return f"driver {run.driver.pid}"
    name = {"coordinator": "CoordinatorActor", "worker": "RayTrainWorker"}[kind]
    while True:
        run.wait(f"a {kind} to kill", lambda: bool(actors(run, name)))
        pid = draw.choice(actors(run, name) or [0])
        try:
            if pid:
                os.kill(pid, signal.SIGKILL)
                return f"{kind} {pid}"
        except ProcessLookupError:
            continue  # it ended by itself in between


def actors(run: Run, name: str) -> list[int]:
    """Processes of the actors of a class, on both nodes."""
    found = []
    for process in run.nodes.nodes.processes(0) + run.nodes.nodes.processes(1):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def violations(run: Run) -> list[str]:
    """What the run's folder says that must never be; empty where all is well."""
    found: list[str] = []
    committed: dict[str, Event] = {}
    newest, current = (0, 0), 0
    expected_resume: int | None = None
    for event in run.events():
        kind = event["kind"]
        if kind == "generation":
            if event["generation"] <= current:
                found.append(f"generation {event['generation']} after generation {current}")
            current, expected_resume = event["generation"], newest[1]
        elif kind == "committed":
            key = (event["generation"], event["step"])
            # A commit whose coordinator died before it wrote the event is logged by the next one, as found.
            if event["generation"] != current and not event.get("found"):
                found.append(f"generation {event['generation']} committed step {event['step']} during {current}")
            committed[event["folder"]] = event
            newest = max(newest, key)
        elif kind == "removed":
            for folder in event["folders"]:
                kept = sorted(((e["generation"], e["step"]) for e in committed.values()), reverse=True)[:KEEP_LAST]
                gone = committed.pop(folder)
                if (gone["generation"], gone["step"]) in kept:
                    found.append(f"{folder} was removed although it is one of the last {KEEP_LAST}")
        elif kind == "resumed":
            if expected_resume is not None and event["step"] < expected_resume:
                found.append(f"generation {current} resumed at {event['step']}, {expected_resume} was committed")
            expected_resume = None
    for name in committed:
        problems = verify(run.run_dir / "checkpoints" / name)
        # The run goes on while this reads: retention may have taken it after the log was read.
        if problems and name not in {f for e in run.events("removed") for f in e["folders"]}:
            found.append(f"{name}: {'; '.join(problems)}")
    return found


def recovered(run: Run, since: tuple[int, int]) -> bool:
    """Whether something newer than `since` is committed."""
    return run.newest() > since


def freeze(run: Run, draw: random.Random) -> tuple[str, int]:
    """Cut node 1 off, let the run go on without it, release it; what happened, and how often the driver restarted."""
    time.sleep(draw.uniform(0, 2))
    cut_off = run.nodes.nodes.processes(1)
    pids = {process.pid for process in cut_off}
    old = run.generation()
    ranks = [member["rank"] for member in old["members"] if member["pid"] in pids]
    for process in cut_off:
        process.suspend()
    again = run.wait("an attempt without it", lambda: run.newest()[0] > old["generation"])
    for process in cut_off:
        if process.is_running():
            process.resume()
    # Long enough for the rank to find out, and for a commit of its to arrive.
    time.sleep(10)
    refused = [e for e in run.events("refused") if e["generation"] == old["generation"]]
    late = [e for e in run.events("committed") if e["generation"] == old["generation"] and e["time"] > _began(run, old)]
    words = (
        f"rank {ranks} of generation {old['generation']}; {len(refused)} commit(s) of its refused, {len(late)} taken"
    )
    return words, again


def _began(run: Run, old: Event) -> float:
    return next(float(e["time"]) for e in run.events("generation") if e["generation"] == old["generation"] + 1)


def ensure_second_node(nodes: RayNodes) -> None:
    """Bring node 1 back where it is gone (Ray ends a released raylet that it had declared dead)."""
    if not any("raylet" in process.name() for process in nodes.nodes.processes(1)):
        nodes.kill(1)
        nodes.start(1)


def make_plan(kills: int, freezes: int, draw: random.Random) -> list[list[str]]:
    """What happens in each run, in order. Each loss of a node comes first in its run, where two workers are sure."""
    kinds = [draw.choice(KINDS) for _ in range(kills)] + ["freeze"] * freezes
    draw.shuffle(kinds)
    first = [kind for kind in kinds if kind in ("node", "freeze")]
    others = [kind for kind in kinds if kind not in ("node", "freeze")]
    runs = max(len(first), 1)
    return [first[i : i + 1] + others[i::runs] for i in range(runs)]


def campaign(plan: list[list[str]], draw: random.Random, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """All of it, one record a kill."""
    if not plan:
        return
    model = make_tiny_model(folder / "model")
    nodes = RayNodes(folder / "ray")
    run: Run | None = None
    try:
        for number, kinds in enumerate(plan):
            ensure_second_node(nodes)
            run = Run(nodes, folder / f"run-{number}", model, seed + number)
            run.wait("a group of two", partial(whole, run))
            for kind in kinds:
                yield {"seed": seed, "run": number, "kind": kind, **one(run, kind, draw)}
                ensure_second_node(nodes)
            run.end()
    finally:
        if run is not None and run.driver.poll() is None:
            run.end()
        nodes.close()


def whole(run: Run) -> bool:
    """Whether two workers have committed something together."""
    generation = run.generation()
    return len(generation.get("members", [])) == 2 and run.newest()[0] == generation["generation"]


def one(run: Run, kind: str, draw: random.Random) -> dict[str, Any]:
    """One kill or freeze, recovery (or not), and the look at the log."""
    began = time.monotonic()
    before, again, workers = run.newest(), 0, len(run.generation()["members"])
    if kind == "freeze":
        hit, again = freeze(run, draw)
    else:
        time.sleep(draw.uniform(0, 3))
        before = run.newest()
        hit = kill(run, kind, draw)
    early = kind != "freeze" and draw.random() < 1 / 3
    if early:
        # The next one comes while this one's recovery is under way.
        time.sleep(draw.uniform(0, 8))
        again += run.start_again_if_ended()
    else:
        again += run.wait(f"a commit after the {kind}", lambda: recovered(run, before))
    return {
        "hit": hit,
        "workers": workers,
        "waited_for_recovery": not early,
        "seconds": round(time.monotonic() - began, 1),
        "driver_started_again": again,
        "committed_so_far": len(run.events("committed")),
        "generation": run.generation().get("generation", 0),
        "violations": violations(run),
    }


def tally(records: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [f"{'kind':<12} {'kills':>5} {'recovered':>9} {'median s':>8} {'violations':>10}"]
    for kind in (*KINDS, "freeze"):
        mine = [record for record in records if record["kind"] == kind]
        waited = sorted(record["seconds"] for record in mine if record["waited_for_recovery"])
        median = f"{waited[len(waited) // 2]:.0f}" if waited else "-"
        bad = sum(bool(record["violations"]) for record in mine)
        lines.append(f"{kind:<12} {len(mine):>5} {len(waited):>9} {median:>8} {bad:>10}")
    return "\n".join(lines)


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of the tally, and where they come from."""
    committed: dict[tuple[int, int], int] = {}
    for record in records:
        run = (record["seed"], record["run"])
        committed[run] = max(committed.get(run, 0), record["committed_so_far"])
    return {
        "kills": {kind: sum(r["kind"] == kind for r in records) for kind in (*KINDS, "freeze")},
        "runs": len(committed),
        "committed": sum(committed.values()),
        "violations": sum(bool(record["violations"]) for record in records),
        "driver_started_again": sum(r["driver_started_again"] for r in records if r["kind"] != "driver"),
        "hardware": f"{psutil.cpu_count()} CPU cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "nodes": "network namespaces" if namespaces_work() else "loopback addresses",
        "versions": {"python": platform.python_version(), "ray": ray.__version__, "torch": torch.__version__},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--freezes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=Path, help="one JSON line a kill; what is there already counts too")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/random_kills.json"))
    parser.add_argument("--keep", type=Path, help="folder to leave the runs in")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Ray's sockets live below it, and their paths may have 107 characters.
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="qk"))
    folder.mkdir(exist_ok=True)
    os.environ["QLORA_DIST_CACHE"] = str(folder / "cache")
    path = arguments.records or folder / "records.jsonl"
    draw = random.Random(arguments.seed)
    plan = make_plan(arguments.kills, arguments.freezes, draw) if arguments.kills + arguments.freezes else []
    with path.open("a") as file:
        for record in campaign(plan, draw, arguments.seed, folder):
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(json.dumps(record), flush=True)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    summary = summarise(records)
    print(tally(records))
    print(
        f"{len(records)} kills and freezes in {summary['runs']} runs, {summary['committed']} checkpoints committed, "
        f"{summary['violations']} with a violation"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(summary | {"records": records}, indent=1) + "\n")
    if arguments.keep is None and not summary["violations"]:
        shutil.rmtree(folder)
    return 1 if summary["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
