"""Whether the run folder behaves on every node as the coordinator and the checkpoints need it to.

What a run uses is used here: `write_atomically`, `check_shared`, the event log under its file lock, exclusive creation,
folders that get their name by a rename. All of it happens in a folder of its own, which goes after.
"""

import json
import os
import secrets
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_dist.cluster.doctor.machine import existing
from qlora_dist.cluster.doctor.meeting import Meeting
from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.files import explain, write_atomically
from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.rundir import RUN_FILE, check_shared

Facts = dict[str, Any]
APPENDS = 5
WRITES = 3
SEEN_WAIT_S = 3.0
LOCK_TIMEOUT_S = 20.0


def folder_facts(run_dir: Path, meeting: Meeting, tell: Callable[[Facts], None]) -> Facts:
    """How the run folder behaves on this node.

    Args:
        meeting: of one rank a node; all of them call this.
        tell: takes {"probe": the folder that is made here}, which stays where this process is killed.

    Returns:
        {"error": ...} where this node sees another folder or cannot write; else what was measured, see `_use`.
    """
    if not meeting.leads:
        told = meeting.hear("folder")
        if "error" in told:
            return {"skipped": "the first node could not write"}
        return _follow(Path(told["path"]), told["nonce"], meeting)
    probe, nonce = None, secrets.token_hex(16)
    try:
        probe = existing(run_dir) / f".doctor-{secrets.token_hex(6)}"
        tell({"probe": str(probe)})
        probe.mkdir()
        write_atomically(probe / RUN_FILE, json.dumps({"run_id": "doctor", "nonce": nonce, "created": 0.0}).encode())
        write_atomically(probe / "replaced", b"before")
        meeting.tell("folder", {"path": str(probe), "nonce": nonce})
        return _use(probe, meeting, None)
    except OSError as error:
        meeting.tell("folder", {"error": error.strerror})
        return {"error": _sentence(error, run_dir)}
    finally:
        if probe is not None:
            shutil.rmtree(probe, ignore_errors=True)


def _follow(probe: Path, nonce: str, meeting: Meeting) -> Facts:
    try:
        check_shared(probe, nonce, SEEN_WAIT_S)
    except UserError:
        return _use(probe, meeting, f"{probe.parent} is another folder here than on the first node, or not there")
    except OSError as error:
        return _use(probe, meeting, _sentence(error, probe.parent))
    return _use(probe, meeting, None)


def _use(probe: Path, meeting: Meeting, unseen: str | None) -> Facts:
    """Use the folder together with the other nodes that see it.

    Returns:
        error: why this node cannot use it; nothing else then.
        won: whether this node was the one to create a file that all try to create.
        turns: how many events each of this node's appends to the log found there, which no two appends may share.
        write_ms: the median of small durable writes.
        clock_s: how far the storage's clock is ahead of this node's, from a new file's mtime.
        lag_s: how long this node saw an old file after another had replaced it; None where it never saw the new one.
    """
    waiting = meeting.of(meeting.members)
    waiting.limit_s = meeting.limit_s + SEEN_WAIT_S
    seen = waiting.gather("seen", unseen is None)
    if unseen is not None:
        return {"error": unseen}
    together = waiting.of([rank for rank, sees in seen.items() if sees])
    facts: Facts = {"nodes": len(together.members)}
    try:
        facts |= {"won": _race(probe), **_write(probe, together.rank), "turns": _append(probe, together.rank)}
        # NFS keeps for a while what it has once said of a file.
        (probe / "replaced").read_bytes()
    except (OSError, UserError) as error:
        facts["error"] = _sentence(error, probe.parent)
    used = together.gather("used", facts)
    if together.leads:
        write_atomically(probe / "replaced", b"after")
        together.tell("replaced", True)
    elif "error" not in facts and together.hear("replaced"):
        facts["lag_s"] = _until(probe / "replaced", b"after", SEEN_WAIT_S)
    together.gather("left", True)
    return facts | {"used": len(used)}


def _race(probe: Path) -> bool:
    try:
        os.close(os.open(probe / "exclusive", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _write(probe: Path, rank: int) -> Facts:
    times = []
    partial, whole = probe / f"partial-{rank}", probe / f"whole-{rank}"
    partial.mkdir()
    for _ in range(WRITES):
        begun = time.perf_counter()
        write_atomically(partial / "file", bytes(1 << 16))
        times.append(1e3 * (time.perf_counter() - begun))
    before = time.time()
    write_atomically(partial / "clock", b"")
    ahead = os.stat(partial / "clock").st_mtime - (before + time.time()) / 2
    # As a checkpoint gets its name.
    os.rename(partial, whole)
    if not (whole / "file").is_file():
        raise OSError(f"a renamed folder has lost its files in {probe.parent}")
    return {"write_ms": statistics.median(times), "clock_s": ahead}


def _append(probe: Path, rank: int) -> list[int]:
    log, turns, known = EventLog(probe / "events.jsonl", LOCK_TIMEOUT_S), [], 0
    for _ in range(APPENDS):
        with log.locked():
            known += len(log.read_new())
            log.append({"kind": "doctor", "rank": rank})
            turns.append(known)
    return turns


def _until(path: Path, content: bytes, limit_s: float) -> float | None:
    begun = time.monotonic()
    while path.read_bytes() != content:
        if time.monotonic() - begun > limit_s:
            return None
        time.sleep(0.01)
    return time.monotonic() - begun


def _sentence(error: OSError | UserError, folder: Path) -> str:
    """What is wrong, without the mend, which is the examination's to give."""
    told = explain(error, folder) if isinstance(error, OSError) else error
    return (
        f"{folder}: {error.strerror or error}"
        if told is error and isinstance(error, OSError)
        else str(told).partition(";")[0]
    )
