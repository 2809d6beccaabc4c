"""Runs the workers under torchrun: started by us on this machine, or by the person on any number of machines.

Started by us, this process hosts the coordinator and decides on restarts; each attempt is a torchrun of no restarts,
so that the same rules hold as on Ray. Started by the person (torchrun, accelerate launch: RANK and WORLD_SIZE are
set), rank 0 hosts the coordinator and the restarts are the launcher's.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from torch.distributed import PrefixStore, Store, rendezvous
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qlora_dist.cluster.address_file import read_address, write_address
from qlora_dist.cluster.launched import MOST_PORT, given, number
from qlora_dist.cluster.network import address_towards, interface_settings
from qlora_dist.cluster.outcome import Outcome, read_outcome
from qlora_dist.cluster.output import next_attempt, rank_log
from qlora_dist.cluster.process import TRAIN, choose_device, environment, import_function
from qlora_dist.cluster.second_start import refuse_second_start
from qlora_dist.cluster.stop_signals import StopSignals, stop_on_signals
from qlora_dist.config.errors import UserError
from qlora_dist.config.load import to_yaml
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.client import CoordinatorClient, DirectClient, Fenced, HttpClient
from qlora_dist.coordinate.host import this_host
from qlora_dist.coordinate.rundir import open_run
from qlora_dist.coordinate.service import CoordinatorService
from qlora_dist.coordinate.state import Coordinator
from qlora_dist.track.prometheus import serving
from qlora_dist.train.context import Worker

KEY_VARIABLE = "QLORA_DIST_KEY"
# The run folder's config.yaml has no secrets, so the workers get the configuration from the launcher.
CONFIG_VARIABLE = "QLORA_DIST_CONFIG"
LINGER_S = 10.0
# How a worker of ours ends whose attempt is over; a restart of it would take the living one's place.
FENCED = 3


def run_with_torchrun(config: RunConfig, run_dir: Path, train_name: str = TRAIN) -> Outcome:
    """Run the workers of an opened run folder on this machine until the run has ended.

    Rank 0 has this process's terminal; the others write to the run folder's logs/.

    Args:
        train_name: `module:function`, what the workers run.
    """
    run_dir = run_dir.resolve()
    coordinator = Coordinator(run_dir, config.checkpoint.keep_last, config.checkpoint.keep_best)
    client = DirectClient(coordinator)
    client.call("start_job", launcher="torchrun", host=this_host(), pid=os.getpid())
    token, key = secrets.token_urlsafe(32), secrets.token_hex(8)
    service = CoordinatorService(coordinator, token)
    write_address(run_dir, service.url, token, key)
    try:
        settings = {
            KEY_VARIABLE: key,
            CONFIG_VARIABLE: config.model_dump_json(),
            "OMP_NUM_THREADS": str(config.launch.cpus_per_worker),
            # Seconds between SIGTERM and SIGKILL; a stopped worker hears only the second.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",
        }
        metrics = serving(config.track.prometheus_port, coordinator)
        with environment(settings), metrics, stop_on_signals(run_dir) as signals:
            while True:
                reason = _run_attempt(config, run_dir, client, train_name, signals)
                if reason is None:
                    return signals.outcome(read_outcome(client))
                answer = client.call("should_restart", message=reason, max_restarts=config.launch.max_restarts)
                if not answer["restart"]:
                    return read_outcome(client, answer["reason"])
                print(f"{reason}; starting the workers again from the last checkpoint", file=sys.stderr, flush=True)
    finally:
        service.stop()


def _run_attempt(
    config: RunConfig, run_dir: Path, client: CoordinatorClient, train_name: str, signals: StopSignals
) -> str | None:
    """One worker group; why it failed, None where all its workers ended well."""
    attempt = next_attempt(run_dir)
    rank_log(run_dir, attempt, 0).parent.mkdir(parents=True)
    # torch's agent tells of every signal it sends, in its own words.
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="qlora-dist-") as agent_logs:
        signals.scratch = Path(agent_logs)
        agent = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=workers_here(config),
            run_id=secrets.token_hex(8),
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
            # Not SIGTERM, which stop_on_signals hears.
            signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
            logs_specs=DefaultLogsSpecs(log_dir=agent_logs),
        )
        entry = ["-m", "qlora_dist.cluster.worker_entry", str(run_dir), str(attempt), train_name]
        try:
            elastic_launch(agent, sys.executable)(*entry)
        except ChildFailedError as error:
            if any(failure.exitcode == FENCED for failure in error.failures.values()):
                raise Fenced("another start of this run has taken its place") from error
            return _explain(error, client)
        except SignalException as error:
            raise KeyboardInterrupt from error
    return None


def workers_here(config: RunConfig) -> int:
    """How many workers this machine alone gets: the most of `launch.num_workers` that there are GPUs for.

    Raises:
        UserError: there are fewer GPUs than the least number of workers.
    """
    launch = config.launch
    found = torch.cuda.device_count()
    if not launch.elastic or launch.device == "cpu" or (launch.device == "auto" and found == 0):
        return launch.max_workers
    if found < launch.min_workers:
        raise UserError("machine-too-small", least=launch.min_workers, most=launch.max_workers, found=found)
    return min(found, launch.max_workers)


def _explain(error: ChildFailedError, client: CoordinatorClient) -> str:
    told = client.call("outcome")
    if told["state"] == "failed" and told["message"]:
        return str(told["message"])
    # Those that torch's agent ended itself, after the first failure, died of SIGTERM.
    killed = {r: f for r, f in error.failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM}
    if killed:
        host = this_host()
        return "; ".join(
            f"rank {rank} (host {host}, pid {failure.pid}) died of {signal.Signals(-failure.exitcode).name}"
            for rank, failure in sorted(killed.items())
        )
    rank, failure = error.get_first_failure()
    return f"rank {rank} (pid {failure.pid}) ended with exit code {failure.exitcode}"


def with_world_size(config: RunConfig, world_size: int) -> RunConfig:
    """The configuration for the number of workers that somebody else has started.

    A range stays as it is: the global batch follows from it, whoever is there.

    Raises:
        UserError: it names another number, or a range without this one, itself.
    """
    launch = config.launch
    if launch.elastic and not launch.min_workers <= world_size <= launch.max_workers:
        raise UserError(
            "world-size-out-of-range", least=launch.min_workers, most=launch.max_workers, world_size=world_size
        )
    if launch.elastic or launch.max_workers == world_size:
        return config
    if "num_workers" in launch.model_fields_set:
        raise UserError("world-size-differs", num_workers=launch.num_workers, world_size=world_size)
    return config.model_copy(update={"launch": launch.model_copy(update={"num_workers": world_size})})


def run_as_worker(config: RunConfig, run_dir: Path, train_name: str = TRAIN) -> Outcome:
    """Be the worker that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT make of this process.

    Rank 0 opens the run folder and hosts the coordinator; what the train function raises is raised here.

    Raises:
        UserError: one of them is missing or odd.
    """
    run_dir = run_dir.resolve()
    world_size = number(os.environ, "WORLD_SIZE")
    rank = number(os.environ, "RANK", most=world_size - 1)
    config = with_world_size(config, world_size)
    local_rank = number(os.environ, "LOCAL_RANK", 0)
    if world_size > 1:
        given(os.environ, "MASTER_ADDR")
        number(os.environ, "MASTER_PORT", most=MOST_PORT)
    device = choose_device(config, local_rank)
    if not on_one_machine(world_size):
        os.environ |= interface_settings(_address_towards_master())
    store: Store | None = None
    if world_size > 1:
        timeout = timedelta(seconds=config.launch.start_timeout_s)
        # Torch's own later rendezvous, of the process group, shares this store's server.
        store = PrefixStore("qlora-dist", next(iter(rendezvous("env://", timeout=timeout)))[0])
    with contextlib.ExitStack() as stack:
        if rank == 0:
            client, nonce = stack.enter_context(_host_coordinator(config, run_dir, store, world_size))
        else:
            assert store is not None
            stack.callback(store.add, "left", 1)
            nonce = store.get("nonce").decode()
            url, token = read_address(run_dir, store.get("key").decode(), config.launch.start_timeout_s)
            client = HttpClient(url, token)
        worker = Worker(rank, world_size, local_rank, device, client, run_dir, nonce)
        import_function(train_name)(config, worker)
        if rank == 0:
            return read_outcome(client)
        # Rank 0 may not have said yet that the run is finished; only what stops every rank is this one's to tell.
        told = client.call("outcome")
        return Outcome(2, told["message"]) if told["kind"] == "user" else Outcome(0)


def on_one_machine(world_size: int) -> bool:
    """Whether the launcher that set this process's environment started all workers here."""
    return number(os.environ, "LOCAL_WORLD_SIZE", 0) == world_size


