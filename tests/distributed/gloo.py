"""Functions run in real processes of one process group, without a training run around them."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.group import CONTEXT, free_port


def in_group(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 240, backend: str = "gloo",
    collective_timeout_s: float = 120,
) -> list[Any]:  # fmt: skip
    """What the module-level `function(rank, *arguments)` returns on each rank; raises what it raises, as text."""
    with TemporaryDirectory() as folder:
        plan = (world_size, backend, collective_timeout_s, free_port(), Path(folder), dict(os.environ))
        # What is imported may have opened the GPUs, which a fork cannot share.
        context = CONTEXT if backend == "gloo" else multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_child, args=(rank, *plan, function, arguments)) for rank in range(world_size)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(timeout_s)
            assert not any(process.is_alive() for process in processes), "a rank hangs"
            outcomes = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
        finally:
            for process in processes:
                process.kill()
    assert not any(text for text, _ in outcomes), "\n".join(text for text, _ in outcomes)
    return [value for _, value in outcomes]


def _child(
    rank: int, world_size: int, backend: str, collective_timeout_s: float, port: int, folder: Path,
    environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    os.environ |= environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    timeout = timedelta(seconds=collective_timeout_s)
    dist.init_process_group(backend, timeout=timeout, rank=rank, world_size=world_size)
    try:
        outcome = ("", function(rank, *arguments))
    except Exception:
        outcome = (f"rank {rank}: {traceback.format_exc()}", None)
    torch.save(outcome, folder / f"{rank}.pt")
    dist.destroy_process_group()
