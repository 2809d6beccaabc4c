"""What a run does when Ray says that a node of its will be taken away.

Ray calls that draining: its autoscaler before it reclaims a node, `ray start --block` when it gets SIGTERM (a spot
instance's notice, a Kubernetes pod's deletion; it then waits RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, 30 s), and whoever
calls `ray drain-node`. Ray places nothing on such a node any more. Ray Train's own watcher only tells the training
function, and ends the group at the deadline; ours asks for a checkpoint, as for a planned resize, and moves the group.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ray._private.state import state as cluster_state
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ResizeDecision, ScalingDecision
from ray.train.v2.api.config import ScalingConfig

from qlora_dist.cluster.actor import RayClient
from qlora_dist.cluster.nodes import Node, live_nodes, room
from qlora_dist.cluster.output import tell

LOOK_S = 1.0
# Ray's head answers in milliseconds; one that is stopped or lost, after minutes or never. Longer than a connection to
# a node may take (PROBE_TIMEOUT_S).
ANSWER_S = 5.0
# A node that is still there so long after its deadline stays for now: the workers that hold still go on.
GRACE_S = 30.0


def leaving_nodes() -> dict[str, float | None]:
    """The nodes that Ray drains: id -> when each will be gone (seconds since the epoch), None where nobody said."""
    found: dict[str, int] = cluster_state.get_draining_nodes()
    return {node: milliseconds / 1000 if milliseconds else None for node, milliseconds in found.items()}


def staying(nodes: Sequence[Node]) -> list[Node]:
    """Those that are not to be taken away."""
    leaving = leaving_nodes()
    return [node for node in nodes if node.node_id not in leaving]


class NoAnswer(Exception):
    """Nobody said what was asked, or nothing that can be used: nothing is known now."""


class Patience:
    """Asks what may block, in a thread, and waits for `ANSWER_S` at most.

    Ray Train's controller decides in its event loop: while it waits here, it looks at no worker.
    """

    def __init__(self) -> None:
        self._asker: threading.Thread | None = None

    def ask(self, question: Callable[..., Any], *words: Any, **named: Any) -> Any:
        """The answer of `question(*words, **named)`.

        Raises:
            NoAnswer: there was none in time, the question raised, or an earlier one still has none.
        """
        if self._asker is not None and self._asker.is_alive():
            raise NoAnswer("an earlier question has no answer yet")
        answers: list[Any] = []
        errors: list[Exception] = []

        def answer() -> None:
            try:
                answers.append(question(*words, **named))
            except Exception as error:
                errors.append(error)

        self._asker = threading.Thread(target=answer, name="asks-ray", daemon=True)
        self._asker.start()
        self._asker.join(ANSWER_S)
        if errors:
            raise NoAnswer(f"{type(errors[0]).__name__}: {errors[0]}".splitlines()[0]) from errors[0]
        if not answers:
            raise NoAnswer(f"no answer within {ANSWER_S:g} s")
        return answers[0]

    def __reduce__(self) -> tuple[type["Patience"], tuple[()]]:
        # It travels to the controller with its policy.
        return Patience, ()


class Evacuation:
    """Asks a running group for a checkpoint when a node of its is to go, and says when to start it anew without.

    Where there is no room without that node, the workers hold still after the checkpoint: what they trained from there
    on would be lost. If the node has not gone at its deadline, or has none, they go on.

    Args:
        least, most: bounds of the number of workers, as in `launch.num_workers`.
        worker: what a worker needs, resource -> amount.
    """

    def __init__(self, client: RayClient, run_dir: Path, least: int, most: int, worker: dict[str, float]):
        self._client, self._run_dir = client, run_dir
        self._least, self._most, self._worker = least, most, worker
        self._next_look = 0.0
        self._told: set[str] = set()
        self._patience = Patience()
        self._unknown = False
        self.asked = False

    def forget(self) -> None:
        """The group has ended, by whatever cause; the next one is not asked for what it was."""
        self.asked = False

    def look(self, placed: Sequence[str]) -> int | None:
        """The number of workers to start the group anew with, all of them holding still; None where it stays as it is.

        Where Ray or the coordinator does not say what is asked, the group stays as it is until the next look.

        Args:
            placed: the node id of each worker.
        """
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + LOOK_S
        try:
            workers = self._look(placed)
        except NoAnswer as error:
            if not self._unknown:
                tell(self._run_dir, f"whether a node of this run will be taken away is not known now: {error}")
            self._unknown = True
            return None
        self._unknown = False
        return workers

    def _look(self, placed: Sequence[str]) -> int | None:
        away: dict[str, float | None] = self._patience.ask(leaving_nodes)
        leaving = {node: deadline for node, deadline in away.items() if node in placed}
        if self.asked:
            return self._when_held(placed, leaving, away)
        if not leaving:
            return None
        nodes: list[Node] = self._patience.ask(live_nodes)
        workers = self._fit(placed, away, nodes)
        if workers >= self._least or leaving.keys() - self._told:
            self._ask(len(placed), workers, leaving, nodes)
        return None

    def _fit(self, placed: Sequence[str], away: Collection[str], nodes: Sequence[Node]) -> int:
        """Workers that there is room for on the nodes that stay: those that are there, and what is free."""
        others = [node for node in nodes if node.node_id not in away]
        there = sum(placed.count(node.node_id) for node in others)
        return min(self._most, there + room([node.free for node in others], self._worker))

    def _ask(self, before: int, workers: int, leaving: dict[str, float | None], nodes: Sequence[Node]) -> None:
        addresses = ", ".join(sorted(node.address for node in nodes if node.node_id in leaving))
        deadlines = [deadline for deadline in leaving.values() if deadline is not None]
        when = f" in {max(0.0, min(deadlines) - time.time()):.0f} s" if deadlines else ""
        enough = workers >= self._least
        then = f"going on with {workers} worker(s) elsewhere" if enough else "no room for the run without it yet"
        reason = f"Ray is taking node {addresses} away{when}; {then}"
        self.asked = self._call("request_resize", workers=workers if enough else before, reason=reason)["asked"]
        if self.asked:
            self._told |= leaving.keys()
            tell(self._run_dir, reason)

    def _when_held(self, placed: Sequence[str], leaving: dict[str, float | None], away: Collection[str]) -> int | None:
        resize = self._call("resize_state")
        self.asked = resize["asked"]
        if not self.asked or resize["held_step"] is None:
            return None
        nodes: list[Node] = self._patience.ask(live_nodes)
        if not leaving and not set(placed) <= {node.node_id for node in nodes}:
            # It has gone; the failure of the group is about to be noticed.
            return None
        workers = self._fit(placed, away, nodes)
        if leaving and workers >= self._least:
            self.asked = False
            tell(self._run_dir, f"starting {workers} worker(s) on the other nodes after step {resize['held_step']}")
            return workers
        if all(deadline is None or time.time() > deadline + GRACE_S for deadline in leaving.values()):
            self._call("cancel_resize", reason="the node is still there, and there is no room without it")
            self.asked = False
        return None

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return dict(self._patience.ask(self._client.call, method, **arguments))


def nodes_of(worker_group_state: Any) -> list[str]:
    """The node id of each worker of a group, by rank."""
    return [worker.metadata.node_id for worker in worker_group_state.workers]


class FixedPolicy(FixedScalingPolicy):
    """Ray Train's policy for a fixed number of workers, which moves them off a node that will be taken away."""

    def __init__(self, scaling_config: ScalingConfig, client: RayClient, run_dir: Path):
        super().__init__(scaling_config)
        workers = scaling_config.max_workers
        self._worker: dict[str, float] = dict(scaling_config._resources_per_worker_not_none)
        self._evacuation = Evacuation(client, run_dir, workers, workers, self._worker)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """As Ray's."""
        self._evacuation.forget()
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """None, unless the group is to move."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        workers = self._evacuation.look(nodes_of(worker_group_state))
        if workers is None:
            return decision
        return ResizeDecision(num_workers=workers, resources_per_worker=self._worker)
