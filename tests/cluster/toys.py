"""Train functions for tests of the launchers: real gloo collectives, no model. Each says what it did in `toy.log`."""

import os
import secrets
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.client import join_and_wait
from qlora_dist.train.context import Worker

STEP_S = 0.05


def toy_config(**launch) -> RunConfig:
    """Two CPU workers and 40 steps, unless told otherwise."""
    steps = launch.pop("steps", 40)
    return RunConfig.model_validate(
        {
            "model": {"name": "none"},
            "data": {"train": "none"},
            "train": {"max_steps": steps},
            "launch": {"num_workers": 2, "device": "cpu", "start_timeout_s": 60, **launch},
        }
    )


def log(worker: Worker, *words) -> None:
    with open(worker.run_dir / "toy.log", "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def read_log(run_dir: Path) -> list[list[str]]:
    """The log's lines, in words."""
    path = run_dir / "toy.log"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def connect(config: RunConfig, worker: Worker) -> int:
    """Process group and generation, as the real train function does it."""
    log(worker, "start", worker.rank, os.getpid())
    log(worker, "place", worker.rank, worker.world_size, worker.local_rank, os.environ.get("GLOO_SOCKET_IFNAME", "-"))
    if worker.world_size > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=config.launch.collective_timeout_s))
    box = [secrets.token_hex(8)]
    if worker.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    host = socket.gethostname()
    return join_and_wait(worker.client, box[0], worker.rank, worker.world_size, host, os.getpid(), 60)


def count(config: RunConfig, worker: Worker) -> None:
    """`max_steps` all-reduces; goes on from the last step that rank 0 noted."""
    generation = connect(config, worker)
    done = [int(words[1]) for words in read_log(worker.run_dir) if words[0] == "step"]
    first = torch.tensor(max(done, default=0))
    if worker.world_size > 1:
        dist.broadcast(first, src=0)
    log(worker, "from", worker.rank, int(first))
    print(f"rank {worker.rank} counts from {int(first)}")
    for step in range(int(first) + 1, (config.train.max_steps or 0) + 1):
        total = torch.ones(())
        if worker.world_size > 1:
            dist.all_reduce(total)
        assert total == worker.world_size
        worker.client.call("heartbeat", generation=generation, rank=worker.rank, step=step, phase="compute")
        if worker.rank == 0:
            log(worker, "step", step)
        time.sleep(STEP_S)
    if worker.world_size > 1:
        dist.barrier()
    if worker.rank == 0:
        worker.client.call("finish", generation=generation, step=config.train.max_steps, summary={"toy": True})
    if dist.is_initialized():
        dist.destroy_process_group()


def mistake(config: RunConfig, worker: Worker) -> None:
    """The last rank finds something that a person must mend; the others would go on for ever."""
    generation = connect(config, worker)
    if worker.rank == worker.world_size - 1:
        worker.client.call(
            "fail", generation=generation, rank=worker.rank, kind="user", message="data.train is empty; add rows"
        )
        return
    while True:
        time.sleep(0.1)


def crash(config: RunConfig, worker: Worker) -> None:
    """The same exception in every attempt, at the same step."""
    generation = connect(config, worker)
    worker.client.call("heartbeat", generation=generation, rank=worker.rank, step=7, phase="compute")
    if worker.rank == 1:
        raise ArithmeticError(f"overflow in process {os.getpid()}")
    dist.barrier()


def hang(config: RunConfig, worker: Worker) -> None:
    """Runs until it is ended."""
    connect(config, worker)
    while True:
        log(worker, "alive", worker.rank, os.getpid())
        time.sleep(0.2)
