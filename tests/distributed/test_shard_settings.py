"""What only says where things lie or when they travel: whichever way it is set, the training is the same.

On a CPU activations are in host memory anyway; here they go through the copies all the same, as on a GPU. For the
tolerance see test_strategies.py.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.config.schema import RunConfig
from tests.distributed.group import series, train_in_group
from tests.distributed.strategies import worst_difference
from tests.single import small_config, train_here

ACTIVATIONS = {"offload": ["activations"]}
# World size, settings of `shard`, settings of `train`.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "replicate": (2, {"strategy": "fsdp", "frozen": "replicate"}, {}),
    "replicate, checkpointing": (2, {"strategy": "fsdp", "frozen": "replicate"}, {"gradient_checkpointing": True}),
    "keep gathered": (2, {"strategy": "fsdp", "reshard_after_forward": False}, {}),
    "no prefetch": (2, {"strategy": "fsdp", "prefetch_layers": 0}, {}),
    "prefetch all": (2, {"strategy": "fsdp", "prefetch_layers": 9}, {"gradient_checkpointing": True}),
    "shards": (2, {"strategy": "fsdp", "offload": ["shards"]}, {}),
    "all": (2, {"strategy": "fsdp", "offload": ["shards", "optimizer", "activations"]}, {}),
    "activations": (2, {"strategy": "fsdp"} | ACTIVATIONS, {}),
    "activations, checkpointing": (2, {"strategy": "fsdp"} | ACTIVATIONS, {"gradient_checkpointing": True}),
    "activations, replicate": (2, {"strategy": "fsdp", "frozen": "replicate"} | ACTIVATIONS, {}),
    "activations, ddp": (2, {"strategy": "ddp"} | ACTIVATIONS, {}),
    "activations, zero2": (2, {"strategy": "zero2"} | ACTIVATIONS, {}),
    "activations, zero3": (2, {"strategy": "zero3"} | ACTIVATIONS, {}),
    "optimizer, ddp": (2, {"strategy": "ddp", "offload": ["optimizer"]}, {}),
    "hybrid": (4, {"strategy": "hybrid", "hybrid_shard_size": 2, "frozen": "replicate"}, {}),
    "hybrid of one": (4, {"strategy": "hybrid", "hybrid_shard_size": 1}, {}),
    "hybrid of all": (4, {"strategy": "hybrid", "hybrid_shard_size": 4} | ACTIVATIONS, {}),
    "hybrid, shards": (4, {"strategy": "hybrid", "hybrid_shard_size": 2, "offload": ["shards"]}, {}),
}


def offload_on_a_cpu_too(rank: int) -> None:
    from qlora_dist.shard.activations import offload_activations
    from qlora_dist.train import worker

    stages, attach = worker.run_stages, worker.attach_adapter
    wanted = []

    def run_stages(config: RunConfig, *others: Any) -> None:
        wanted[:] = config.shard.offload
        stages(config, *others)

    def attach_adapter(*args: Any) -> Any:
        model = attach(*args)
        if "activations" in wanted:
            offload_activations(model, min_bytes=1)
        return model

    worker.run_stages, worker.attach_adapter = run_stages, attach_adapter


class Runs:
    def __init__(self, folder: Path, base: Path):
        self.folder, self.base = folder, base
        self.alone = cache(lambda: self._finished("none", (1, {"strategy": "none"}, {}), train_here))
        self.of_size = cache(self._of_size)

    def config(self, name: str, case: tuple[int, dict[str, Any], dict[str, Any]]) -> RunConfig:
        workers, shard, train = case
        return small_config(
            self.folder / name.replace(" ", "-"), self.base, shard=shard,
            train={"optim": "adamw_8bit", "global_batch_size": 5, "max_steps": 3} | train,
            launch={"backend": "none" if workers == 1 else "torchrun", "num_workers": workers},
        )  # fmt: skip

    def _finished(self, name: str, case: Any, run: Any) -> Path:
        config = self.config(name, case)
        assert run(config)["state"] == "finished"
        return config.run_dir

    def _of_size(self, workers: int) -> dict[str, Path]:
        configs = {name: self.config(name, case) for name, case in CASES.items() if case[0] == workers}
        outcomes = train_in_group(list(configs.values()), workers, offload_on_a_cpu_too)
        assert all(outcome["state"] == "finished" for outcome in outcomes), outcomes
        return {name: config.run_dir for name, config in configs.items()}


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("settings"), tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_training_is_the_same(runs: Runs, name: str) -> None:
    run_dir = runs.of_size(CASES[name][0])[name]
    for metric in ("loss", "grad_norm"):
        assert worst_difference(series(run_dir, metric), series(runs.alone(), metric)) < 1e-4, metric
