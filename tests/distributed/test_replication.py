"""`shard.frozen: auto`: a base that takes a small part of every GPU's free memory stays whole on each worker.

There is no GPU here: what is free on one is a number that the tests give to each rank.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_dist.config.schema import RunConfig
from qlora_dist.model.adapter import attach_adapter
from qlora_dist.model.base import load_base
from qlora_dist.optim.optimizers import build_optimizer
from qlora_dist.shard import replication
from qlora_dist.shard.frozen import _parts
from qlora_dist.shard.loading import NodePlacement, make_placement
from qlora_dist.shard.replication import base_bytes
from qlora_dist.shard.strategy import make_strategy
from tests.distributed.gloo import in_group
from tests.single import small_config
from tests.tiny import make_tiny_model

CPU = torch.device("cpu")


def config_of(folder: Path, base: Path, **sections: dict[str, Any]) -> RunConfig:
    sections = {"shard": {"strategy": "fsdp"}, "launch": {"backend": "torchrun", "num_workers": 2}} | sections
    return small_config(folder, base, **sections)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"double_quant": False},
        {"quantization": "none", "compute_dtype": "bf16"},
        {"cache_quantized": "nf4"},
        {"name": "synthetic:llama-tiny"},
    ],
    ids=str,
)
def test_an_empty_model_tells_what_its_base_will_take(tiny_model: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    if "cache_quantized" in model:
        model = {"cache_quantized": tmp_path / "nf4"}
        load_base(config_of(tmp_path, tiny_model, model=model).model, tiny_model, CPU)
    config = config_of(tmp_path, tiny_model, model=model)
    folder = tiny_model
    if "name" in model:
        from qlora_dist.model.resolve import resolve_base

        folder = resolve_base(config.model)
    told: list[int] = []
    on_meta: list[bool] = []

    def ask(empty: Any) -> Any:
        on_meta.append(all(parameter.device.type == "meta" for parameter in empty.parameters()))
        told.append(base_bytes(empty))
        return "shard", None

    loaded = load_base(config.model, folder, CPU, config.adapter, NodePlacement(None, 0, 1, decide=ask))
    there = sum(part.nbytes for parameter in loaded.parameters() for _, part in _parts(parameter))
    assert on_meta == [True]
    # Small weights end in blocks that are not full.
    assert told[0] == pytest.approx(there, rel=0.01)
    assert base_bytes(loaded) == told[0]


def spread(rank: int, config: RunConfig, free: list[int]) -> dict[str, Any]:
    """What is decided where so many bytes are free on each rank's GPU, and the first step's loss and norm."""
    replication.free_bytes = lambda device: free[rank]
    placement = make_placement(config, rank, 2, rank, 2)
    base = load_base(config.model, Path(config.model.name), CPU, config.adapter, placement)
    packed, size = len(placement.loaded), base_bytes(base)
    strategy: Any = make_strategy(config, 2, 2, placement.loaded, placement.frozen)
    model = strategy.apply(
        attach_adapter(base, config.adapter, 0), partial(build_optimizer, config=config.train, notice=print)
    )
    loss = model(input_ids=torch.arange(20)[None]).logits.square().mean() / 2
    strategy.backward(loss, last_micro_batch=True)
    norm = float(strategy.clip(1.0, 1.0))
    return {
        "frozen": (placement.frozen, strategy.frozen), "reshards": strategy.reshard_after_forward, "packed": packed,
        "reason": placement.reason, "numbers": (float(loss.detach()), norm), "bytes": size,
    }  # fmt: skip


def several(rank: int, cases: list[tuple[RunConfig, list[int]]]) -> list[dict[str, Any]]:
    return [spread(rank, *case) for case in cases]


def test_all_ranks_decide_by_the_fullest_gpu_or_the_budget(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    plenty = 100 * 2**30

    def case(free: list[int], train: dict[str, Any] | None = None, **shard: Any) -> tuple[RunConfig, list[int]]:
        shard = {"strategy": "fsdp"} | shard
        return config_of(tmp_path / "run", base, shard=shard, train=train or {}, adapter={"lora_dropout": 0.0}), free

    ((probe,), _) = in_group(2, several, [case([plenty, plenty])])
    size = probe["bytes"]
    cases = [
        case([plenty, 3 * size + 4]),
        case([plenty, 3 * size - 4]),
        case([plenty, plenty], train={"memory_budget_gib": 2.9 * size / 2**30}),
        case([plenty, plenty], offload=["shards"]),
        case([plenty, plenty], reshard_after_forward=True),
        case([plenty, plenty], frozen="shard"),
    ]
    first, second = in_group(2, several, cases)
    chosen = ["replicate", "shard", "shard", "shard", "replicate", "shard"]
    for found in (first, second):
        assert [one["frozen"] for one in found] == [(name, name) for name in chosen]
        assert [one["reshards"] for one in found] == [False, True, True, True, True, True]
        assert [one["packed"] > 0 for one in found] == [name == "shard" for name in chosen]
        for one in found:
            assert one["numbers"] == pytest.approx(found[0]["numbers"], rel=1e-5)
        assert "stays whole on every worker" in found[0]["reason"]
        assert "at most 33% of the" in found[0]["reason"]
        assert "is sharded" in found[1]["reason"]
        # Nothing was left open, so there is nothing to tell.
        assert found[3]["reason"] is found[5]["reason"] is None
    assert [one["reason"] for one in first] == [one["reason"] for one in second]


def after_a_forward(rank: int, base: Path, replicated: bool) -> tuple[bool, bool]:
    """Whether what a forward without a backward left gathered is told, and changed, with what is loaded after it."""
    config = config_of(base.parent / "run", base, adapter={"lora_dropout": 0.0})
    shard = {"frozen": "replicate"} if replicated else {"frozen": "shard", "reshard_after_forward": False}
    config.shard = config.shard.model_copy(update=shard)
    strategy: Any = make_strategy(config, 2, 2)
    loaded = load_base(config.model, base, CPU)
    model = strategy.apply(
        attach_adapter(loaded, config.adapter, 0), partial(build_optimizer, config=config.train, notice=print)
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapter = strategy.full_adapter()
        other = {name: torch.full_like(value, 0.01) for name, value in adapter.items()}
        model(input_ids=ids)
        strategy.load_adapter(other)
        after = model(input_ids=ids).logits
        told = strategy.full_adapter()
    return not torch.allclose(before, after), all(torch.equal(told[name], other[name]) for name in other)


@pytest.mark.parametrize("replicated", [True, False])
def test_an_adapter_that_is_loaded_after_an_evaluation_is_the_one_that_runs(tmp_path: Path, replicated: bool) -> None:
    base = make_tiny_model(tmp_path / "base")
    assert in_group(2, after_a_forward, base, replicated) == [(True, True)] * 2
