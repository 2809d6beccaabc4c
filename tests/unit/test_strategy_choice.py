"""Settings of `shard` that do not go together, and what a strategy's name and the number of workers come to."""

from typing import Any

import pytest

from qlora_dist.config.errors import UserError
from qlora_dist.config.load import from_yaml, to_yaml
from qlora_dist.config.schema import RunConfig
from qlora_dist.shard.strategy import base_shards, make_strategy


def config(workers: Any = 4, **shard: Any) -> RunConfig:
    values = {"model": {"name": "m"}, "data": {"train": "t.jsonl"}, "launch": {"num_workers": workers}, "shard": shard}
    return RunConfig.model_validate(values)


@pytest.mark.parametrize(
    ("shard", "sentence"),
    [
        (
            {"strategy": "ddp", "frozen": "shard"},
            "shard.frozen is set, and shard.strategy=ddp has no use for it; remove",
        ),
        ({"strategy": "zero3", "prefetch_layers": 2}, "shard.prefetch_layers is set, and shard.strategy=zero3 has"),
        ({"reshard_after_forward": False}, "shard.reshard_after_forward is set, and shard.strategy=ddp has no use"),
        ({"strategy": "fsdp", "hybrid_shard_size": 2}, "remove it, or set shard.strategy to hybrid"),
        ({"strategy": "fsdp", "deepspeed_config": "d.json"}, "remove it, or set shard.strategy to zero2 or zero3"),
        ({"strategy": "hybrid", "hybrid_shard_size": 3}, "shard.strategy=hybrid: 4 workers cannot form groups of 3"),
        ({"strategy": "hybrid", "hybrid_shard_size": 8}, "4 workers cannot form groups of 8; set"),
        ({"strategy": "ddp", "offload": ["shards"]}, "under shard.strategy=ddp every worker holds the whole base; set"),
        ({"strategy": "fsdp", "frozen": "replicate", "offload": ["shards"]}, "replicate keeps the whole base on every"),
    ],
)
def test_what_cannot_be_is_one_sentence(shard: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="shard") as caught:
        config(**shard)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("strategy", ["none", "ddp", "fsdp", "hybrid", "zero2", "zero3"])
def test_every_strategy_goes_with_its_own_settings_and_all_that_it_can_offload(strategy: str) -> None:
    offload = ["optimizer", "activations"] + (["shards"] if strategy in ("fsdp", "hybrid", "zero3") else [])
    made = config(1, strategy=strategy, offload=offload)
    assert from_yaml(to_yaml(made)) == made


@pytest.mark.parametrize(
    ("shard", "world_size", "local_world_size", "expected"),
    [
        ({"strategy": "ddp"}, 4, 2, 1),
        ({"strategy": "zero2"}, 4, 2, 1),
        ({"strategy": "fsdp"}, 4, 2, 4),
        ({"strategy": "zero3"}, 4, 2, 4),
        ({"strategy": "fsdp", "frozen": "replicate"}, 4, 2, 1),
        ({"strategy": "hybrid"}, 4, 2, 2),
        ({"strategy": "hybrid", "hybrid_shard_size": 4}, 4, 2, 4),
    ],
)
def test_a_copy_of_the_base_is_spread_over(shard: dict, world_size: int, local_world_size: int, expected: int) -> None:
    assert base_shards(config(**shard), world_size, local_world_size) == expected


def test_nodes_with_unequal_numbers_of_workers_do_not_make_a_hybrid() -> None:
    for function in (base_shards, make_strategy):
        with pytest.raises(UserError, match=r"5 workers cannot form groups of 3; set shard\.hybrid_shard_size to"):
            function(config(5, strategy="hybrid"), 5, 3)
