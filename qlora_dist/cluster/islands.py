"""Starts a run of islands on this machine: the coordinator and the islands are its children.

Each is a process as a person would start it on a machine of its own. One that dies is started again; the coordinator
goes on from its log, an island joins anew and goes on from the current adapter.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from qlora_dist.cluster.outcome import Outcome
from qlora_dist.cluster.outer import LOCK_TIMEOUT_S, look_back, read_end, start_job
from qlora_dist.cluster.output import logs_folder, next_attempt
from qlora_dist.cluster.stop_signals import StopSignals, stop_on_signals, tell
from qlora_dist.config.errors import UserError
from qlora_dist.config.load import to_yaml
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.client import CoordinatorError, HttpClient, Unreachable
from qlora_dist.coordinate.decisions import Decisions
from qlora_dist.coordinate.outer_address import ADDRESS_FILE, outer_address
from qlora_dist.coordinate.replay import normalise
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.rundir import RUN_FILE, open_run
from qlora_dist.coordinate.stop import ask_at_once

ROLE_VARIABLE = "QLORA_DIST_ROLE"
CONFIG_VARIABLE = "QLORA_DIST_CONFIG"
PARENT_VARIABLE = "QLORA_DIST_PARENT"
COORDINATOR, ISLANDS = "coordinator", "islands"
POLL_S = 0.2
# For the coordinator to say where it is; it imports torch.
START_S = 120.0
# For children to end after the run has.
END_S = 60.0
STOPPED = {128 + number for number in (signal.SIGTERM, signal.SIGUSR1)}


@dataclass
class Child:
    """A process of the run: the coordinator, or an island by its name.

    Attributes:
        restarts: how often it was started again.
        failures: (reason, step) of each.
        code: how it ended for good; None while it lives.
    """

    name: str
    config: RunConfig
    devices: str | None = None
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    restarts: int = 0
    failures: list[tuple[str, int | None]] = field(default_factory=list)
    code: int | None = None


def run_islands(config: RunConfig, run_dir: Path) -> Outcome:
    """Run the coordinator and the islands, in a run folder that is made where there is none, until the run has ended.

    Returns:
        Exit code 0 where everything is trained or reported as dropped.

    Raises:
        UserError: everything that the run began with is, and by these settings there is more to train, or less.
    """
    run_dir = run_dir.resolve()
    if (ended := look_back(config, run_dir)) is not None:
        return ended
    open_run(run_dir, to_yaml(config))
    start_job(run_dir, "islands")
    group = Group(config, run_dir)
    try:
        with stop_on_signals(run_dir) as signals:
            return group.run(signals)
    finally:
        group.end()


class Group:
    """The children, and what becomes of them."""

    def __init__(self, config: RunConfig, run_dir: Path):
        self.config, self.run_dir = config, run_dir
        self.folder = logs_folder(run_dir) / f"attempt-{next_attempt(run_dir)}"
        self.folder.mkdir(parents=True)
        # The order of the event log, by which stop requests are seen.
        self.decisions = Decisions(run_dir, LOCK_TIMEOUT_S)
        self.coordinator = Child(COORDINATOR, config)
        slices = device_slices(config)
        self.islands = [
            Child(str(number), island_config(config, run_dir, number), slices[number])
            for number in range(config.aggregate.islands)
        ]
        self.forwarded: set[int] = set()

    def run(self, signals: StopSignals) -> Outcome:
        """Start everything, and keep it alive until the run is over."""
        self.start(self.coordinator)
        new = not (self.run_dir / ADDRESS_FILE).exists()
        waiting, deadline = list(self.islands), time.monotonic() + START_S
        while True:
            # What an earlier start has left may say of another port than the coordinator gets.
            if waiting and (new or self.coordinator_is_up() or time.monotonic() > deadline):
                for island in waiting:
                    self.start(island)
                waiting = []
            for child in (self.coordinator, *self.islands):
                if child.process is not None and (code := child.process.poll()) is not None:
                    self.ended(child, code)
            if (outcome := self.over()) is not None:
                return signals.outcome(outcome)
            self.pass_on_stop()
            time.sleep(POLL_S)

    def coordinator_is_up(self) -> bool:
        """Whether the coordinator's process has said where it is."""
        process, file = self.coordinator.process, self.run_dir / ADDRESS_FILE
        return process is not None and file.exists() and json.loads(file.read_text())["key"] == str(process.pid)

    def over(self) -> Outcome | None:
        """How the run ended, once it has."""
        mended = [child for child in (self.coordinator, *self.islands) if child.code == 2]
        # An island that was too late for anything is no mistake of the run's.
        if mended and self.decisions.run.finished is None:
            return Outcome(2, self.reason(mended[0]))
        if self.coordinator.process is not None and all(child.code is not None for child in self.islands):
            finished = self.decisions.run.finished is not None
            failed = [] if finished else [child for child in self.islands if child.code not in (0, *STOPPED)]
            if len(failed) == len(self.islands):
                reason = failed[0].failures[-1][0] if failed[0].failures else "it ended"
                logs, rounds = self.folder, self.decisions.run.rounds.round + 1
                return Outcome(1, UserError("islands-all-gone", reason=reason, logs=logs, round=rounds).message)
        if self.coordinator.process is None and self.coordinator.code is not None:
            if self.coordinator.code == 0:
                self.wait_for_islands()
                return read_end(self.run_dir)
            return Outcome(1, f"the coordinator failed: {self.reason(self.coordinator)}")
        return None

    def ended(self, child: Child, code: int) -> None:
        """A child's process has ended: start it again, or leave it."""
        child.process = None
        self.decisions.catch_up()
        if self.decisions.run.stop is not None and -code in (signal.SIGTERM, signal.SIGUSR1):
            # It had ended its work, and its handlers, when it was asked to.
            code = 128 - code
        if code == 0 or code in STOPPED or code == 2:
            child.code = code
            if code != 0 and child is not self.coordinator:
                self.tell_coordinator(child, "it was stopped" if code in STOPPED else self.reason(child))
            return
        reason = f"died of {signal.Signals(-code).name}" if code < 0 else self.reason(child)
        step = self.step_of(child)
        same = [known for known in child.failures if (normalise(known[0]), known[1]) == (normalise(reason), step)]
        child.failures.append((reason, step))
        # A kill says nothing of what would happen again.
        stopping = child is not self.coordinator and self.decisions.run.stop is not None
        again = child.restarts < self.config.launch.max_restarts and not (same and code > 0) and not stopping
        who = "the coordinator" if child is self.coordinator else f"island {child.name}"
        line = f"{who} {reason}; " + ("starting it again" if again else "it is not started again")
        tell(line)
        self.note(child.name, line, again)
        if again:
            child.restarts += 1
            self.start(child)
        else:
            child.code = 1
            if child is not self.coordinator:
                self.tell_coordinator(child, reason)

    def start(self, child: Child) -> None:
        """Start a child's process."""
        environment = os.environ | {
            ROLE_VARIABLE: COORDINATOR if child is self.coordinator else "island",
            CONFIG_VARIABLE: child.config.model_dump_json(),
            PARENT_VARIABLE: str(os.getpid()),
        }
        if child.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = child.devices
        name = child.name if child is self.coordinator else f"island-{child.name}"
        if child.log is None:
            child.log = (self.folder / f"{name}.log").open("ab")
        child.process = subprocess.Popen(
            [sys.executable, "-m", "qlora_dist.cluster.island_entry"], env=environment, stdin=subprocess.DEVNULL,
            stdout=child.log, stderr=child.log, start_new_session=True,
        )  # fmt: skip

    def pass_on_stop(self) -> None:
        """Islands stop where somebody has asked the run to, by a signal or by `qlora-dist stop`."""
        self.decisions.catch_up(max_age_s=1.0)
        run = self.decisions.run
        codes = [island.code for island in self.islands]
        if run.stop is None and run.finished is None and None not in codes and STOPPED & {*codes}:
            # Whoever failed for good beside them is not coming back either.
            ask_at_once(self.run_dir, "all islands were asked to stop")
        if run.stop is None:
            return
        for island in self.islands:
            # An island that has no run folder yet could not be asked; the coordinator gives it nothing to train.
            if island.process is None or island.process.pid in self.forwarded:
                continue
            if (island.config.run_dir / RUN_FILE).exists() and self.step_of(island) is not None:
                self.forwarded.add(island.process.pid)
                # Not SIGTERM, whose second one, from whoever sends it to all processes, would end it at once.
                island.process.send_signal(signal.SIGUSR1)

    def step_of(self, child: Child) -> int | None:
        """The step that an island's last status tells; of the coordinator the round."""
        if child is self.coordinator:
            return self.decisions.run.rounds.round
        if not (child.config.run_dir / RUN_FILE).exists():
            return None
        step: int | None = read_status(child.config.run_dir)["step"]
        return step

    def reason(self, child: Child) -> str:
        """The last line that a child has written."""
        name = child.name if child is self.coordinator else f"island-{child.name}"
        lines = (self.folder / f"{name}.log").read_text(errors="replace").split("\n")
        written = [line for line in lines if line.strip() and not line.startswith("the workers' output")]
        return written[-1].removeprefix("error: ") if written else "ended without a word"

    def tell_coordinator(self, child: Child, reason: str) -> None:
        """Rounds need not wait for an island that will not come back."""
        if self.decisions.run.finished is not None or self.coordinator.process is None:
            return
        try:
            url, token = outer_address(str(self.run_dir), self.run_dir)
            HttpClient(url, token, timeout_s=10.0, patience_s=10.0).call(
                "island_ended", island=child.name, reason=reason
            )
        except (Unreachable, CoordinatorError, UserError) as error:
            tell(f"the coordinator has not heard that island {child.name} ended: {error}")

    def note(self, name: str, message: str, again: bool) -> None:
        """Keep it in the event log."""
        with self.decisions.deciding():
            self.decisions.decide("process_ended", process=name, message=message, restart=again)

    def wait_for_islands(self) -> None:
        """The run has ended; islands write their last files."""
        deadline = time.monotonic() + END_S
        while any(island.process is not None for island in self.islands) and time.monotonic() < deadline:
            for island in self.islands:
                if island.process is not None and island.process.poll() is not None:
                    island.process = None
            time.sleep(POLL_S)

    def end(self) -> None:
        """End what is left, whatever happened."""
        alive = [c.process for c in (*self.islands, self.coordinator) if c.process is not None]
        for process in alive:
            process.terminate()
        deadline = time.monotonic() + 10.0
        for process in alive:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for child in (self.coordinator, *self.islands):
            if child.log is not None:
                child.log.close()


def island_config(config: RunConfig, run_dir: Path, number: int) -> RunConfig:
    """The configuration of one island: the run's, in a folder of its own."""
    values: dict[str, Any] = config.model_dump()
    values["output_dir"] = run_dir / ISLANDS / str(number)
    values["name"] = f"{config.name}-island{number}"
    values["resume"] = "auto"
    values["aggregate"] |= {"coordinator": str(run_dir), "island": str(number)}
    values["track"] |= {"prometheus_port": None, "report": False}
    values["track"] |= {"wandb_group": config.track.wandb_group or config.name, "wandb_name": None}
    if number:
        values["eval"]["sample_prompts"] = 0
    return RunConfig.model_validate(values)


def device_slices(config: RunConfig) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each island: GPUs of its own where there are enough; else all share what there is."""
    islands, workers = config.aggregate.islands, config.launch.max_workers
    found = 0 if config.launch.device == "cpu" else torch.cuda.device_count()
    if config.launch.address is not None or found < islands * workers:
        return [None] * islands
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(found)]
    return [",".join(names[n * workers : (n + 1) * workers]) for n in range(islands)]
