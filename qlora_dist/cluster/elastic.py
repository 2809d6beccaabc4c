"""How many workers a Ray run has while nodes come and go, where `launch.num_workers` is a range.

Ray Train's own elastic policy counts what its autoscaling service last reserved, the lost node included: with its
defaults a run went on 76 s after a node was killed. This one asks the nodes themselves.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qlora_dist.cluster.actor import RayClient
from qlora_dist.cluster.group_watch import RunStopped
from qlora_dist.cluster.nodes import Node, live_nodes, room
from qlora_dist.cluster.output import tell
from qlora_dist.cluster.preemption import Evacuation, FixedPolicy, NoAnswer, Patience, nodes_of, staying
from qlora_dist.config.errors import UserError

# What a group that ended held is free again within two seconds or so; what is not free by then others hold.
RELEASE_S = 5.0
# A placement that has not come about by then is planned anew: a node was lost in between, or others were faster.
PLACE_S = 15.0
# Looking for more room costs two calls to Ray's head and a connection to each node.
LOOK_S = 5.0
# Room must stay the same for so long before the run grows into it: nodes come back one after the other, and a resize
# costs a restart. After each further loss twice as long, so that a node that comes and goes cannot stop the training.
SETTLE_S = 10.0
LONGEST_SETTLE_S = 600.0
PAUSE_S = 0.5


class NodesPolicy(ScalingPolicy):
    """Decides on the size of the next worker group; lives in the controller's process, whose hooks come in turn.

    Args:
        scaling_config: with num_workers=(least, most).
        client: the coordinator's.
        run_dir: the run folder.
        start_timeout_s: as `launch.start_timeout_s`: how long to wait while fewer than the least number fit.
    """

    def __init__(self, scaling_config: ScalingConfig, client: RayClient, run_dir: Path, start_timeout_s: float):
        super().__init__(scaling_config)
        self._client, self._run_dir, self._start_timeout_s = client, run_dir, start_timeout_s
        self._least, self._most = scaling_config.min_workers, scaling_config.max_workers
        self._worker: dict[str, float] = dict(scaling_config._resources_per_worker_not_none)
        self._starts = 0
        self._waiting_since: float | None = None
        self._place_on: list[str] = []
        self._next_look = 0.0
        self._more, self._more_since = 0, 0.0
        self._asked = False
        self._patience = Patience()
        self._unknown = False
        self._evacuation = Evacuation(client, run_dir, self._least, self._most, self._worker)

    def _get_num_workers_for_resource_request(self) -> int:
        return self._most

    def on_controller_start_worker_group(
        self, *, scaling_config: ScalingConfig, num_workers: int
    ) -> dict[str, str] | None:
        """Keep workers off nodes that will be taken away, or are dead and Ray does not know it."""
        return {"ray.io/node-id": f"in({','.join(self._place_on)})"}

    # Decisions

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """As many workers as fit now, once at least the least number fit."""
        self._maybe_send_resource_request()
        self._asked, self._more = False, 0
        self._evacuation.forget()
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
        waited_s = time.monotonic() - self._waiting_since
        decision = self._unless_nobody_answers(lambda: self._next_size(waited_s), waited_s <= self._start_timeout_s)
        if isinstance(decision, NoopDecision):
            time.sleep(PAUSE_S)
        return decision

    def _next_size(self, waited_s: float) -> ScalingDecision:
        nodes = self._staying()
        fit, fit_empty = self._room(nodes)
        if fit >= self._least and (fit >= min(self._most, fit_empty) or waited_s > RELEASE_S):
            if self._starts and fit < self._most:
                tell(self._run_dir, f"going on with {fit} of {self._most} workers on {len(nodes)} node(s)")
            self._starts += 1
            return self._start(nodes, fit)
        if waited_s > self._start_timeout_s:
            self._give_up(max(fit, fit_empty))
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Leave a node that will be taken away, and grow where there is room: a checkpoint first, and the group ends
        only when it holds still."""
        self._maybe_send_resource_request()
        self._waiting_since = None
        workers, now = worker_group_state.num_workers, time.monotonic()
        if self._asked:
            return self._unless_nobody_answers(lambda: self._resize_when_ready(workers))
        left = self._evacuation.look(nodes_of(worker_group_state))
        if left is not None:
            # Where nobody answers, the evacuation asks again.
            return self._unless_nobody_answers(lambda: self._start(self._staying(), left))
        if self._evacuation.asked or workers >= self._most or now < self._next_look:
            return NoopDecision()
        self._next_look = now + LOOK_S
        return self._unless_nobody_answers(lambda: self._look_for_room(workers, now))

    def _look_for_room(self, workers: int, now: float) -> ScalingDecision:
        more = min(self._room(self._staying())[0], self._most - workers)
        if more != self._more:
            self._more, self._more_since = more, now
        settle_s = min(LONGEST_SETTLE_S, SETTLE_S * 2 ** max(0, self._starts - 2))
        if more > 0 and now - self._more_since >= settle_s:
            reason = f"growing from {workers} to {workers + more} workers, for which there is room again"
            # Asked, for all that is known, until the coordinator says otherwise: its answer may not come.
            self._asked = True
            self._asked = self._call("request_resize", workers=workers + more, reason=reason)["asked"]
        return NoopDecision()

    def _resize_when_ready(self, workers: int) -> ScalingDecision:
        resize = self._call("resize_state")
        self._asked = resize["asked"]
        if not self._asked or resize["held_step"] is None:
            return NoopDecision()
        nodes = self._staying()
        more = min(self._room(nodes)[0], self._most - workers)
        if more <= 0:
            self._call("cancel_resize", reason="the room that there was is gone")
            self._more, self._asked = 0, False
            return NoopDecision()
        # The next group is not asked for what this one did.
        self._more, self._asked = 0, False
        tell(self._run_dir, f"growing from {workers} to {workers + more} workers after step {resize['held_step']}")
        return self._start(nodes, workers + more)

    # What the decisions need

    def _unless_nobody_answers(self, decide: Callable[[], ScalingDecision], patient: bool = True) -> ScalingDecision:
        """`decide()`; where it asks and nobody answers, nothing changes until the next look, unless not `patient`."""
        try:
            decision = decide()
        except NoAnswer as error:
            if not self._unknown:
                tell(self._run_dir, f"what room there is for this run is not known now: {error}")
            self._unknown = True
            if not patient:
                raise
            return NoopDecision()
        self._unknown = False
        return decision

    def _staying(self) -> list[Node]:
        nodes: list[Node] = self._patience.ask(lambda: staying(live_nodes()))
        return nodes

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        return dict(self._patience.ask(self._client.call, method, **arguments))

    def _room(self, nodes: list[Node]) -> tuple[int, int]:
        """Workers that fit into what is free, and into nodes without anything on them."""
        return room([n.free for n in nodes], self._worker), room([n.total for n in nodes], self._worker)

    def _start(self, nodes: list[Node], workers: int) -> ResizeDecision:
        self._place_on = [node.node_id for node in nodes]
        return ResizeDecision(num_workers=min(workers, self._most), resources_per_worker=self._worker)

    def _give_up(self, fit: int) -> None:
        sentence = UserError(
            "nodes-missing", least=self._least, most=self._most, room=fit, seconds=math.ceil(self._start_timeout_s)
        ).message
        self._call("fail", generation=None, rank=None, kind="user", message=sentence)
        raise RunStopped(sentence, exit_code=2)


