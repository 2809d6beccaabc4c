"""Runs the workers on a Ray cluster, with Ray Train.

Waiting times on two cores, two CPU workers: 3 s for a local cluster, 9 s from `fit` to the first line of the workers
(imports, in the controller and then in the workers), 5 s to a new worker group after a SIGKILL, 0.5 s to notice one.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError
from ray.train.torch import get_device
from ray.train.v2.api.config import FailureConfig, LoggingConfig, ScalingConfig
from ray.train.v2.api.config import RunConfig as RayRunConfig

from qlora_dist.cluster.actor import NAMESPACE, start_coordinator
from qlora_dist.cluster.elastic import PLACE_S, NodesPolicy, Trainer
from qlora_dist.cluster.group_watch import ATTEMPT_VARIABLE, GroupWatch, RunStopped, WorkersConnect
from qlora_dist.cluster.nodes import room
from qlora_dist.cluster.outcome import Outcome, read_outcome
from qlora_dist.cluster.output import Follower, logs_folder, next_attempt, rank_log, send_output_to
from qlora_dist.cluster.preemption import FixedPolicy
from qlora_dist.cluster.process import TRAIN, environment, import_function
from qlora_dist.cluster.ray_address import not_joined, probe_address, ray_address
from qlora_dist.cluster.stop_signals import stop_on_signals
from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.host import this_host
from qlora_dist.coordinate.rundir import read_run

POLL_S = 0.5
# For the controller to end, after Ctrl-C.
END_S = 10.0
AGAIN = "With Ray there again, the same command goes on from the last checkpoint"
# Ray's least; nothing of ours goes through the object store.
OBJECT_STORE_BYTES = 80 << 20


def run_with_ray(config: RunConfig, run_dir: Path, train_name: str = TRAIN) -> Outcome:
    """Run the workers of an opened run folder on a Ray cluster until the run has ended.

    Joins `launch.address` (or RAY_ADDRESS, which `ray job submit` sets), else starts a local cluster and stops it in
    the end. Rank 0's output appears on stdout as it is; all ranks' is kept in the run folder's logs/.

    Args:
        train_name: `module:function`, what each worker runs.

    Raises:
        UserError: the cluster cannot be reached, or can never hold the workers.
    """
    run_dir = run_dir.resolve()
    info = read_run(run_dir)
    with _ray_settings(config), _cluster(config):
        resources = worker_resources(config)
        check_room(config, resources)
        client = start_coordinator(config, run_dir, info.run_id)
        client.call("start_job", launcher="ray", host=this_host(), pid=os.getpid())
        attempt = next_attempt(run_dir)
        launch = config.launch
        scaling = ScalingConfig(
            num_workers=(launch.min_workers, launch.max_workers) if launch.elastic else launch.max_workers,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            # GPUs of one node talk over NVLink; CPU workers of one node share its memory's bandwidth.
            placement_strategy="PACK" if "GPU" in resources else "SPREAD",
        )
        policy = (
            NodesPolicy(scaling, client, run_dir, launch.start_timeout_s)
            if launch.elastic
            else FixedPolicy(scaling, client, run_dir)
        )
        trainer = Trainer(
            policy,
            run_worker,
            train_loop_config={
                "config": config, "client": client, "run_dir": run_dir, "nonce": info.nonce,
                "train_name": train_name,
            },
            torch_config=WorkersConnect(),
            scaling_config=scaling,
            run_config=RayRunConfig(  # type: ignore[arg-type]  # annotated with the class of Ray Train v1
                # Ray insists on a folder for checkpoints of its own, of which there are none.
                name="ray",
                storage_path=str(run_dir),
                # The coordinator decides; see GroupWatch.
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1),
                callbacks=[GroupWatch(client, run_dir, attempt, launch.max_restarts, launch.elastic)],  # type: ignore[list-item]
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )  # fmt: skip
        logs_folder(run_dir).mkdir(exist_ok=True)
        with stop_on_signals(run_dir) as signals:
            error = _fit(trainer, Follower(run_dir, attempt), logs_folder(run_dir) / "ray.log")
        cause = getattr(error, "controller_failure", error)
        if isinstance(cause, RunStopped):
            if cause.exit_code == 2:
                return Outcome(2, cause.reason)
            return read_outcome(client, cause.reason, cause.traceback)
        if isinstance(error, RayActorError):
            # The controller: its node is this one, whose raylet or memory has ended it, and then there is no asking.
            return Outcome(1, f"Ray's processes on this node have ended: {str(error).splitlines()[0]} {AGAIN}")
        if error is not None:
            raise error
        return signals.outcome(read_outcome(client))


def run_worker(settings: dict[str, Any]) -> None:
    """What Ray Train calls in each worker."""
    # Here and not above: the driver has no use for the training stack.
    from qlora_dist.train.context import Worker

    rank = int(os.environ["RANK"])
    send_output_to(rank_log(settings["run_dir"], int(os.environ[ATTEMPT_VARIABLE]), rank))
    worker = Worker(
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        device=get_device(),
        client=settings["client"],
        run_dir=settings["run_dir"],
        nonce=settings["nonce"],
    )
    import_function(settings["train_name"])(settings["config"], worker)


def _fit(trainer: Trainer, follower: Follower, ray_log: Path) -> Exception | None:
    """Run to the end, showing the workers' output meanwhile; the exception that `fit` raised, if it did.

    `fit` runs in a thread of its own: in the main thread Ray would take over Ctrl-C, and exit 0 after it.
    """
    errors: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    # What Ray prints of its own (a paragraph for each worker that dies) is for whoever looks for it.
    with open(ray_log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.2)
                follower.show_new()
        except BaseException:
            # Ray crashes now and then when it is shut down under a thread that waits in it.
            trainer.end()
            thread.join(END_S)
            raise
    follower.show_new()
    return errors[0] if errors else None


def _ray_settings(config: RunConfig) -> contextlib.AbstractContextManager[None]:
    """Ray Train's waiting times and habits, which it reads from the driver's environment."""
    launch = config.launch
    ours = {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),
        # For a worker that hangs alone; where there are more, the others' collectives find it.
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(launch.collective_timeout_s),
        # An elastic run plans anew when a placement does not come about, and keeps start_timeout_s itself.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(
            min(PLACE_S, launch.start_timeout_s) if launch.elastic else launch.start_timeout_s
        ),
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        # Its watcher for nodes that will be reclaimed costs a process; cluster/preemption.py looks itself.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    return environment(ours)


@contextlib.contextmanager
def _cluster(config: RunConfig) -> Iterator[None]:
    """A connection to a Ray cluster: the caller's, the one at `launch.address`, or a local one that ends with it."""
    if ray.is_initialized():
        yield
        return
    address, source = ray_address(config.launch.address)
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        launch = config.launch
        needed = launch.max_workers * launch.cpus_per_worker
        ray.init(
            address="local",
            # Two workers on one core are slow but right; Ray would wait for a second core for ever.
            num_cpus=max(needed, psutil.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **options,
        )
    else:
        probe_address(address, source)
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError) as error:
            raise not_joined(address, source, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def worker_resources(config: RunConfig) -> dict[str, float]:
    """What one worker asks Ray for: CPUs, and a GPU unless the cluster has none or the config wants none."""
    resources = {"CPU": float(config.launch.cpus_per_worker)}
    wanted = config.launch.device
    if wanted == "cuda" or (wanted == "auto" and ray.cluster_resources().get("GPU", 0) > 0):
        resources["GPU"] = 1.0
    return resources


def check_room(config: RunConfig, resources: dict[str, float]) -> None:
    """Refuse a worker group that the cluster's nodes can never hold, whoever uses them now.

    Raises:
        UserError: with what is needed and what is there.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = room(nodes, resources)
    workers = config.launch.min_workers
    if fit >= workers:
        return
    needed = " and ".join(f"{amount * workers:g} {name}s" for name, amount in resources.items())
    found = " and ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}s" for name in resources)
    if "GPU" in resources:
        raise UserError(
            "cluster-short-of-gpus", workers=workers, needed=needed, found=found, nodes=len(nodes), room=fit
        )
    raise UserError("cluster-too-small", workers=workers, needed=needed, found=found, nodes=len(nodes), room=fit)
