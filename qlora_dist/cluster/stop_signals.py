"""SIGTERM and SIGUSR1 to the process that a person or a queue has started: a checkpoint, then the end of the run.

For the launchers of ours and the only worker of a plain run. Workers that somebody else's torchrun has started are left
alone: its agent sends them SIGTERM too when one of them has failed, which is no wish of anybody's that the run stop.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from qlora_dist.cluster.outcome import Outcome
from qlora_dist.config.errors import UserError
from qlora_dist.config.redact import redact
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.stop import ask_at_once

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
RETRY_S = 1.0
AT_ONCE = "SIGTERM again: ended at once; the same command goes on from the last checkpoint\n"


class StopSignals:
    """What came, and the thread that acts on it.

    In a thread, and told of signals through a pipe (`signal.set_wakeup_fd`): Python runs a handler in the main thread
    alone, which may be in a long call or hold the event log's lock.

    Attributes:
        first: the signal that asked for the stop.
        scratch: a temporary folder that goes when a second SIGTERM ends the process.
    """

    def __init__(self, run_dir: Path):
        self.first: signal.Signals | None = None
        self.scratch: Path | None = None
        self._run_dir = run_dir
        self._closed = threading.Event()
        self._read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        threading.Thread(target=self._listen, name="stop-signals", daemon=True).start()

    def close(self) -> None:
        """Hear nothing any more."""
        self._closed.set()
        os.close(self.write)

    def _listen(self) -> None:
        terms = 0
        while numbers := os.read(self._read, 64):
            for number in numbers:
                terms += number == signal.SIGTERM
                if terms > 1:
                    self._end_at_once()
                if number in SIGNALS and self.first is None:
                    self.first = signal.Signals(number)
                    self._ask(self.first)
        os.close(self._read)

    def _ask(self, number: signal.Signals) -> None:
        times = "again" if number == signal.SIGTERM else "twice"
        tell(
            f"{number.name}: a checkpoint at the next step boundary, then the end; SIGTERM {times} ends the run at once"
        )
        # In a thread of its own, so that another signal is heard while the event log's lock is waited for.
        threading.Thread(target=self._ask_run, args=(number,), name="stop-asker", daemon=True).start()

    def _ask_run(self, number: signal.Signals) -> None:
        # Whoever sent the signal will not send it again: a storage's bad moment must not lose it.
        told = None
        while not self._closed.is_set():
            try:
                ask_at_once(self._run_dir, f"{number.name} to the process that started the run")
                return
            except (UserError, OSError) as error:
                over = isinstance(error, UserError) and error.code == "run-is-over"
                line = f"the run could not be asked to stop: {redact(str(error))}{'' if over else '; trying again'}"
                if line != told:
                    tell(line)
                told = line
                if over:
                    return
            self._closed.wait(RETRY_S)

    def _end_at_once(self) -> NoReturn:
        # Not by `tell`: the main thread may hold the stream's lock.
        with contextlib.suppress(OSError):
            os.write(2, AT_ONCE.encode())
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)
        # The workers go with this process.
        os._exit(128 + signal.SIGTERM)

    def outcome(self, outcome: Outcome) -> Outcome:
        """`outcome`; where a signal has stopped the run before it was done, with 128 + the signal as the exit code."""
        summary = outcome.summary or {}
        if self.first is None or outcome.exit_code != 0 or summary.get("stopped_early") or summary.get("complete"):
            return outcome
        if outcome.step is not None and outcome.step == read_status(self._run_dir)["max_steps"]:
            return outcome
        sentence = f"stopped by {self.first.name} after a checkpoint; the same command goes on from it"
        return replace(outcome, exit_code=128 + self.first, message=sentence)


def tell(line: str) -> None:
    """Say it where the person who started the run sees it."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stop_on_signals(run_dir: Path) -> Iterator[StopSignals]:
    """Inside the block the first SIGTERM or SIGUSR1 asks a started run for a checkpoint at the next step boundary.

    A second SIGTERM ends the process at once, with exit code 143; a second SIGUSR1 changes nothing. In a thread other
    than the main one, which hears no signals, nothing is changed.
    """
    signals = StopSignals(run_dir)
    here = threading.current_thread() is threading.main_thread()
    before: dict[signal.Signals, Any] = {}
    if here:
        pipe_before = signal.set_wakeup_fd(signals.write, warn_on_full_buffer=False)
        # A signal goes to the pipe only where Python handles it.
        before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if here:
            signal.set_wakeup_fd(pipe_before)
        signals.close()
