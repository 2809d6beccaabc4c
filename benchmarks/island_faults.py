"""Random faults in runs of islands: is a committed round ever lost or counted twice, or a pack lost without a word?

    python -m benchmarks.island_faults [--schedules 50] [--seed 0] [--out benchmarks/results/island_faults.json]

Each schedule is a run of two or three islands of the tests' tiny model on this machine's CPUs, every one and the
coordinator a process of its own. Settings (method, quorum, deadline, lateness, overlap, bits) and faults come from the
seed:

- killed: SIGKILL to an island before one of its steps; it is started again;
- kill: SIGKILL to an island or the coordinator at some time, whatever it does; it is started again;
- paused: SIGSTOP to an island before one of its steps, SIGCONT beyond the round's deadline;
- nan, base, far: a contribution with a NaN, over another base, a thousand times too large;
- before, after: SIGKILL to the coordinator between a round's files and its event, and between the event and the answer;
- late: an island that starts when rounds have been committed; gone: one that is killed and does not come back.

At the end the event log is read (`tests/distributed/islands.py: violations`): every committed round follows from the
one before, no contribution and no pack is counted twice, every pack is trained or reported as dropped. And the last
committed round's adapter is the final one, with the checksum that its event has.
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
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
import torch

from qlora_dist.aggregate.round_files import digest
from tests.distributed import islands as faults
from tests.distributed.islands import Event, Fault, Islands, violations
from tests.tiny import make_tiny_model

OF_ISLANDS = {
    "killed": faults.killed, "paused": faults.paused, "nan": faults.sends_nan, "base": faults.of_another_base,
    "far": faults.far_out,
}  # fmt: skip
OF_COORDINATOR = {"before": faults.dies_before_the_commit, "after": faults.dies_after_the_commit}
KINDS = (*OF_ISLANDS, *OF_COORDINATOR, "kill", "late", "gone")
PATIENCE_S = 300.0


def make_schedule(draw: random.Random) -> dict[str, Any]:
    """Settings and faults of one run: what happens to whom, and when."""
    islands = draw.choice([2, 2, 3])
    method = draw.choice(["mean", "diloco", "svd"])
    aggregate = {
        "islands": islands,
        "method": method,
        "sync_every": draw.choice([1, 2, 3]),
        "quorum": draw.choice([1.0, 1.0, 0.5]),
        "round_deadline_s": draw.choice([2.0, 4.0, 8.0]),
        "late_rounds": draw.choice([0, 1, 2]),
        "most_leases": draw.choice([2, 5]),
        "exchange_bits": draw.choice([4, 8, 32]),
    }
    aggregate["overlap"] = method != "svd" and aggregate["sync_every"] > 1 and draw.random() < 0.4
    names = [str(number) for number in range(islands)]
    planned: list[dict[str, Any]] = []
    for _ in range(draw.choice([1, 2, 2, 3])):
        kind = draw.choice(KINDS)
        taken = {fault["who"] for fault in planned}
        if kind in OF_COORDINATOR:
            fault = {"kind": kind, "who": "coordinator", "at": draw.randrange(4)}
        elif kind == "kill":
            fault = {"kind": kind, "who": draw.choice([*names, "coordinator"]), "at": round(draw.uniform(0, 6), 2)}
        else:
            # The first island stays, so that there is somebody to finish.
            most = 3 if kind in ("nan", "base", "far", "late", "gone") else 3 * aggregate["sync_every"]
            fault = {"kind": kind, "who": draw.choice(names[1:]), "at": draw.randrange(1, most + 1)}
        if fault["who"] not in taken:
            planned.append(fault)
    return {"aggregate": aggregate, "names": names, "faults": planned}


def function_of(schedule: dict[str, Any], who: str) -> Fault | None:
    """What a process is to do to itself."""
    for fault in schedule["faults"]:
        function = (OF_ISLANDS | OF_COORDINATOR).get(fault["kind"])
        if fault["who"] == who and function is not None:
            return partial(function, fault["at"])
    return None


def fault_of(schedule: dict[str, Any], who: str, kind: str) -> dict[str, Any] | None:
    """The fault of this kind that is planned for somebody."""
    return next((f for f in schedule["faults"] if (f["who"], f["kind"]) == (who, kind)), None)


class Campaign:
    """One schedule being carried out."""

    def __init__(self, run: Islands, schedule: dict[str, Any]):
        self.run, self.schedule = run, schedule
        self.began = time.monotonic()
        self.done: set[str] = set()
        self.stopped_at: dict[str, float] = {}
        self.ends: Counter[str] = Counter()
        self.gone: set[str] = set()

    def carry_out(self) -> str | None:
        """Until the run is over; a sentence where it does not end."""
        for name in ("coordinator", *self.schedule["names"]):
            if fault_of(self.schedule, name, "late") is None:
                self.run.start(name, function_of(self.schedule, name))
        while not self.over():
            if time.monotonic() > self.began + PATIENCE_S:
                return f"it has not ended within {PATIENCE_S:.0f} s"
            for name in ("coordinator", *self.schedule["names"]):
                self.look_after(name)
            time.sleep(0.05)
        return None

    def over(self) -> bool:
        """Whether the run has finished and everybody has ended."""
        return bool(self.run.events("finished")) and all(
            process.exitcode is not None for process in self.run.processes.values()
        )

    def look_after(self, name: str) -> None:
        """Do to a process what is planned, and start it again where it has died."""
        process, now = self.run.processes.get(name), time.monotonic()
        if process is None:
            late = fault_of(self.schedule, name, "late")
            assert late is not None
            if len(self.run.events("round_committed")) >= min(late["at"], 2) and not self.run.events("finished"):
                self.run.start(name)
            return
        if process.exitcode is not None:
            if process.exitcode != 0 and name not in self.gone:
                self.ends[f"{'coordinator' if name == 'coordinator' else 'island'} {process.exitcode}"] += 1
                self.run.start(name)
            return
        kill = fault_of(self.schedule, name, "kill")
        if kill is not None and name not in self.done and self.training_for() > kill["at"]:
            self.done.add(name)
            process.kill()
        gone = fault_of(self.schedule, name, "gone")
        if gone is not None and name not in self.gone and self.steps_of(name) >= gone["at"]:
            self.gone.add(name)
            process.kill()
        if fault_of(self.schedule, name, "paused") is not None and stands_still(process.pid):
            since = self.stopped_at.setdefault(name, now)
            if now > since + 1.5 * self.schedule["aggregate"]["round_deadline_s"]:
                psutil.Process(process.pid).send_signal(signal.SIGCONT)

    def training_for(self) -> float:
        """Seconds since the first lease."""
        leased = self.run.events("leased")
        return time.time() - leased[0]["time"] if leased else -1.0

    def steps_of(self, name: str) -> int:
        """How many leases an island has had."""
        return sum(event["island"] == name for event in self.run.events("leased"))


def stands_still(pid: int | None) -> bool:
    """Whether a process is there and stopped."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def final_adapter(run_dir: Path, events: list[Event]) -> list[str]:
    """What is wrong with the final adapter beside the last committed round."""
    named = [event["facts"] for event in events if event["kind"] == "round_committed"]
    last = safetensors.torch.load_file(
        run_dir / "rounds" / named[-1]["folder"] / "adapter" / "adapter_model.safetensors"
    )
    found = [] if digest(last) == named[-1]["sha256"] else ["the last round's adapter has changed"]
    final = safetensors.torch.load_file(run_dir / "adapter" / "adapter_model.safetensors")
    if last.keys() != final.keys() or not all(torch.equal(last[name], final[name]) for name in last):
        found.append("the final adapter is not the last committed one")
    if not all(bool(tensor.isfinite().all()) for tensor in final.values()):
        found.append("the final adapter is not finite")
    return found


