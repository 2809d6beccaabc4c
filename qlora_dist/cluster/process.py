"""What a worker process runs, and on which device, where the launcher does not decide it."""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig

# (RunConfig, train.context.Worker) -> None, importable by name on every node.
TrainFunction = Callable[[RunConfig, Any], None]
TRAIN = "qlora_dist.train.worker:train"


def import_function(name: str) -> TrainFunction:
    """The function that `module:function` names."""
    module, _, function = name.partition(":")
    found: TrainFunction = getattr(importlib.import_module(module), function)
    return found


def choose_device(config: RunConfig, local_rank: int) -> torch.device:
    """This process's device where the launcher does not decide it.

    Raises:
        UserError: `launch.device` asks for a GPU that this machine does not have.
    """
    count = torch.cuda.device_count()
    wanted = config.launch.device
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise UserError("too-few-gpus", device=wanted, local_rank=local_rank, found=count)
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """These environment variables inside the block, what was there before after it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ |= values
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
