"""A worker's pulse: a thread that tells the coordinator every second where this rank is and how it does."""

import logging
import threading
import time
from collections import deque
from typing import Any

import psutil
import torch

from qlora_dist.coordinate.client import CoordinatorClient, CoordinatorError
from qlora_dist.coordinate.heard import HEARTBEAT_S, Phase
from qlora_dist.shard.waits import Busy

logger = logging.getLogger(__name__)
# Of how many of its last steps a rank tells at the end how many tokens it had: for benchmarks, which are short.
STEPS_TOLD = 256


class Heartbeat:
    """Reports (step, phase, seconds in the phase, metrics) until stopped; a stopped process falls silent with it."""

    def __init__(self, client: CoordinatorClient, generation: int, rank: int, device: torch.device):
        self.client, self.generation, self.rank, self.device = client, generation, rank, device
        self.step = 0
        self.phase: Phase = "setup"
        self.metrics: dict[str, Any] = {}
        self.busy = Busy()
        # (step, this rank's tokens in it), of the last steps.
        self.steps: deque[tuple[int, int]] = deque(maxlen=STEPS_TOLD)
        self.stop_asked = False
        self.hold_asked = False
        self._since = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def at(self, step: int, phase: Phase) -> None:
        """Note that this rank is now in `phase` of `step`."""
        self.step, self.phase, self._since = step, phase, time.monotonic()

    def tell_steps(self) -> None:
        """Report the tokens of each step, for those who measure a short run; a long one's status need not hold them."""
        if len(self.steps) < STEPS_TOLD:
            self.metrics = self.metrics | {"step_tokens": list(self.steps)}
        self.beat()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(timeout=5)

    def _beat(self) -> None:
        while not self._stopped.is_set():
            self.beat()
            self._stopped.wait(HEARTBEAT_S)

    def beat(self) -> dict[str, Any]:
        """Report once and return the coordinator's answer, {} where there was none.

        A coordinator that is out of reach or in trouble for a moment is no reason to stop training.
        """
        try:
            answer = self.client.call(
                "heartbeat",
                generation=self.generation,
                rank=self.rank,
                step=self.step,
                phase=self.phase,
                seconds_in_phase=time.monotonic() - self._since,
                memory_bytes=memory_bytes(self.device),
                memory_reserved_bytes=reserved_bytes(self.device),
                busy=self.busy,
                **self.metrics,
            )
        except (ConnectionError, CoordinatorError) as error:
            logger.warning("heartbeat of rank %d: %s", self.rank, error)
            return {}
        self.stop_asked = bool(answer.get("stop"))
        self.hold_asked = bool(answer.get("hold"))
        return answer


def memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on a GPU; the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def reserved_bytes(device: torch.device) -> int:
    """Peak bytes that PyTorch's allocator held of a GPU, in use or not; 0 on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
