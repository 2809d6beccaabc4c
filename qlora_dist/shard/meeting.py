"""Nodes that load at different speeds, and wait for each other for as long as all of them live."""

from threading import Condition, Thread
from types import TracebackType

import torch
import torch.distributed as dist

OFTEN_S = 0.25
FAILED, LEFT = -1, 2**31


class Meeting:
    """A block in which every rank tells the others, again and again, how far it has come.

    One may download for an hour what the other has on its disk: a collective of the run would end in its timeout.

    Args:
        group: all ranks over gloo, for this alone; a rank that is silent for the group's timeout counts as lost.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float):
        self.group, self.often_s = group, min(OFTEN_S, timeout_s / 4)
        # Points reached by this rank, and by the slowest.
        self.reached = self.least = 0
        self.error: Exception | None = None
        self.changed = Condition()
        self.thread = Thread(target=self._tell, name="meeting", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait until all have come to the end of the block, unless it ends in an error here."""
        with self.changed:
            self.reached = LEFT if kind is None else FAILED
            self.changed.notify_all()
        self.thread.join()
        if kind is None and self.error is not None:
            raise self.error

    def meet(self) -> None:
        """Wait until all ranks have come to this point.

        Raises:
            RuntimeError: another rank has failed, or is lost.
        """
        with self.changed:
            self.reached += 1
            point = self.reached
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.error is not None or self.least >= point)
        if self.error is not None:
            raise self.error

    def _tell(self) -> None:
        told: int | None = None
        while self.least not in (FAILED, LEFT) and self.error is None:
            told = self._next(told)
            least, error = self._slowest(told)
            with self.changed:
                self.least, self.error = least, error
                self.changed.notify_all()

    def _next(self, told: int | None) -> int:
        """What to tell after `told`: news at once, and the same after a while."""
        with self.changed:
            self.changed.wait_for(lambda: self.reached != told, self.often_s)
            return self.reached

    def _slowest(self, told: int) -> tuple[int, Exception | None]:
        least = torch.tensor(told)
        try:
            dist.all_reduce(least, dist.ReduceOp.MIN, self.group)
        except RuntimeError as error:
            return FAILED, error
        if least == FAILED and told != FAILED:
            # The words by which a failure of a peer is known; that one tells its own.
            return FAILED, RuntimeError("gloo: another rank has failed while it loaded")
        return int(least), None
