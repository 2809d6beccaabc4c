"""How the ranks of an island wait while the first of them talks to the coordinator of islands."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from qlora_dist.train.island import Exchange, Island
from qlora_dist.train.loop import Loop

Agree = Callable[[Any], Any]
T = TypeVar("T")
# All ranks meet so often while they wait: none is in a collective for longer, however long the coordinator is away.
MEET_S = 1.0
# So long after it was asked to stop an island still tries to tell the coordinator what it has trained.
STOP_S = 60.0
# So long a contribution under way is waited for before an island holds still, where its workers may end.
HOLD_S = 30.0


def aside(act: Callable[[], T]) -> "Future[T]":
    """Do something in a thread of its own."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:  # raised where it is waited for
            future.set_exception(error)

    threading.Thread(target=run, name="island", daemon=True).start()
    return future


def all_wait(future: "Future[T] | None", agree: Agree, given_up: Callable[[], bool] = lambda: False) -> T | None:
    """What rank 0's future brings, on every rank.

    Args:
        future: None on all other ranks.
        given_up: asked on rank 0 about every second; whether it is not waited for any longer, and None is the answer.
    """
    while True:
        told = None
        if future is not None:
            wait([future], MEET_S)
            done = future.done()
            told = done or given_up(), future.result() if done else None
        over, value = agree(told)
        if over:
            result: T | None = value
            return result


@dataclass
class IslandWaiting(Loop):
    """A loop whose rank 0 talks to a coordinator of islands, and which heeds a stop and a hold meanwhile.

    Attributes:
        island: the session, on rank 0; None on all others.
        agree: gives every rank rank 0's value.
        exchange: the one under way, on rank 0.
        first_step: where this attempt began.
        stop_time, hold_time: when rank 0 heard that the island is to stop, to hold, by `time.monotonic`.
    """

    island: Island | None = None
    agree: Agree = lambda value: value
    exchange: Exchange | None = None
    first_step: int = 0
    stop_time: float | None = None
    hold_time: float | None = None

    def ask(self, question: Callable[[Island], T], after_stop_s: float = 0.0) -> T | None:
        """What rank 0 hears of the coordinator, on every rank; see `wait_for`. All ranks call it together."""
        island = self.island
        return self.wait_for(None if island is None else aside(lambda: question(island)), after_stop_s)

    def wait_for(self, future: "Future[T] | None", after_stop_s: float = 0.0) -> T | None:
        """What rank 0's future brings, on every rank. All ranks call it together.

        Args:
            future: None on all other ranks.
            after_stop_s: how long after the island was asked to stop it is still waited for.

        Returns:
            None also where it is not waited for any longer.
        """
        while True:
            self.heartbeat.at(self.progress.step, "collective")
            told = None
            if future is not None:
                wait([future], MEET_S)
                told = future.done(), future.result() if future.done() else None, *self._heard(after_stop_s)
            done, value, stop, over, hold = self.agree(told)
            if stop and not self.asked_to_stop:
                self.asked_to_stop = True
                # Whoever has asked may not wait until the coordinator answers.
                self.save()
            if done or over:
                result: T | None = value
                return result
            if hold and not stop:
                self.save_and_hold()

    def _heard(self, after_stop_s: float) -> tuple[bool, bool, bool]:
        """Whether the island is asked to stop, has waited long enough since, and is to hold still now."""
        stop, hold, now = self.asked_to_stop or self.heartbeat.stop_asked, self.heartbeat.hold_asked, time.monotonic()
        if stop and self.stop_time is None:
            self.stop_time = now
        over = self.stop_time is not None and now >= self.stop_time + after_stop_s
        self.hold_time = (now if self.hold_time is None else self.hold_time) if hold else None
        sent = self.exchange is None or self.exchange.sent.done()
        return stop, over, self.hold_time is not None and (sent or now >= self.hold_time + HOLD_S)

    def save_and_hold(self) -> None:
        """Stand still where there is a checkpoint of this attempt to go on from; else later."""
        self.save()
        if self.first_step < self.progress.step == self.saved_step:
            self.hold()
