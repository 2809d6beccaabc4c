"""metrics.jsonl: one JSON object a line, the source that every other sink is fed from."""

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.log import finite
from qlora_dist.track.sinks import SinkThread

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends records to a run's metrics.jsonl.

    Opening it for an attempt that resumed at `resume_step` drops what earlier attempts wrote past that step, so that
    each metric has one value a step. The file is replaced, not edited: a worker of an earlier attempt that wakes up
    later goes on writing into the old file, which nobody reads.

    Every sink gets the same records: those that are kept, then each one as it is written.
    """

    def __init__(self, run_dir: Path, attempt: int, resume_step: int, sinks: Sequence[SinkThread] = ()):
        self.attempt, self.sinks = attempt, sinks
        self._writing = threading.Lock()
        path = run_dir / FILE
        replacement = path.with_suffix(".jsonl.new")
        kept = [record for record in read_metrics(run_dir) if resume_step and record["step"] <= resume_step]
        with replacement.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        replacement.replace(path)
        self._file = path.open("a", encoding="utf-8")
        for record in kept:
            self._feed(record)

    def write(self, step: int, **values: float | int | bool | None) -> None:
        """Append one record; a value that is not finite becomes null, which JSON can hold. Any thread may call it."""
        with self._writing:
            record = {"step": step, "attempt": self.attempt, "time": round(time.time(), 3), **finite(values)}
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            self._feed(record)

    def close(self, adapter: Path | None = None) -> None:
        """Write what is buffered through to the disk, and end the sinks; `adapter` is the final adapter's folder."""
        os.fsync(self._file.fileno())
        self._file.close()
        for sink in self.sinks:
            sink.close(adapter)

    def _feed(self, record: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run in their order; a last line that was cut off by a kill is left out.

    Raises:
        UserError: a whole line is damaged.
    """
    path = run_dir / FILE
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    try:
        for record in parse_lines(path.read_bytes().decode(errors="replace")):
            records.append(record)
    except ValueError as error:
        raise UserError("metrics-damaged", file=path, line=len(records) + 1) from error
    return records


def parse_lines(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of the complete lines of `text`."""
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
