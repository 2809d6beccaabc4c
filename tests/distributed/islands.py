"""Runs of islands for tests: real processes of coordinator and islands, faults, and what must hold of a log."""

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from qlora_dist.config.load import to_yaml
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.ranges import as_ranges, count
from qlora_dist.coordinate.rundir import open_run
from qlora_dist.coordinate.service import CoordinatorService
from qlora_dist.coordinate.state import Coordinator
from tests.distributed.group import CONTEXT, TOKEN, _worker_process, free_port
from tests.single import small_config

Event = dict[str, Any]
Fault = Callable[[], None]
PATIENCE_S = 240.0


class Islands:
    """One run: its processes by name ("coordinator" or an island's), all of which end with the block."""

    def __init__(self, folder: Path, base: Path, **sections: dict[str, Any]):
        self.run_dir = folder / "run"
        sections["aggregate"] = {"islands": 2, "sync_every": 2, "method": "mean"} | sections.get("aggregate", {})
        sections["track"] = {"tensorboard": False}
        self.config = small_config(self.run_dir, base, **sections)
        self.processes: dict[str, ForkServerProcess] = {}
        self.services: list[CoordinatorService] = []

    def __enter__(self) -> "Islands":
        open_run(self.run_dir, to_yaml(self.config))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
        for service in self.services:
            service.stop()

    def start(self, name: str, fault: Fault | None = None, workers: int = 1, **sections: dict[str, Any]) -> None:
        """Start a process of this name (again).

        Args:
            fault: a module-level function that the process calls first.
            workers: of this island; several are processes of a group, whose coordinator is in this process.
            sections: settings of this island alone.
        """
        role, config = _coordinate, self.config
        if name != "coordinator":
            values = config.model_dump()
            values |= {"output_dir": self.run_dir / "islands" / name}
            values["aggregate"] |= {"coordinator": str(self.run_dir), "island": name}
            for section, own in sections.items():
                values[section] |= own
            if workers > 1:
                values["launch"] |= {"backend": "torchrun", "num_workers": workers}
                self.start_group(name, RunConfig.model_validate(values), workers)
                return
            role, config = _train, RunConfig.model_validate(values)
        old = self.processes.get(name)
        if old is not None:
            old.kill()
            old.join()
        self.processes[name] = CONTEXT.Process(target=role, args=(config, self.run_dir, fault, dict(os.environ)))
        self.processes[name].start()

    def start_group(self, name: str, config: RunConfig, workers: int) -> None:
        """Start an island of several workers."""
        info = open_run(config.run_dir, to_yaml(config))
        service = CoordinatorService(Coordinator(config.run_dir), TOKEN)
        self.services.append(service)
        plans = [(config, service.url, info.nonce, free_port())]
        for rank in range(workers):
            arguments = (rank, workers, "cpu", plans, None, dict(os.environ))
            self.processes[f"{name}.{rank}"] = CONTEXT.Process(target=_worker_process, args=arguments)
            self.processes[f"{name}.{rank}"].start()

    def events(self, *kinds: str) -> list[Event]:
        """The log's whole lines, of these kinds."""
        path = self.run_dir / "events.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith(b"\n")]
        return [event for event in events if not kinds or event["kind"] in kinds]

    def wait(self, what: str, true: Callable[[], bool]) -> None:
        """Wait until `true()`."""
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < deadline, f"waited in vain for {what}: {self.events()[-3:]}"
            time.sleep(0.05)

    def wait_killed(self, name: str) -> None:
        """Wait until this process has died of SIGKILL."""
        self.wait("the kill", lambda: self.processes[name].exitcode == -signal.SIGKILL)

    def finish(self) -> dict[str, Any]:
        """Wait for the end of the run; its summary."""
        self.wait("the end", lambda: bool(self.events("finished")))
        for process in self.processes.values():
            process.join(60)
        assert [process.exitcode for process in self.processes.values()] == [0] * len(self.processes)
        summary: dict[str, Any] = self.events("finished")[-1]["summary"]
        return summary


def _coordinate(config: RunConfig, run_dir: Path, fault: Fault | None, environment: dict[str, str]) -> None:
    from qlora_dist.cluster.outer import coordinate

    _begin(fault, environment)
    coordinate(config, run_dir, "127.0.0.1", None, alone=False)


def _train(config: RunConfig, run_dir: Path, fault: Fault | None, environment: dict[str, str]) -> None:
    from tests.single import train_here

    _begin(fault, environment)
    try:
        outcome = train_here(config)
        assert outcome["state"] == "finished", outcome
    except BaseException:
        traceback.print_exc()
        raise


def _begin(fault: Fault | None, environment: dict[str, str]) -> None:
    import torch

    os.environ |= environment
    torch.set_num_threads(1)
    if fault is not None:
        fault()


# Faults


