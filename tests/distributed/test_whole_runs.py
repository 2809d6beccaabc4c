"""Whole runs with all that surrounds the steps, under every strategy: what comes out is what one worker brings about.

Modules trained in full, tied embeddings, evaluation, samples, the best checkpoint, checkpointing of activations,
dropout, early stopping. Tolerances: see test_strategies.py.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qlora_dist.config.schema import RunConfig
from tests.distributed.group import series, train_in_group
from tests.distributed.strategies import STRATEGIES, worst_difference
from tests.distributed.test_same_training import nf4_base
from tests.single import small_config, train_here
from tests.tiny import make_tiny_model

FULL = {"modules_to_save": ["embed_tokens", "lm_head"]}
HELD_OUT = {"eval": "bundled:home_commands", "max_eval_rows": 5}
# Three evaluation batches over two or four ranks: some run one for the others' sake.
EVALUATION = {"eval_steps": 2, "per_device_eval_batch_size": 2}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "full": {"adapter": FULL},
    "full tied": {"adapter": FULL},
    "tied": {"train": {"optim": "adamw_torch"}},
    "head": {"adapter": {"modules_to_save": ["lm_head"]}},
    "all": {
        "adapter": {"lora_dropout": 0.2},
        # A learning rate at which the held-out loss rises again.
        "train": {
            "gradient_checkpointing": True,
            "optim": "sgd",
            "learning_rate": 3.0,
            "lr_scheduler_type": "constant",
        },
        "data": HELD_OUT,
        "eval": EVALUATION | {"load_best_model_at_end": True, "sample_prompts": 3, "sample_max_new_tokens": 6},
    },
    "early": {"data": HELD_OUT, "eval": EVALUATION | {"early_stopping_patience": 1, "early_stopping_threshold": 9.0}},
}
# Each strategy has the cases that touch what it does in a way of its own; fsdp has all of them.
SOME = {"ddp": ("full", "full tied", "all"), "hybrid": ("full tied", "all")}
WANTED = [
    (strategy, case) for strategy in STRATEGIES for case in CASES
    if strategy == "fsdp" or case in SOME.get(strategy, SOME["ddp"])
]  # fmt: skip


class Runs:
    """Every case under one worker and under every strategy; those of one world size share its processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.untied = make_tiny_model(folder / "untied")
        self.tied = make_tied_model(folder / "tied")
        self.alone = cache(self._alone)
        self.sharded = cache(self._sharded)

    def base(self, case: str) -> Path:
        return self.tied if case.endswith("tied") else self.untied

    def config(self, case: str, strategy: str, workers: int) -> RunConfig:
        sections = {name: dict(section) for name, section in CASES[case].items()}
        sections["launch"] = {"backend": "none" if workers == 1 else "torchrun", "num_workers": workers}
        sections["shard"] = {"strategy": strategy} | (STRATEGIES[strategy][1] if workers > 1 else {})
        sections["train"] = {"global_batch_size": 5, "optim": "adamw_8bit"} | sections.get("train", {})
        sections["adapter"] = {"lora_dropout": 0.0} | sections.get("adapter", {})
        return small_config(self.folder / case.replace(" ", "-") / strategy, self.base(case), **sections)

    def _alone(self, case: str) -> tuple[RunConfig, dict[str, Any]]:
        config = self.config(case, "none", 1)
        return config, train_here(config)

    def _sharded(self, workers: int) -> dict[tuple[str, str], tuple[RunConfig, dict[str, Any]]]:
        configs = {
            (strategy, case): self.config(case, strategy, workers)
            for strategy, case in WANTED
            if STRATEGIES[strategy][0] == workers
        }
        outcomes = train_in_group(list(configs.values()), workers)
        return {key: (config, outcome) for (key, config), outcome in zip(configs.items(), outcomes, strict=True)}


def make_tied_model(folder: Path) -> Path:
    make_tiny_model(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


def stock_logits(base: Path, adapter: Path) -> torch.Tensor:
    """What stock transformers and PEFT make of the folder; in training mode, where bitsandbytes computes in fp32."""
    model = PeftModel.from_pretrained(nf4_base(base), adapter).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 60)[None]).logits


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("whole"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "case"), WANTED)
def test_what_comes_out_is_what_one_worker_brings_about(runs: Runs, strategy: str, case: str) -> None:
    config, outcome = runs.sharded(STRATEGIES[strategy][0])[strategy, case]
    reference, expected = runs.alone(case)
    assert outcome["state"] == expected["state"] == "finished"
    assert outcome["step"] == expected["step"]
    for metric in ("loss", "grad_norm", *(["eval_loss"] if "data" in CASES[case] else [])):
        assert worst_difference(series(config.run_dir, metric), series(reference.run_dir, metric)) < 1e-4, metric
    for key in ("samples", "best_step", "stopped_early"):
        assert outcome["summary"][key] == expected["summary"][key], key

    ours, theirs = (load_file(c.run_dir / "adapter/adapter_model.safetensors") for c in (config, reference))
    assert ours.keys() == theirs.keys()
    logits, reference_logits = (stock_logits(runs.base(case), c.run_dir / "adapter") for c in (config, reference))
    assert (logits - reference_logits).norm() < 1e-3 * reference_logits.norm()


@pytest.mark.slow
def test_the_cases_are_what_they_say(runs: Runs) -> None:
    """Embedding and head did train, the best step was not the last, training did stop early, samples were answered."""
    full, head = (
        load_file(runs.alone(case)[0].run_dir / "adapter/adapter_model.safetensors") for case in ("full", "head")
    )
    assert any("embed_tokens.weight" in name for name in full)
    assert any("lm_head.weight" in name for name in head)
    best = runs.alone("all")[1]["summary"]
    assert 0 < best["best_step"] < 6
    assert len(best["samples"]) == 3
    assert runs.alone("early")[1]["summary"]["stopped_early"]
    assert runs.alone("early")[1]["step"] < 6
