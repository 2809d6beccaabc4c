"""Which checkpoint to go on from. Only manifests are believed, and only after every byte was checked."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.manifest import (
    CHECKPOINTS,
    MANIFEST,
    find_problems,
    list_committed,
    parse_committed,
    read_manifest,
)
from qlora_dist.coordinate.replay import Run
from qlora_dist.coordinate.rundir import EVENTS_FILE

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint as its manifest describes it; `metrics` are those given to the commit."""

    path: Path
    generation: int
    step: int
    time: float
    metrics: dict[str, Any]


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Checkpoints whose files are all there with the right sizes, newest (generation, step) first.

    Checksums are not computed; `verify` does that.
    """
    found = []
    for folder in _committed_folders(run_dir):
        if not find_problems(folder, checksums=False):
            manifest = read_manifest(folder)
            fields = {key: manifest[key] for key in ("generation", "step", "time", "metrics")}
            found.append(Checkpoint(folder, **fields))
    return found


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one phrase each; empty where every byte is as it was committed."""
    return find_problems(folder, checksums=True)


def _committed_folders(run_dir: Path) -> list[Path]:
    """Committed folders, newest first; also those that the log knows and a network filesystem does not list yet."""
    run = Run()
    for event in EventLog(run_dir / EVENTS_FILE).read_new():
        run.apply(event)
    folders = {folder.name: folder for folder in list_committed(run_dir)}
    for name in run.committed:
        folder = run_dir / CHECKPOINTS / name
        if name not in folders and parse_committed(name) is not None and folder.is_dir():
            folders[name] = folder
    return [folders[name] for name in sorted(folders, key=lambda n: parse_committed(n) or (0, 0), reverse=True)]


def latest_good(run_dir: Path, warn: Warn, newer_than: int = 0) -> Path | None:
    """The newest (generation, step) checkpoint whose every byte is right; None where there is none.

    Args:
        warn: told about each damaged checkpoint that is passed over, and what is wrong with it.
        newer_than: only checkpoints of generations above this.
    """
    for folder in _committed_folders(run_dir):
        key = parse_committed(folder.name)
        if key is not None and key[0] <= newer_than:
            continue
        problems = verify(folder)
        if not problems:
            return folder
        warn(f"checkpoint {folder} is damaged and passed over: {'; '.join(problems)}")
    return None


def resolve_resume(run_dir: Path, resume: str, started_generation: int, warn: Warn) -> Path | None:
    """The checkpoint that a worker group starts from, or None to start from the beginning.

    One process decides, after its group has become the current generation (before that a group on its way out may
    still commit), and tells the others. What this job committed itself goes first, so that a restart never
    goes back to where the job began.

    Args:
        resume: `auto`: the newest good checkpoint of the run folder; `none`: the beginning; else the path of a
            checkpoint folder, or of a run folder, whose newest good one is taken. A path outside of `run_dir` is where
            a run begins: once the run has checkpoints of its own it goes on from them, and `warn` is told.
        started_generation: the newest generation when this job started (`Coordinator.start_job`).
        warn: told about damaged checkpoints that are passed over.

    Raises:
        UserError: `auto` in a folder whose checkpoints are all damaged; `none` in one that holds an earlier job's
            checkpoints; a path without a good checkpoint.
    """
    if resume == "auto":
        newest = latest_good(run_dir, warn)
        if newest is None and (damaged := _committed_folders(run_dir)):
            names = ", ".join(folder.name for folder in damaged)
            raise UserError("checkpoints-all-damaged", run_dir=run_dir, checkpoints=names)
        return newest
    own = latest_good(run_dir, warn, newer_than=started_generation)
    if resume == "none":
        earlier = [
            f for f in _committed_folders(run_dir) if (parse_committed(f.name) or (0, 0))[0] <= started_generation
        ]
        if earlier:
            raise UserError("resume-none-over-checkpoints", run_dir=run_dir, checkpoint=earlier[0].name)
        return own
    if own is not None:
        return own
    named = _named_checkpoint(Path(os.path.expanduser(resume)), warn)
    newest = latest_good(run_dir, warn)
    if newest is not None and not named.resolve().is_relative_to(run_dir.resolve()):
        # The same command again, after a requeue: what the run has done since it began there is not thrown away.
        warn(f"resume: {named} is where this run began; it goes on from its own {newest.name}, not from there again")
        return newest
    return named


def _named_checkpoint(path: Path, warn: Warn) -> Path:
    if not path.exists():
        raise UserError("resume-missing", path=path)
    if not path.is_dir():
        raise UserError("resume-no-folder", path=path)
    if (path / CHECKPOINTS).is_dir():
        newest = latest_good(path, warn)
        if newest is None:
            raise UserError("resume-run-without-checkpoint", path=path)
        return newest
    if not (path / MANIFEST).exists() and parse_committed(path.name) is None:
        raise UserError("resume-no-checkpoint", path=path, manifest=MANIFEST)
    if problems := verify(path):
        raise UserError("checkpoint-damaged", path=path, problems="; ".join(problems))
    return path
