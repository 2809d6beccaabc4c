"""What a launcher hands to a worker; light to import, since launchers need no training stack."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_dist.coordinate.client import CoordinatorClient


@dataclass(frozen=True)
class Worker:
    """One of the identical workers of a run: a rank, a device, and a client of the coordinator."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    client: CoordinatorClient
    run_dir: Path
    nonce: str

    @property
    def local_world_size(self) -> int:
        """Workers on this node, as every launcher says it in the environment; all of them where none does."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