def _address_towards_master() -> str:
    try:
        return address_towards(given(os.environ, "MASTER_ADDR"))
    except OSError as error:
        raise UserError("master-unreachable", host=os.environ["MASTER_ADDR"], error=error) from error


def _session() -> str | None:
    """Names the agent that started this process; workers that it starts again belong to the same job."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    agent = psutil.Process(os.getppid())
    return f"{socket.gethostname()}:{agent.pid}:{agent.create_time()}"


@contextlib.contextmanager
def _host_coordinator(
    config: RunConfig, run_dir: Path, store: Store | None, world_size: int
) -> Iterator[tuple[CoordinatorClient, str]]:
    """On rank 0: the coordinator, its service for the other ranks, and time for them to leave before it ends."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        refuse_second_start(run_dir)
    info = open_run(run_dir, to_yaml(config))
    coordinator = Coordinator(run_dir, config.checkpoint.keep_last, config.checkpoint.keep_best)
    client = DirectClient(coordinator)
    client.call("start_job", launcher="torchrun", host=this_host(), pid=os.getpid(), session=_session())
    metrics = serving(config.track.prometheus_port, coordinator)
    if store is None:
        with metrics:
            yield client, info.nonce
        return
    token, key = secrets.token_urlsafe(32), secrets.token_hex(8)
    host = "127.0.0.1" if on_one_machine(world_size) else os.environ["MASTER_ADDR"]
    service = CoordinatorService(coordinator, token, host)
    write_address(run_dir, service.url, token, key)
    store.set("nonce", info.nonce)
    store.set("key", key)
    try:
        with metrics:
            yield client, info.nonce
    finally:
        deadline = time.monotonic() + LINGER_S
        while store.add("left", 0) < world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        service.stop()
