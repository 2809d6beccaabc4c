"""An append-only log of JSON lines that several processes share.

Whoever decides something holds the lock, reads what the others have written, decides, and appends. A line is
whole or it does not count: a process killed while it writes leaves a tail without a newline, which readers ignore
and the next writer cuts off.
"""

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.files import fsync_folder
from qlora_dist.coordinate.host import this_host

logger = logging.getLogger(__name__)
Event = dict[str, Any]
TAIL_CHUNK_BYTES = 1 << 16


class EventLog:
    """The log at `path`; its lock is a file beside it, `PATH.lock`.

    One object may be used by several threads: `locked` excludes threads as well as processes (on every node, where
    the filesystem has flock); `read_new` is to be called by one thread at a time.

    Args:
        lock_timeout_s: seconds to wait for the lock before the process that holds it is named in a UserError.
    """

    def __init__(self, path: Path, lock_timeout_s: float = 60.0):
        self.path = path
        self.lock_timeout_s = lock_timeout_s
        self._lock_path = path.with_name(path.name + ".lock")
        self._offset = 0
        self._owner: int | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the exclusive lock.

        Raises:
            UserError: another process holds the lock for too long (it may be stopped), or the filesystem has no flock.
            OSError: the lock file cannot be made.
        """
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._acquire(descriptor)
            os.ftruncate(descriptor, 0)
            with contextlib.suppress(OSError):  # the holder's name is a courtesy: a full disk must not stop a reader
                os.pwrite(descriptor, f"process {os.getpid()} on host {this_host()}".encode(), 0)
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None
                # Closing is not enough: a forked child may share the open file and would keep the lock.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def _acquire(self, descriptor: int) -> None:
        deadline = time.monotonic() + self.lock_timeout_s
        pause_s = 0.001
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
                    seconds = self.lock_timeout_s
                    raise UserError("event-log-locked", path=self.path, seconds=seconds, holder=holder) from None
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                    raise UserError("no-file-locks", folder=self.path.parent, error=error.strerror) from error
                raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)

    def append(self, event: Event) -> None:
        """Write one event and wait until it is on the disk. The calling thread must hold the lock.

        Numbers that are not finite become null, which JSON can hold.

        Raises:
            OSError: nothing was appended (a part that was written has been taken back, or is ignored as a torn tail).
        """
        if self._owner != threading.get_ident():
            raise RuntimeError("an event is appended only while the log is locked")
        line = json.dumps(finite(event), allow_nan=False).encode() + b"\n"
        is_new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            end = _cut_torn_tail(descriptor, self.path)
            try:
                written = 0
                while written < len(line):
                    written += os.write(descriptor, line[written:])
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
        if is_new:
            fsync_folder(self.path.parent)

    def read_new(self) -> list[Event]:
        """The whole events appended since the last call, by anyone.

        Raises:
            RuntimeError: the log is shorter than what was already read from it.
        """
        # Opened anew each time: NFS shows what other nodes wrote only to a file opened afterwards.
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            if self._offset:
                raise RuntimeError(f"{self.path} has been removed during the run") from None
            return []
        with file:
            if os.fstat(file.fileno()).st_size < self._offset:
                raise RuntimeError(f"{self.path} has been cut short during the run")
            file.seek(self._offset)
            data = file.read()
        events = []
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                event = json.loads(line)
                if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
                    raise ValueError("not an event")
                events.append(event)
            except ValueError:
                if self._owner != threading.get_ident():
                    # Another node may be writing it (NFS shows a hole for a moment): it counts at the next call.
                    return events
                logger.warning("%s: the line at byte %d is damaged and is left out", self.path, self._offset)
            self._offset += len(line)
        return events


def finite(value: Any) -> Any:
    """The same with None, JSON's null, for every number that JSON cannot hold, at any depth of dicts and lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _cut_torn_tail(descriptor: int, path: Path) -> int:
    """Cut off what follows the last newline; return the file's size in bytes, where the next line starts."""
    size = position = os.fstat(descriptor).st_size
    keep = 0
    while position > 0:
        start = max(0, position - TAIL_CHUNK_BYTES)
        newline = os.pread(descriptor, position - start, start).rfind(b"\n")
        if newline >= 0:
            keep = start + newline + 1
            break
        position = start
    if keep < size:
        logger.warning("%s: a process died while it wrote the last line; %d bytes are cut off", path, size - keep)
        os.ftruncate(descriptor, keep)
    return keep
