"""What we hook into Ray Train's controller: the workers' environment, who failed, and whether to go on.

Ray's own restart (within one controller, from these hooks) is used and not a loop of ours around `fit`. On two idle
cores, with two CPU workers that import only torch, 4.7 s pass from a SIGKILL to the first line of the new workers; a
new `fit` alone takes 9 s to that line. And it is what elastic resizing builds on.
"""

import os
from pathlib import Path
from typing import Any

import ray
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from qlora_dist.cluster.actor import RayClient
from qlora_dist.cluster.network import free_port, interface_settings
from qlora_dist.cluster.nodes import live_nodes
from qlora_dist.cluster.output import rank_log, tell
from qlora_dist.config.errors import UserError

ATTEMPT_VARIABLE = "QLORA_DIST_ATTEMPT"
# A worker that does not answer a ping for so long is stopped or hangs (it answers from a thread of its own).
PING_S = 2.0


class RunStopped(Exception):
    """The controller is to end the run: (reason, traceback of the first failed rank or None, exit code)."""

    def __init__(self, reason: str, traceback: str | None = None, exit_code: int = 1):
        super().__init__(reason, traceback, exit_code)
        self.reason, self.traceback, self.exit_code = reason, traceback, exit_code


class _NoProcessGroup(Backend):
    share_cuda_visible_devices = True


class WorkersConnect(TorchConfig):
    """Leaves the process group to the workers, as under every other launcher.

    Ray's own would need 30 s longer to shut down a group in which one worker is stopped.
    """

    @property
    def backend_cls(self) -> type[Backend]:
        return _NoProcessGroup


class GroupWatch(ControllerCallback, WorkerGroupCallback):
    """Lives in the controller's process. Its hooks are called in turn, never at the same time.

    Args:
        client: the coordinator's.
        run_dir: the run folder.
        first_attempt: number of the first worker group, for the logs.
        max_restarts: as in `launch.max_restarts`.
        elastic: the run goes on with the nodes that are left, so that the loss of one is no failure of the run, and a
            group that could not be placed is planned anew.
    """

    def __init__(self, client: RayClient, run_dir: Path, first_attempt: int, max_restarts: int, elastic: bool = False):
        self._client, self._run_dir, self._elastic = client, run_dir, elastic
        self._attempt, self._max_restarts = first_attempt - 1, max_restarts
        self._group: Any = None
        self._errors: dict[int, Exception] = {}

    # Hooks, in the order in which they come

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Give the workers the environment that torchrun would."""
        self._group, self._errors = worker_group, {}
        self._attempt += 1
        host, port = worker_group.execute_single(0, find_address)
        common = {"MASTER_ADDR": host, "MASTER_PORT": str(port), ATTEMPT_VARIABLE: str(self._attempt)}
        worker_group.execute(set_environment, common)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Note errors; end the run at once when one rank left with something a person must mend."""
        statuses = worker_group_status.worker_statuses
        self._errors = {rank: status.error for rank, status in statuses.items() if status.error is not None}
        left = [rank for rank, status in statuses.items() if not status.running]
        if left and not self._errors and len(left) < len(statuses):
            outcome = self._client.call("outcome")
            if outcome["kind"] == "user":
                raise RunStopped(outcome["message"], exit_code=2)

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Ask the coordinator whether the failure that was polled last deserves a new worker group."""
        if failure_decision.name != "RETRY" or not self._errors:
            return
        diagnosis = self._diagnose()
        # They are told of once: the next failure may be that of a group which never started.
        self._errors = {}
        self._ask_for_restart(*diagnosis)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """A worker group that could not start: resources are held by others, or a worker died while it started."""
        # It is the same state again while there is no room yet.
        if type(current_state).__name__ != "ReschedulingState" or current_state is previous_state:
            return
        # Ray forgets a group that failed between its start and its training, which then keeps its places for ever.
        if self._group is not None and self._group.has_started():
            self._group.shutdown()
        error = current_state.training_failed_error
        cause = getattr(error, "controller_failure", error)
        if isinstance(cause, WorkerGroupStartupTimeoutError) and self._elastic:
            tell(self._run_dir, f"{cause.num_workers} worker(s) did not get their places; looking at the nodes again")
            return
        if isinstance(cause, WorkerGroupStartupTimeoutError):
            sentence = UserError("cluster-busy", workers=cause.num_workers).message
            self._client.call("fail", generation=None, rank=None, kind="user", message=sentence)
            raise RunStopped(sentence, exit_code=2)
        self._ask_for_restart(f"the workers could not start: {str(cause).splitlines()[0]}", str(cause))

    # What the hooks need

    def _ask_for_restart(self, reason: str, traceback: str | None, node_lost: bool = False) -> None:
        counted = not (node_lost and self._elastic)
        answer = self._client.call("should_restart", message=reason, max_restarts=self._max_restarts, counted=counted)
        if not answer["restart"]:
            raise RunStopped(answer["reason"], traceback)
        tell(self._run_dir, f"{reason}; starting the workers again from the last checkpoint")

    def _diagnose(self) -> tuple[str, str | None, bool]:
        """The failure behind the failures, a traceback if there is one, and whether a node was lost.

        A lost node goes before a silent rank, that before a dead one, that before exceptions: NCCL ends the processes
        that wait for a stopped one, so the dead may be the innocent.

        Silent ranks are killed here: Ray would wait 5 s for them first.
        """
        workers = self._group.get_workers()
        pings = {worker.execute_async(os.getpid): (rank, worker) for rank, worker in enumerate(workers)}
        answered, unanswered = ray.wait(list(pings), num_returns=len(pings), timeout=PING_S)
        dead = [pings[ref] for ref in answered if not _answers(ref)]
        silent = [pings[ref] for ref in unanswered]
        for _, worker in silent:
            ray.kill(worker.actor)
        traceback = next((t for e in self._errors.values() if (t := getattr(e, "_traceback_str", None))), None)
        if silent or dead:
            living = {node.node_id for node in live_nodes()}
            lost = [(rank, worker) for rank, worker in silent + dead if worker.metadata.node_id not in living]
            if lost:
                addresses = ", ".join(sorted({worker.metadata.node_ip for _, worker in lost}))
                names = ", ".join(self._name(*who) for who in lost)
                return f"node {addresses} is lost, and with it {names}", None, True
        if silent:
            return f"{', '.join(self._name(*who) for who in silent)} stopped answering", traceback, False
        if dead:
            names = ", ".join(self._name(*who) for who in dead)
            log = rank_log(self._run_dir, self._attempt, dead[0][0])
            return f"{names} died: killed, out of memory or crashed (see {log})", None, False
        error = next(iter(self._errors.values()))
        cause = getattr(error, "_base_exc", error)
        return f"{type(cause).__name__}: {cause}", traceback, False

    def _name(self, rank: int, worker: Any) -> str:
        return f"rank {rank} (host {worker.metadata.hostname}, pid {worker.metadata.pid})"


def _answers(ping: Any) -> bool:
    try:
        ray.get(ping)
    except ray.exceptions.RayActorError:
        return False
    return True


def find_address() -> tuple[str, int]:
    """This worker's address and a port that is free now."""
    return ray.util.get_node_ip_address(), free_port()


def set_environment(common: dict[str, str]) -> None:
    """Set what torch's `env://` initialisation reads in this worker, and the network interface to the other nodes."""
    context = ray.train.get_context()
    os.environ |= {
        **common,
        **interface_settings(ray.util.get_node_ip_address()),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
