"""The coordinator as a Ray actor, and its client."""

import time
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.client import CoordinatorError, Unreachable
from qlora_dist.coordinate.state import Coordinator

NAMESPACE = "qlora-dist"
NAME_RELEASE_S = 30.0


class CoordinatorActor:
    """Hosts the state machine. A restarted actor finds its state again in the run folder's event log."""

    def __init__(self, run_dir: str, keep_last: int, keep_best: int, prometheus_port: int | None = None):
        self._coordinator = Coordinator(Path(run_dir), keep_last, keep_best)
        if prometheus_port is not None:
            # Workers import this module, too.
            from qlora_dist.track.prometheus import serve

            serve(prometheus_port, self._coordinator)

    def handle(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer one message."""
        return self._coordinator.handle(method, **arguments)


class RayClient:
    """Talks to the actor. Small, and it pickles: each worker gets one with its configuration.

    Args:
        actor: handle of a `CoordinatorActor`.
        timeout_s: how long a call waits, the actor's restarts included.
    """

    def __init__(self, actor: ActorHandle, timeout_s: float = 300.0):
        self.actor = actor
        self.timeout_s = timeout_s

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Send one message.

        Raises:
            UserError: the coordinator said so.
            CoordinatorError: anything else went wrong in the coordinator.
            Unreachable: the actor is gone for good, or gave no answer within `timeout_s`.
        """
        try:
            reply: Any = ray.get(self.actor.handle.remote(method, arguments), timeout=self.timeout_s)
            return dict(reply)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise CoordinatorError(f"{method}: {type(error.cause).__name__}: {error.cause}") from error
        except (RayActorError, GetTimeoutError) as error:
            raise Unreachable(f"the coordinator gave no answer to {method}: {error}") from error


def start_coordinator(config: RunConfig, run_dir: Path, run_id: str) -> RayClient:
    """Start the coordinator's actor on this node; it lives as long as this Ray job.

    Raises:
        UserError: another job that is alive holds this run.
    """
    actor_class = ray.remote(
        num_cpus=0,
        max_restarts=-1,
        # A message that was under way when the actor died is sent again; the coordinator allows for that.
        max_task_retries=-1,
    )(CoordinatorActor)
    options: dict[str, Any] = {
        "name": f"coordinator-{run_id}",
        "namespace": NAMESPACE,
        "max_concurrency": 64,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
    }
    deadline = time.monotonic() + NAME_RELEASE_S
    while True:
        try:
            actor: Any = actor_class.options(**options).remote(
                str(run_dir), config.checkpoint.keep_last, config.checkpoint.keep_best, config.track.prometheus_port
            )
            return RayClient(actor)
        except ValueError as error:
            # A driver that was killed holds the name until Ray has noticed.
            if time.monotonic() > deadline:
                raise UserError("run-already-running", run_dir=run_dir) from error
            time.sleep(0.5)
