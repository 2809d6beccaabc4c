"""How a written folder becomes a checkpoint."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_dist.coordinate.decisions import Decisions
from qlora_dist.coordinate.files import empty_trash, fsync_folder, move_to_trash
from qlora_dist.coordinate.manifest import (
    CHECKPOINTS,
    Files,
    check_files,
    committed_name,
    find_problems,
    parse_writing,
    read_manifest,
    require_files,
    write_manifest,
)
from qlora_dist.coordinate.retention import retire


def commit(
    decisions: Decisions,
    run_id: str,
    generation: int,
    step: int,
    folder: str,
    files: Files,
    metrics: Mapping[str, Any],
    keep_last: int,
    keep_best: int,
    settle_s: float,
) -> dict[str, Any]:
    """Commit `checkpoints/FOLDER`; arguments and answer as in `Coordinator.commit`.

    The manifest is written last, the folder gets its name in one rename, then the event is appended, then older
    checkpoints go. Killed anywhere before the rename there is no checkpoint; anywhere after it there is.
    """
    if parse_writing(folder) != (generation, step):
        raise ValueError(f"{folder!r} is not a folder of generation {generation}, step {step} being written")
    require_files(files)
    writing = decisions.run_dir / CHECKPOINTS / folder
    name = committed_name(generation, step)
    _wait_for(decisions, generation, writing, writing.with_name(name), files, settle_s)
    with decisions.deciding() as run:
        if generation != run.generation:
            reason = f"generation {generation} commits nothing: generation {run.generation} has taken its place"
            decisions.decide("refused", generation=generation, step=step, reason=reason)
            return {"committed": False, "fenced": True, "reason": reason, "folder": None}
        final = writing.with_name(name)
        if final.exists() and find_problems(final, checksums=False):
            move_to_trash(final)
        if final.exists():
            metrics = _add_metrics(final, metrics)
            move_to_trash(writing)
        else:
            if problems := check_files(writing, files, checksums=False):
                reason = f"{folder} is not complete: {'; '.join(problems)}"
                decisions.decide("refused", generation=generation, step=step, reason=reason)
                return {"committed": False, "fenced": False, "reason": reason, "folder": None}
            write_manifest(writing, run_id, generation, step, time.time(), files, metrics)
            os.rename(writing, final)
            fsync_folder(final.parent)
        if run.committed.get(name, {}).get("metrics") != metrics:
            decisions.decide("committed", generation=generation, step=step, folder=name, metrics=metrics)
        if removed := retire(decisions.run_dir, keep_last, keep_best):
            decisions.decide("removed", folders=removed)
    empty_trash(decisions.run_dir / CHECKPOINTS)
    return {"committed": True, "fenced": False, "reason": None, "folder": name}


def _wait_for(decisions: Decisions, generation: int, writing: Path, final: Path, files: Files, settle_s: float) -> None:
    """Give a network filesystem time to show the files, without holding the lock."""
    deadline = time.monotonic() + settle_s
    while time.monotonic() < deadline:
        decisions.catch_up()
        if generation != decisions.run.generation or final.exists():
            return
        os.listdir(writing.parent)  # makes NFS ask the server again
        if not check_files(writing, files, checksums=False):
            return
        time.sleep(0.1)


def _add_metrics(folder: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    manifest = read_manifest(folder)
    merged = {**manifest["metrics"], **metrics}
    if merged != manifest["metrics"]:
        fields = (manifest["generation"], manifest["step"], manifest["time"], manifest["files"])
        write_manifest(folder, manifest["run_id"], *fields, merged)
    return merged
