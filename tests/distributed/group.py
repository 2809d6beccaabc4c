"""Real worker groups for tests: processes over gloo that run the project's own `train`, one coordinator service."""

import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

from qlora_dist.config.load import to_yaml
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.rundir import open_run
from qlora_dist.coordinate.service import CoordinatorService
from qlora_dist.coordinate.state import Coordinator
from qlora_dist.track.metrics import read_metrics

TOKEN = "of-this-test"
CONTEXT = multiprocessing.get_context("forkserver")
# Processes are forked from one that has imported all of this, once for a whole test session.
PRELOAD = ["bitsandbytes", "peft", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama",
           "qlora_dist.train.worker", "qlora_dist.shard.fsdp", "qlora_dist.shard.ddp"]  # fmt: skip
CONTEXT.set_forkserver_preload(PRELOAD)
Sabotage = Callable[[int], None]


# Below the ports that the system gives to connections: one of those may be somebody's again by the time it is used.
PORTS = cycle(range(15_000, 32_000))
for _ in range(random.SystemRandom().randrange(17_000)):
    next(PORTS)


def free_port() -> int:
    """A TCP port that was free a moment ago, and never one twice: a process keeps its old groups' stores."""
    for port in PORTS:
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError


def train_in_group(
    configs: Sequence[RunConfig],
    world_size: int,
    sabotage: Sabotage | None = None,
    timeout_s: float = 300,
    device: str = "cpu",
) -> list[dict]:
    """Train each of `configs` in turn with `world_size` processes; return each run's outcome.

    Args:
        sabotage: a module-level function called with the rank in every process first, to break something on purpose.
        device: `cuda` gives each rank a GPU.
    """
    # What is imported may have opened the GPUs, which a fork cannot share.
    context = CONTEXT if device == "cpu" else multiprocessing.get_context("spawn")
    services, plans = [], []
    try:
        for config in configs:
            info = open_run(config.run_dir, to_yaml(config))
            service = CoordinatorService(Coordinator(config.run_dir), TOKEN)
            services.append(service)
            plans.append((config, service.url, info.nonce, free_port()))
        processes = [
            context.Process(target=_worker_process, args=(rank, world_size, device, plans, sabotage, dict(os.environ)))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=timeout_s)
        assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
        return [Coordinator(config.run_dir).outcome() for config in configs]
    finally:
        for process in processes:
            process.kill()
        for service in services:
            service.stop()


def _worker_process(
    rank: int, world_size: int, device: str, plans: list[tuple[Any, ...]], sabotage: Sabotage | None,
    environment: dict[str, str],
) -> None:  # fmt: skip
    import torch

    from qlora_dist.coordinate.client import HttpClient
    from qlora_dist.train.context import Worker
    from qlora_dist.train.worker import train

    os.environ |= environment
    torch.set_num_threads(1)
    if sabotage is not None:
        sabotage(rank)
    for config, url, nonce, port in plans:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        client = HttpClient(url, TOKEN)
        try:
            place = torch.device(device, rank) if device == "cuda" else torch.device(device)
            train(config, Worker(rank, world_size, rank, place, client, config.run_dir, nonce))
        except Exception:
            traceback.print_exc()
            raise


def series(run_dir: Path, metric: str) -> dict[int, float]:
    """One value a step of a metric in metrics.jsonl; asserts that no step has two."""
    values: dict[int, float] = {}
    for record in read_metrics(run_dir):
        if metric in record:
            assert record["step"] not in values, f"{metric} of step {record['step']} is there twice"
            values[record["step"]] = record[metric]
    return values