def at_step(step: int, act: Callable[[], None]) -> None:
    """Have this process `act` before its step number `step`, counted from 1."""
    from qlora_dist.train.island_loop import IslandLoop

    take_step, taken = IslandLoop.take_step, 0

    def faulty(self: IslandLoop) -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            act()
        take_step(self)

    IslandLoop.take_step = faulty  # type: ignore[method-assign]


def killed(step: int = 4) -> None:
    """SIGKILL before a step; the default is in the middle of the second lease."""
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def paused(step: int = 4) -> None:
    """SIGSTOP before a step, until somebody sends SIGCONT."""
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def has_little_time() -> None:
    """After a stop the coordinator is waited for for two seconds."""
    from qlora_dist.train import island_loop

    island_loop.STOP_S = 2.0


def sends_nan(round: int = 1) -> None:
    """A NaN in the first contribution for this round or a later one."""
    _with_change(round, lambda island, lease, change: next(iter(change.values())).view(-1)[:1].fill_(float("nan")))


def of_another_base(round: int = 1) -> None:
    """That contribution says that it is over another base."""

    def act(island: Any, lease: Event, change: Any) -> None:
        island.base = "0" * 64

    _with_change(round, act, undo=True)


def far_out(round: int = 1) -> None:
    """That change is a thousand times what it was."""

    def act(island: Any, lease: Event, change: Any) -> None:
        for tensor in change.values():
            tensor *= 1000

    _with_change(round, act)


def _with_change(round: int, act: Callable[..., object], undo: bool = False) -> None:
    from qlora_dist.train.island import Island

    exchange, done = Island.exchange, False

    def faulty(self: Island, lease: Event, change: Any, *rest: Any) -> Any:
        nonlocal done
        base = self.base
        if lease["round"] >= round and not done:
            done = True
            act(self, lease, change)
        under_way = exchange(self, lease, change, *rest)
        if undo and self.base != base:
            under_way.sent.result()
            self.base = base
        return under_way

    Island.exchange = faulty  # type: ignore[method-assign]


def dies_before_the_commit(round: int = 1) -> None:
    """The coordinator is killed when this round's files are on the disk, and no event names them."""
    from qlora_dist.aggregate import outer_loop

    write_version = outer_loop.write_version

    def faulty(run_dir: Path, before: Any, *rest: Any) -> Any:
        version = write_version(run_dir, before, *rest)
        marker = run_dir / "killed"
        if version.state.round == round + 1 and not marker.exists():
            marker.write_text(f"{version.sha256} {version.folder}")
            os.kill(os.getpid(), signal.SIGKILL)
        return version

    outer_loop.write_version = faulty


def dies_after_the_commit(round: int = 1) -> None:
    """The coordinator is killed when this round is committed, and nobody has heard of it."""
    from qlora_dist.coordinate.decisions import Decisions

    decide = Decisions.decide

    def faulty(self: Decisions, kind: str, **fields: Any) -> Event:
        event = decide(self, kind, **fields)
        marker = self.run_dir / "killed"
        if kind == "round_committed" and event["round"] == round and not marker.exists():
            marker.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return event

    Decisions.decide = faulty  # type: ignore[method-assign]


# What must hold


def violations(events: list[Event], over: bool = True) -> list[str]:
    """What a log of islands must not say; empty where all is well.

    No committed round is lost or counted twice: each begins with the adapter of the one before. No contribution and no
    pack is counted twice; each pack is trained, or reported as dropped, or (before the end) still to come.

    Args:
        over: the run has finished.
    """
    found = []
    begun = [event for event in events if event["kind"] == "islands_begun"]
    rounds = [event for event in events if event["kind"] == "round_committed"]
    trained_by = {event["lease"]: event["trained"] for event in events if event["kind"] == "contributed"}
    if len(begun) != 1:
        return [] if not events or not over else [f"{len(begun)} starts"]
    folders = [begun[0]["folder"], *(event["facts"]["folder"] for event in rounds)]
    if [event["round"] for event in rounds] != list(range(len(rounds))):
        found.append(f"rounds {[event['round'] for event in rounds]}")
    if [event["facts"]["before"] for event in rounds] != folders[:-1]:
        found.append("a round does not follow from the one committed before it")
    counted = [entry["lease"] for event in rounds for entry in event["counted"]]
    if len(set(counted)) < len(counted):
        found.append(f"counted twice: {sorted(counted)}")
    trained = [part for lease in counted for part in trained_by[lease]]
    dropped = [part for event in events for part in event.get("dropped", ())]
    try:
        together = as_ranges([*trained, *dropped])
    except ValueError as error:
        return [*found, f"a pack is counted twice: {error}"]
    packs = begun[0]["packs"]
    if over and (count(together) != packs or together != [(0, packs)]):
        found.append(f"of {packs} packs only {together} are trained or dropped")
    return found


def packs_of(events: list[Event], lease: int) -> list[list[int]]:
    """The ranges that a contribution stands for."""
    return next(event["trained"] for event in events if event["kind"] == "contributed" and event["lease"] == lease)