class Controller(TrainController):
    """Ray Train's controller, which ends a failed group before it decides on the next one's size.

    Ray's decides while the dead group still holds its places, so that their nodes look full.
    """

    def _make_and_handle_scaling_decision_for_non_running_worker_group(self, controller_state: Any) -> Any:
        if self._worker_group is not None:
            self._shutdown_worker_group()
        return super()._make_and_handle_scaling_decision_for_non_running_worker_group(controller_state)


class RetryLostWorkers(DefaultFailurePolicy):
    """Ray Train's policy, for which a worker that dies right before its training starts is the end of the run."""

    def _is_retryable_error(self, training_failed_error: Any) -> bool:
        lost = isinstance(getattr(training_failed_error, "controller_failure", None), RayActorError)
        return lost or super()._is_retryable_error(training_failed_error)


class Trainer(TorchTrainer):
    """A TorchTrainer whose group sizes a policy of ours decides, and that can be ended from another thread.

    Args:
        policy: decides on the number of workers.
        train_loop_per_worker, arguments: as TorchTrainer's.
    """

    def __init__(
        self,
        policy: NodesPolicy | FixedPolicy,
        train_loop_per_worker: Callable[[dict[str, Any]], None],
        **arguments: Any,
    ):
        super().__init__(train_loop_per_worker, **arguments)
        self._policy = policy
        self._controller: Any = None

    def end(self) -> None:
        """Make `fit` raise where it runs, and with its controller all workers end."""
        if self._controller is not None:
            ray.kill(self._controller)

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        settings = {**get_env_vars_to_propagate(), "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}
        actor_class: Any = ray.remote(num_cpus=0, runtime_env={"env_vars": settings})(Controller)
        parts["failure_policy"] = RetryLostWorkers(parts["failure_policy"].failure_config)
        parts["scaling_policy"] = self._policy
        self._controller = actor_class.options(scheduling_strategy=here).remote(**parts)
        ray.get(self._controller.run.remote())
        return ray.get(self._controller.get_result.remote())
