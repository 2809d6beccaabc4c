"""Checkpoints written beside the training, and committed by the coordinator."""

import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_dist.checkpoint.format import Snapshot, copy_to_host, write_snapshot
from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.client import CoordinatorClient, CoordinatorError, Fenced, commit
from qlora_dist.coordinate.files import explain
from qlora_dist.coordinate.manifest import CHECKPOINTS, new_writing_name

__all__ = ["BackgroundWriter", "Fenced"]


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread; one process of a run has one.

    An error of the thread is raised by the next `save`, `poll` or `close`, once:
    UserError for a full disk, a quota or missing permission (what was committed before is untouched);
    Fenced when a newer generation has taken over; anything else as it was.

    Args:
        run_dir: the run folder.
        client: reaches the coordinator.
        generation: of this worker group.
    """

    def __init__(self, run_dir: Path | str, client: CoordinatorClient, generation: int):
        self._run_dir, self._client, self._generation = Path(run_dir), client, generation
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last: tuple[int, Path] | None = None

    def save(self, snapshot: Snapshot, metrics: Mapping[str, Any] | None = None) -> None:
        """Copy the snapshot to host memory and return; the rest happens in the thread.

        Waits for the checkpoint before this one, so that host memory holds one copy at most.

        Args:
            metrics: JSON values for the manifest; `eval_loss` decides what `checkpoint.keep_best` keeps.
        """
        self._join(None)
        self._raise()
        copy, kept = copy_to_host(snapshot), dict(metrics or {})
        # A daemon: whoever ends without `close` has decided not to wait for it.
        self._thread = threading.Thread(target=self._work, args=(copy, kept), name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> tuple[int, Path] | None:
        """(step, folder) of the last checkpoint committed by this writer; raises the thread's error. Never waits."""
        self._raise()
        return self._last

    def close(self, timeout: float | None = None) -> tuple[int, Path] | None:
        """Wait for the checkpoint under way; what `poll` returns.

        Raises:
            TimeoutError: it is not committed after `timeout` seconds; it may still be.
        """
        started = time.monotonic()
        if not self._join(timeout):
            waited = time.monotonic() - started
            raise TimeoutError(f"the checkpoint in {self._run_dir} is not written after {waited:.0f} s")
        return self.poll()

    def _join(self, timeout: float | None) -> bool:
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def _raise(self) -> None:
        if self._error is not None and (self._thread is None or not self._thread.is_alive()):
            error, self._error = self._error, None
            raise error

    def _work(self, snapshot: Snapshot, metrics: dict[str, Any]) -> None:
        try:
            self._last = (snapshot.step, self._write_and_commit(snapshot, metrics))
        except BaseException as error:
            self._error = error  # raised in the trainer's thread

    def _write_and_commit(self, snapshot: Snapshot, metrics: dict[str, Any]) -> Path:
        parent = self._run_dir / CHECKPOINTS
        folder = parent / new_writing_name(self._generation, snapshot.step)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            files = write_snapshot(snapshot, folder)
        except OSError as error:
            was_swept = parent.is_dir() and not folder.exists() and isinstance(error, FileNotFoundError)
            shutil.rmtree(folder, ignore_errors=True)  # best effort: the next generation sweeps what stays
            if was_swept:
                raise Fenced(f"{folder.name} was swept away: a newer generation has taken over") from error
            raise explain(error, self._run_dir) from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            name = commit(self._client, self._generation, snapshot.step, folder.name, files, metrics)
        except (UserError, Fenced, CoordinatorError):
            # The coordinator has answered, so nobody is about to rename the folder. After any other error (no answer)
            # it may still be committed and must be left alone.
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return parent / name
