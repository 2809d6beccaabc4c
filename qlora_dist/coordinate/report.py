"""What people are told of a run, from the coordinator or from the files alone."""

import json
import time
from pathlib import Path
from typing import Any

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.files import write_atomically
from qlora_dist.coordinate.heard import Heard
from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.replay import Run
from qlora_dist.coordinate.rundir import EVENTS_FILE, STATUS_FILE, read_run

# A run that claims to run and was not heard of for so long (seconds) is said to be silent.
SILENT_S = 30.0


def build(run_id: str, run: Run, heard: Heard, joined: list[int]) -> dict[str, Any]:
    """The status.

    Returns:
        run_id, generation, state (starting, running, finished, failed, stopped), step, max_steps, loss,
        tokens_per_second (sum over ranks), stragglers ([{rank, host, pid, busy_s, usual_s, sentence}]), seconds_left,
        ranks (one {rank, host, pid, step, phase, age_s, tokens_per_second, memory_bytes, busy_s (seconds a step outside
        collectives), ...} each), last_checkpoint ({folder, step, generation, time, metrics}), commits (in all),
        restarts ([{generation, step, reason, planned: True for a resize}] since the job started), rounds (of islands,
        see `rounds_told`), reason (why it failed or stopped), joined (ranks of a group that is not complete yet), time
        (seconds since the epoch).
    """
    now = time.monotonic()
    ranks = []
    for member in run.members:
        rank = member["rank"]
        age_s = now - heard.times[rank] if rank in heard.times else None
        busy_s = heard.stragglers.busy_s.get(rank)
        ranks.append({**member, **heard.last.get(rank, {}), "busy_s": busy_s, "age_s": age_s})
    speeds = [entry["tokens_per_second"] for entry in ranks if entry.get("tokens_per_second") is not None]
    return {
        "run_id": run_id,
        "time": time.time(),
        **_durable(run),
        "step": heard.step(),
        "max_steps": _first(ranks, "max_steps"),
        "loss": _first(ranks, "loss"),
        "tokens_per_second": sum(speeds) if speeds else None,
        "seconds_left": heard.seconds_left(now) if run.state() == "running" else None,
        "stragglers": list(heard.stragglers.named.values()) if run.state() == "running" else [],
        "ranks": ranks,
        "joined": joined,
    }


def _first(ranks: list[dict[str, Any]], key: str) -> Any:
    return next((entry[key] for entry in ranks if entry.get(key) is not None), None)


def _durable(run: Run) -> dict[str, Any]:
    last = run.last_committed()
    keys = ("folder", "step", "generation", "time", "metrics")
    return {
        "generation": run.generation,
        "state": run.state(),
        "reason": outcome(run)["message"],
        "last_checkpoint": None if last is None else {key: last[key] for key in keys},
        "commits": run.commits,
        "restarts": _restarts(run),
        "rounds": rounds_told(run),
    }


def rounds_told(run: Run) -> dict[str, Any] | None:
    """Where a run of islands stands; None for any other run.

    Returns:
        What `Rounds.report` does, with packs (in all), last (of the last round: round, why, time, counted, and
        facts.metrics), and refusals (the last ten: {island, lease, reason, time}).
    """
    if run.begun is None:
        return None
    last = run.rounds.last
    told = None
    if last is not None:
        told = {key: last[key] for key in ("round", "why", "time", "counted")}
        told["facts"] = {"metrics": last["facts"].get("metrics", {})}
    packs = run.begun["packs"]
    return {**run.rounds.report(packs), "packs": packs, "last": told, "refusals": run.refusals[-10:]}


def _restarts(run: Run) -> list[dict[str, Any]]:
    """New worker groups since the job started, after failures and for planned resizes, in order."""
    failed = [(event, False) for event in run.restarts if event["restart"]]
    resized = [(event, True) for event in run.resizes]
    return [
        {"generation": event["generation"], "step": event["step"], "reason": event["reason"], "planned": planned}
        for event, planned in sorted(failed + resized, key=lambda entry: entry[0]["time"])
    ]


def outcome(run: Run) -> dict[str, Any]:
    """How the run stands or ended.

    Returns:
        {"state", "kind": "user" | "memory" | "error" | None, "message", "rank", "step", "summary",
        "started_generation": the newest generation before this job, "out_of_memory": how often the run was since it
        started, "exit_code": 0 finished or stopped, 1 failed, 2 a person must mend something, None it goes on}.
    """
    state = run.state()
    answer: dict[str, Any] = {"state": state, "kind": None, "message": None, "rank": None, "step": None}
    answer |= {"summary": None, "exit_code": None, "started_generation": run.started_generation}
    answer["out_of_memory"] = run.out_of_memory
    if run.finished is not None:
        answer |= {"step": run.finished["step"], "summary": run.finished["summary"], "exit_code": 0}
        answer["message"] = run.stop["reason"] if run.stop is not None and state == "stopped" else None
        return answer
    failure = run.failure()
    if failure is not None:
        answer |= {"kind": failure["failure"], "message": failure["message"]}
        answer |= {"rank": failure["rank"], "step": failure["step"]}
    elif run.restarts and run.restarts[-1]["generation"] == run.generation:
        answer |= {"kind": "error", "message": run.restarts[-1]["reason"], "step": run.restarts[-1]["step"]}
    if state == "failed" and answer["kind"] == "error" and run.restarts and not run.restarts[-1]["restart"]:
        answer["message"] = run.restarts[-1]["reason"]
    if state == "failed":
        answer["exit_code"] = 1 if answer["kind"] == "error" else 2
    return answer


def write(run_dir: Path, status: dict[str, Any]) -> None:
    """Replace `status.json`; raises OSError."""
    write_atomically(run_dir / STATUS_FILE, (json.dumps(status, indent=1) + "\n").encode(), durable=False)


def read_status(run_dir: Path | str) -> dict[str, Any]:
    """The status from the run folder alone, without reaching the coordinator.

    Decisions come from the event log, the rest from the last status file if it is of the same generation.

    Returns:
        What `build` returns, with age_s (seconds since the run was last heard of), silent (it claims to run, or to
        start, and was not heard of for a while) and sentence (state and age for a person).

    Raises:
        UserError: there is no run in this folder.
    """
    run_dir = Path(run_dir)
    try:
        info = read_run(run_dir)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError("no-run", folder=run_dir) from error
    run = Run()
    for event in EventLog(run_dir / EVENTS_FILE).read_new():
        run.apply(event)
    told = _last_told(run_dir)
    status = build(info.run_id, run, Heard(run.generation, run.members), [])
    if told and told.get("generation") == run.generation:
        status = {**told, **_durable(run)}
        if status["state"] != "running":
            status["stragglers"] = []
    heard_at = max(told.get("time", 0.0), run.last_time or 0.0, info.created)
    age_s = max(0.0, time.time() - heard_at)
    silent = status["state"] in ("starting", "running") and age_s > SILENT_S
    sentence = f"run {info.run_id} is {status['state']}, last heard of {age_s:.0f} s ago"
    if silent:
        sentence = (
            f"run {info.run_id} claims to be {status['state']} but has not been heard of for {age_s:.0f} s: it was "
            "probably killed; the same command resumes it from the last checkpoint"
        )
    return {**status, "time": heard_at, "age_s": age_s, "silent": silent, "sentence": sentence}


def _last_told(run_dir: Path) -> dict[str, Any]:
    try:
        told = json.loads((run_dir / STATUS_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}  # none yet, or a power cut emptied it: the log has what matters
    return told if isinstance(told, dict) else {}
