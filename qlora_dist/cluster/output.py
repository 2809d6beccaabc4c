"""Where workers' output goes: a file for each attempt and rank, which the launcher shows as it grows."""

import os
import re
import sys
import time
from pathlib import Path
from typing import TextIO

LAUNCHER_LOG = "launcher.log"


def logs_folder(run_dir: Path) -> Path:
    """The folder of all attempts' output."""
    return run_dir / "logs"


def rank_log(run_dir: Path, attempt: int, rank: int) -> Path:
    """The file that one rank of one attempt writes its stdout and stderr to."""
    return logs_folder(run_dir) / f"attempt-{attempt}" / f"rank-{rank}.log"


def next_attempt(run_dir: Path) -> int:
    """The first attempt number, from 1, that no earlier start of this run has used."""
    numbers = [int(name[1]) for path in logs_folder(run_dir).glob("attempt-*") if (name := _number(path))]
    return max(numbers, default=0) + 1


def _number(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"attempt-(\d+)", path.name)


def send_output_to(path: Path) -> None:
    """Send this process's stdout and stderr to `path`, what C libraries and later child processes write included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    # Ray puts objects of its own into sys.stdout and sys.stderr, which do not write to descriptors 1 and 2.
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115


def tell(run_dir: Path, line: str) -> None:
    """Add a line of the launcher's own to what the person sees; any process of the run may call it."""
    logs_folder(run_dir).mkdir(parents=True, exist_ok=True)
    with open(logs_folder(run_dir) / LAUNCHER_LOG, "a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


class Follower:
    """Copies what rank 0 and the launcher write, from now on, to two streams, unprefixed.

    Args:
        run_dir: the run folder.
        first_attempt: attempts before this one are not shown.
        out: gets rank 0's lines.
        err: gets the launcher's lines.
    """

    def __init__(self, run_dir: Path, first_attempt: int, out: TextIO | None = None, err: TextIO | None = None):
        self._run_dir = run_dir
        self._attempt = first_attempt
        self._out, self._err = out or sys.stdout, err or sys.stderr
        launcher = logs_folder(run_dir) / LAUNCHER_LOG
        self._offsets = {launcher: launcher.stat().st_size if launcher.exists() else 0}

    def show_new(self) -> None:
        """Copy what has been written since the last call."""
        self._copy(rank_log(self._run_dir, self._attempt, 0), self._out)
        self._copy(logs_folder(self._run_dir) / LAUNCHER_LOG, self._err)
        while rank_log(self._run_dir, self._attempt + 1, 0).exists():
            self._copy(rank_log(self._run_dir, self._attempt, 0), self._out)
            self._attempt += 1
            self._copy(rank_log(self._run_dir, self._attempt, 0), self._out)

    def _copy(self, path: Path, to: TextIO) -> None:
        if not path.exists():
            return
        with open(path, "rb") as file:
            file.seek(self._offsets.get(path, 0))
            data = file.read()
        # A character cut in two at the end of `data` waits for its second half.
        text = data.decode("utf-8", errors="ignore") if data else ""
        whole = len(text.encode()) if text.encode() == data[: len(text.encode())] else len(data)
        self._offsets[path] = self._offsets.get(path, 0) + whole
        if text:
            to.write(text)
            to.flush()
