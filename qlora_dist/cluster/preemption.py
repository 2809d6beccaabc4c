"""What a run does when Ray says that a node of its will be taken away.

Ray calls that draining: its autoscaler before it reclaims a node, `ray start --block` when it gets SIGTERM (a spot
instance's notice, a Kubernetes pod's deletion; it then waits RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, 30 s), and whoever
calls `ray drain-node`. Ray places nothing on such a node any more. Ray Train's own watcher only tells the training
function, and ends the group at the deadline; ours asks for a checkpoint, as for a planned resize, and moves the group.
"""

import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ray._private.state import state as cluster_state
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ResizeDecision, ScalingDecision
from ray.train.v2.api.config import ScalingConfig

from qlora_dist.cluster.actor import RayClient
from qlora_dist.cluster.nodes import Node, live_nodes, room
from qlora_dist.cluster.output import tell

LOOK_S = 1.0
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
        self.asked = False

    def forget(self) -> None:
        """The group has ended, by whatever cause; the next one is not asked for what it was."""
        self.asked = False

    def look(self, placed: Sequence[str]) -> int | None:
        """The number of workers to start the group anew with, all of them holding still; None where it stays as it is.

        Args:
            placed: the node id of each worker.
        """
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + LOOK_S
        leaving = {node: deadline for node, deadline in leaving_nodes().items() if node in placed}
        if self.asked:
            return self._when_held(placed, leaving)
        if not leaving:
            return None
        nodes = live_nodes()
        workers = self._fit(placed, leaving, nodes)
        if workers >= self._least or leaving.keys() - self._told:
            self._ask(len(placed), workers, leaving, nodes)
        return None

    def _fit(self, placed: Sequence[str], leaving: Collection[str], nodes: Sequence[Node]) -> int:
        """Workers that there is room for on the other nodes: those that are there, and what is free."""
        others = [node for node in nodes if node.node_id not in leaving]
        there = sum(placed.count(node.node_id) for node in others)
        return min(self._most, there + room([node.free for node in staying(others)], self._worker))

    def _ask(self, before: int, workers: int, leaving: dict[str, float | None], nodes: Sequence[Node]) -> None:
        addresses = ", ".join(sorted(node.address for node in nodes if node.node_id in leaving))
        deadlines = [deadline for deadline in leaving.values() if deadline is not None]
        when = f" in {max(0.0, min(deadlines) - time.time()):.0f} s" if deadlines else ""
        enough = workers >= self._least
        then = f"going on with {workers} worker(s) elsewhere" if enough else "no room for the run without it yet"
        reason = f"Ray is taking node {addresses} away{when}; {then}"
        asked = self._client.call("request_resize", workers=workers if enough else before, reason=reason)["asked"]
        self.asked = asked
        if asked:
            self._told |= leaving.keys()
            tell(self._run_dir, reason)

    def _when_held(self, placed: Sequence[str], leaving: dict[str, float | None]) -> int | None:
        resize = self._client.call("resize_state")
        self.asked = resize["asked"]
        if not self.asked or resize["held_step"] is None:
            return None
        nodes = live_nodes()
        if not leaving and not set(placed) <= {node.node_id for node in nodes}:
            # It has gone; the failure of the group is about to be noticed.
            return None
        workers = self._fit(placed, leaving, nodes)
        if leaving and workers >= self._least:
            self.asked = False
            tell(self._run_dir, f"starting {workers} worker(s) on the other nodes after step {resize['held_step']}")
            return workers
        if all(deadline is None or time.time() > deadline + GRACE_S for deadline in leaving.values()):
            self.asked = False
            self._client.call("cancel_resize", reason="the node is still there, and there is no room without it")
        return None


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
