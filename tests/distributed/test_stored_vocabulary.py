"""Embedding and head in int8, NF4 and host memory under every strategy: the losses of one worker with the same base."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_dist.config.schema import RunConfig
from tests.distributed.group import series, train_in_group
from tests.single import small_config, train_here
from tests.tiny import make_tiny_model

# Name: embedding, head, fused, tied, shard.
Case = tuple[str, str, str, bool, dict[str, Any]]
CASES: dict[str, Case] = {
    "fsdp-nf4-8bit": ("nf4", "8bit", "always", False, {"strategy": "fsdp", "frozen": "shard"}),
    "fsdp-host-nf4": ("host", "nf4", "never", False, {"strategy": "fsdp", "frozen": "shard"}),
    "fsdp-tied-nf4": ("nf4", "nf4", "always", True, {"strategy": "fsdp", "frozen": "shard"}),
    "fsdp-tied-host": ("host", "host", "never", True, {"strategy": "fsdp", "frozen": "shard"}),
    "replicated": ("8bit", "nf4", "always", False, {"strategy": "fsdp", "frozen": "replicate"}),
    "zero3-8bit-nf4": ("8bit", "nf4", "always", False, {"strategy": "zero3"}),
    "zero3-tied-8bit": ("8bit", "8bit", "never", True, {"strategy": "zero3"}),
    "zero2": ("8bit", "nf4", "always", False, {"strategy": "zero2"}),
    "ddp": ("host", "nf4", "always", False, {"strategy": "ddp"}),
}


QUICK = ("fsdp-nf4-8bit",)


class Runs:
    """Each case over two workers, quick and slow ones in the same processes each, and what one worker gives for it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bases = {tied: make_tiny_model(folder / f"base-{tied}") for tied in (False, True)}
        config = AutoConfig.from_pretrained(self.bases[True])
        config.tie_word_embeddings = True
        with torch.random.fork_rng():
            AutoModelForCausalLM.from_config(config).save_pretrained(self.bases[True])
        self.sharded, self.alone = cache(self._sharded), cache(self._alone)

    def config(self, name: str, case: Case, workers: int) -> RunConfig:
        embedding, head, fused, tied, shard = case
        model = {"name": str(self.bases[tied]), "compute_dtype": "fp32"}
        return small_config(
            self.folder / name, self.bases[tied],
            model=model | {"embedding": embedding, "head": head, "fused": fused}, shard=shard,
            adapter={"lora_dropout": 0.0}, train={"max_steps": 3}, checkpoint={"save_steps": 99},
            track={"report": False, "tensorboard": False},
            launch={"backend": "torchrun" if workers > 1 else "none", "num_workers": workers},
        )  # fmt: skip

    def _sharded(self, quick: bool) -> dict[str, dict[int, float]]:
        configs = [self.config(name, case, 2) for name, case in CASES.items() if (name in QUICK) == quick]
        for outcome in train_in_group(configs, 2):
            assert outcome["state"] == "finished", outcome["message"]
        return {config.run_dir.name: series(config.run_dir, "loss") for config in configs}

    def _alone(self, embedding: str, head: str, tied: bool) -> dict[int, float]:
        config = self.config(f"alone-{embedding}-{head}-{tied}", (embedding, head, "never", tied, {}), 1)
        assert train_here(config)["state"] == "finished"
        return series(config.run_dir, "loss")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_losses_are_those_of_one_worker(runs: Runs, name: str) -> None:
    embedding, head, _, tied, _ = CASES[name]
    # Sums in another order, in fp32; 8-bit AdamW carries them through three steps.
    assert runs.sharded(name in QUICK)[name] == pytest.approx(runs.alone(embedding, head, tied), rel=1e-4)
