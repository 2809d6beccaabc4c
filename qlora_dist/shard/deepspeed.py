"""DeepSpeed as a library among others: started quietly inside our process group, with no say in what our loop does."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from qlora_dist.model.quiet import mute_known_chatter
from qlora_dist.shard.pieces import Piece, PieceOptimizer


class SteppedByPieces(Optimizer):
    """The optimizer that DeepSpeed is given: it holds DeepSpeed's flat partition and steps ours, piece by piece.

    Args:
        flats: the flat adapter parameters, in whose place DeepSpeed puts this rank's partition of them all.

    Attributes:
        skipping: leave the next step out.
    """

    def __init__(self, flats: list[nn.Parameter]):
        super().__init__(flats, {"lr": 0.0})
        self.ours: PieceOptimizer | None = None
        self.layout: list[tuple[Piece, int]] = []
        self.skipping = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step our optimizer with the gradient that DeepSpeed has put on its partition."""
        assert self.ours is not None
        if self.skipping:
            return
        (partition,) = self.param_groups[0]["params"]
        for piece, offset in self.layout:
            piece.parameter.grad = partition.grad[offset : offset + piece.parameter.numel()]
        self.ours.optimizer.step()
        self.ours.optimizer.zero_grad(set_to_none=True)


@contextmanager
def library(device: torch.device) -> Iterator[Any]:
    """The `deepspeed` package, ready to build an engine on `device` in the process group of this moment.

    A worker alone gets a process group of its own.
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mute_known_chatter()
    # Its name for a device number, read at every step; a launcher may count otherwise.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    needed = {
        "DS_ACCELERATOR": device.type,
        "RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
    }
    before = {name: os.environ.get(name) for name in needed}
    os.environ |= needed
    try:
        yield _import()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _import() -> Any:
    import deepspeed
    import deepspeed.ops
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated")
    # None of its own kernels: one is an all-reduce for CPUs, a minute to compile, whose sums are not gloo's.
    deepspeed.ops.__compatible_ops__ = {}
    # What it remembers of a process group that an earlier run of this process has closed.
    comm.cdb = None
    groups._release_process_group_references()
    parameter_offload.FWD_MODULE_STACK.clear()
    # A group of its own would have a timeout of its own, and a stuck rank would be noticed later than configured.
    groups._WORLD_GROUP = dist.group.WORLD
    return deepspeed
