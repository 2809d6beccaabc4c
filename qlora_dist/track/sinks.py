"""Other places that get the records of metrics.jsonl. None of them can stop or slow training."""

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from qlora_dist.config.redact import redact

Record = Mapping[str, Any]
# What a record says of itself, beside metrics.
NOT_METRICS = ("step", "attempt", "time")
CLOSE_TIMEOUT_S = 60.0


class Sink(Protocol):
    """Where rows go. Steps rise from row to row; each step comes once."""

    def write(self, row: Record) -> None:
        """Take all metrics of one step: {"step", "time", metric: value}; a value may be None."""

    def close(self, adapter: Path | None) -> None:
        """End after the last row; `adapter` is the final adapter's folder where training came to its end."""


class SinkThread:
    """Feeds one sink from a thread of its own.

    Records of one step are joined to one row, which goes out when a later step begins: so a killed worker never
    leaves half a row, and a sink never sees a step twice. The first failure is told and ends the sink.

    Args:
        name: for the person, such as "W&B".
        open_sink: makes the sink, in the thread: it may take seconds or need a network.
        tell: takes one sentence for the person.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink], tell: Callable[[str], None]):
        self._name, self._open_sink, self._tell = name, open_sink, tell
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._adapter: Path | None = None
        self._thread = threading.Thread(target=self._run, name=f"track {name}", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Take one record of metrics.jsonl; returns at once."""
        self._queue.put(record)

    def close(self, adapter: Path | None = None) -> None:
        """Wait until everything is written, but no longer than `CLOSE_TIMEOUT_S`."""
        self._adapter = adapter
        self._queue.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._tell(f"{self._name} has not taken everything within {CLOSE_TIMEOUT_S:.0f} s, so the run goes on")

    def _run(self) -> None:
        try:
            sink = self._open_sink()
            for row in join_steps(iter(self._queue.get, None)):
                sink.write(row)
            sink.close(self._adapter)
        except Exception as error:  # whatever a service does, training goes on; the sentence says what it was
            self._tell(redact(f"{self._name} gets no more metrics ({type(error).__name__}: {error}); training goes on"))


def join_steps(records: Any) -> Any:
    """Join neighbouring records of one step to one row; yields a row when a later step begins, and the last one."""
    row: dict[str, Any] = {}
    for record in records:
        if row and record["step"] != row["step"]:
            yield row
            row = {}
        row |= record
    if row:
        yield row


def scalars(row: Record) -> dict[str, float]:
    """The metrics of a row that have a value."""
    return {name: value for name, value in row.items() if name not in NOT_METRICS and value is not None}