def one(number: int, seed: int, folder: Path, model: Path) -> dict[str, Any]:
    """One schedule, from its start to the look at its log."""
    draw = random.Random(f"{seed} {number}")
    schedule = make_schedule(draw)
    began = time.monotonic()
    run = Islands(
        folder, model, aggregate=schedule["aggregate"], adapter={"lora_dropout": 0.0}, run={"seed": number},
        # Islands that are late are not waited for.
        launch={"start_timeout_s": 3},
        train={
            "max_steps": draw.choice([5, 6, 7]) * schedule["aggregate"]["sync_every"],
            "global_batch_size": 2, "per_device_train_batch_size": 2,
        },
    )  # fmt: skip
    with run:
        campaign = Campaign(run, schedule)
        stuck = campaign.carry_out()
    events = run.events()
    found = violations(events, over=not stuck)
    found += [stuck] if stuck else final_adapter(run.run_dir, events)
    rounds = run.events("round_committed")
    finished = run.events("finished")
    summary = finished[-1]["summary"] if finished else {}
    return {
        "schedule": number,
        "seed": seed,
        **{key: schedule[key] for key in ("aggregate", "faults")},
        "seconds": round(time.monotonic() - began, 1),
        "rounds": len(rounds),
        "closed_by": dict(Counter(event["why"] for event in rounds)),
        "contributions": sum(len(event["counted"]) for event in rounds),
        "late": sum(entry["late"] > 0 for event in rounds for entry in event["counted"]),
        "refused": len(run.events("contribution_refused")) + sum(len(event["refused"]) for event in rounds),
        "started_again": dict(campaign.ends),
        "packs_trained": summary.get("packs_trained"),
        "packs_dropped": summary.get("packs_dropped"),
        "violations": found,
    }


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The tally, and where it comes from."""
    return {
        "schedules": len(records),
        "faults": dict(Counter(fault["kind"] for record in records for fault in record["faults"])),
        "violations": sum(bool(record["violations"]) for record in records),
        **{
            key: sum(record[key] or 0 for record in records)
            for key in ("rounds", "contributions", "late", "refused", "packs_trained", "packs_dropped")
        },
        "processes_started_again": sum(sum(record["started_again"].values()) for record in records),
        "hardware": f"{psutil.cpu_count()} CPU cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, no GPU",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=Path, help="one JSON line a schedule; what is there already counts too")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/island_faults.json"))
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="island-faults-"))
    os.environ["QLORA_DIST_CACHE"] = str(folder / "cache")
    model = make_tiny_model(folder / "model")
    path = arguments.records or folder / "records.jsonl"
    known = {json.loads(line)["schedule"] for line in path.read_text().splitlines()} if path.exists() else set()
    with path.open("a") as file:
        for number in range(arguments.first, arguments.first + arguments.schedules):
            if number in known:
                continue
            record = one(number, arguments.seed, folder / f"run-{number}", model)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(json.dumps(record), flush=True)
            if not record["violations"]:
                shutil.rmtree(folder / f"run-{number}")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    summary = summarise(records)
    print(json.dumps(summary, indent=1))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(summary | {"records": records}, indent=1) + "\n")
    if not summary["violations"]:
        shutil.rmtree(folder)
    return 1 if summary["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
