"""What the batch scripts in slurm/ ask of a run: `python -m qlora_dist.cluster.slurm_job COMMAND ...`.

    run-dir CONFIG [OVERRIDES]    the run's folder; exit code 2 and a sentence where the configuration is wrong
    stop RUN_DIR SINCE SECONDS REASON   ask for a checkpoint and the end, until the run has ended; 1 where it has not
    state RUN_DIR SINCE           finished, stopped, failed, running, starting, or new
    exit-code RUN_DIR SINCE       1, or 2 where a person must mend what ended the run
    wait-ray ADDRESS N SECONDS    until N nodes have joined; 1 where they have not

Everything is read from the run folder and asked through it, so that it works from any node and under any launcher.
SINCE is when the Slurm job started (seconds since the epoch): how an earlier one ended is not taken for its end.
"""

import os
import sys
import time
from pathlib import Path

from qlora_dist.config.errors import UserError
from qlora_dist.config.load import load_config, with_absolute_paths
from qlora_dist.config.redact import redact
from qlora_dist.coordinate import report
from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.replay import Run
from qlora_dist.coordinate.rundir import EVENTS_FILE
from qlora_dist.coordinate.state import Coordinator

POLL_S = 0.5
ENDED = ("finished", "stopped", "failed")


def stop(run_dir: Path, since: float, timeout_s: float, reason: str) -> bool:
    """Ask a run for a checkpoint at the next step boundary and its end, and wait for that.

    A run forgets with its start what was asked for before, so it is asked once its workers are there. Ends with the
    process that started this one: nobody would be left to act on the answer.

    Returns:
        Whether the run has ended within `timeout_s` seconds.
    """
    deadline, parent = time.monotonic() + timeout_s, os.getppid()
    while time.monotonic() < deadline and os.getppid() == parent:
        run = replayed(run_dir, since)
        if run is not None and run.state() in ENDED:
            return True
        if run is not None and run.state() == "running" and run.stop is None:
            Coordinator(run_dir).request_stop(reason)
        time.sleep(POLL_S)
    return False


def state(run_dir: Path, since: float) -> str:
    """How a run stands; "new" where it has not begun, "finished" where a stop came after its last step."""
    run = replayed(run_dir, since)
    if run is None:
        return "new"
    if run.state() == "stopped" and run.finished is not None:
        return "finished" if run.finished["step"] == report.read_status(run_dir).get("max_steps") else "stopped"
    return run.state()


def exit_code(run_dir: Path, since: float) -> int:
    """The exit code of a run that failed: torchrun has one for everything."""
    run = replayed(run_dir, since)
    told = None if run is None else report.outcome(run)["exit_code"]
    return 2 if told == 2 else 1


def wait_for_nodes(address: str, nodes: int, timeout_s: float) -> bool:
    """Whether so many nodes have joined the Ray cluster at `address` within `timeout_s` seconds."""
    import logging

    import ray

    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
            break
        except ConnectionError:  # the head is not there yet
            time.sleep(POLL_S)
    while ray.is_initialized() and time.monotonic() < deadline:
        if sum(node["Alive"] for node in ray.nodes()) >= nodes:
            return True
        time.sleep(POLL_S)
    return False


def replayed(run_dir: Path, since: float) -> Run | None:
    """A run's state as its event log has it; None where it has not been started since then."""
    path = run_dir / EVENTS_FILE
    events = EventLog(path).read_new() if path.exists() else []
    if not any(event["kind"] == "job" and event["time"] >= since for event in events):
        return None
    run = Run()
    for event in events:
        run.apply(event)
    return run


def main(command: str, *words: str) -> int:
    """One command; the exit code."""
    match command, words:
        case "run-dir", (config, *overrides):
            print(with_absolute_paths(load_config(config, overrides)).run_dir)
        case "stop", (run_dir, since, seconds, reason):
            return 0 if stop(Path(run_dir), float(since), float(seconds), reason) else 1
        case "state", (run_dir, since):
            print(state(Path(run_dir), float(since)))
        case "exit-code", (run_dir, since):
            print(exit_code(Path(run_dir), float(since)))
        case "wait-ray", (address, nodes, seconds):
            return 0 if wait_for_nodes(address, int(nodes), float(seconds)) else 1
        case _:
            raise ValueError(f"no such command: {command} {' '.join(words)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except UserError as error:
        print(f"error: {redact(error.message)}", file=sys.stderr)
        sys.exit(2)
