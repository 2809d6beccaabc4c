"""How the coordinator decides: under the event log's lock, after taking in what others have decided."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_dist.coordinate.files import explain
from qlora_dist.coordinate.log import Event, EventLog
from qlora_dist.coordinate.manifest import list_committed, parse_committed, read_manifest
from qlora_dist.coordinate.replay import Run
from qlora_dist.coordinate.rundir import EVENTS_FILE


class Decisions:
    """The durable state of a run and the way to change it.

    Attributes:
        run: what the log said when it was last read; read it under `memory` or within `deciding`.
        memory: guards what is in memory and is held briefly only, so that heartbeats are answered while a commit waits
            for a disk. Whoever wants both takes the log's lock first.
    """

    def __init__(self, run_dir: Path, lock_timeout_s: float):
        self.run_dir = run_dir
        self.run = Run()
        self.memory = threading.RLock()
        self._log = EventLog(run_dir / EVENTS_FILE, lock_timeout_s)
        self._read_time = -1e9

    @contextlib.contextmanager
    def deciding(self) -> Iterator[Run]:
        """Hold the log's lock with all that was decided so far taken in; OS errors are explained to the person."""
        try:
            with self._log.locked():
                self.catch_up()
                self._adopt_found()
                yield self.run
        except OSError as error:
            raise explain(error, self.run_dir) from error

    def catch_up(self, max_age_s: float = 0.0) -> None:
        """Take in what others have decided, unless that was done less than `max_age_s` seconds ago."""
        with self.memory:
            if time.monotonic() - self._read_time < max_age_s:
                return
            for event in self._log.read_new():
                self.run.apply(event)
            self._read_time = time.monotonic()

    def decide(self, kind: str, **fields: Any) -> Event:
        """Append an event, under the lock, and take it in."""
        event = {"kind": kind, "time": time.time(), **fields}
        self._log.append(event)
        self.catch_up()
        return event

    def _adopt_found(self) -> None:
        """Log the commits whose coordinator died after the rename, and the ones that were removed likewise."""
        found = {folder.name: folder for folder in list_committed(self.run_dir)}
        for name in sorted(found.keys() - self.run.committed.keys()):
            try:
                manifest = read_manifest(found[name])
            except ValueError:
                continue  # resume names it when it skips it
            self.decide(
                "committed",
                generation=manifest["generation"],
                step=manifest["step"],
                folder=name,
                metrics=manifest["metrics"],
                found=True,
            )
        if gone := sorted(self.run.committed.keys() - found.keys()):
            self.decide("removed", folders=gone, found=True)

    def known_generation(self) -> int:
        """The highest generation in the log or on the disk (the log may have been deleted)."""
        on_disk = [parse_committed(folder.name) for folder in list_committed(self.run_dir)]
        return max([self.run.generation or 0, *(key[0] for key in on_disk if key is not None)])
