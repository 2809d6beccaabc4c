"""Runs of one worker inside the test's own process, through the project's own `train`."""

from pathlib import Path
from typing import Any

import torch

from qlora_dist.config.load import to_yaml
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.client import DirectClient
from qlora_dist.coordinate.rundir import open_run
from qlora_dist.coordinate.state import Coordinator
from qlora_dist.train.context import Worker
from qlora_dist.train.worker import train


def small_config(run_dir: Path, base: Path, /, **sections: dict[str, Any]) -> RunConfig:
    """A run of a few seconds on the tiny model; each keyword updates a section, `run` the top level."""
    values: dict[str, Any] = {
        "output_dir": run_dir,
        "model": {"name": str(base), "compute_dtype": "fp32"},
        "adapter": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "data": {"train": "bundled:home_commands", "max_rows": 30},
        "train": {"max_steps": 6, "global_batch_size": 4, "per_device_train_batch_size": 2, "learning_rate": 5e-3},
        "checkpoint": {"save_steps": 2},
        "launch": {"backend": "none"},
    }
    values |= sections.pop("run", {})
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return RunConfig.model_validate(values)


def train_here(config: RunConfig) -> dict[str, Any]:
    """Train with one worker in this process; return the coordinator's outcome."""
    info = open_run(config.run_dir, to_yaml(config))
    coordinator = Coordinator(config.run_dir, config.checkpoint.keep_last, config.checkpoint.keep_best)
    client = DirectClient(coordinator)
    client.call("start_job")
    train(config, Worker(0, 1, 0, torch.device("cpu"), client, config.run_dir, info.nonce))
    return coordinator.outcome()
