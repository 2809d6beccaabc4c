"""What of `shard` does not go together, or with the number of workers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qlora_dist.config.errors import UserError

if TYPE_CHECKING:
    from qlora_dist.config.schema import RunConfig

# The strategies that read a setting; all read the others.
READ_BY = {
    "frozen": ("fsdp", "hybrid"),
    "hybrid_shard_size": ("hybrid",),
    "reshard_after_forward": ("fsdp", "hybrid"),
    "prefetch_layers": ("fsdp", "hybrid"),
    "deepspeed_config": ("zero2", "zero3"),
}


def shard_contradictions(config: "RunConfig") -> Iterator[UserError]:
    """What is wrong with values of `shard` that cannot hold together."""
    shard, strategy = config.shard, config.strategy
    for field, strategies in READ_BY.items():
        if getattr(shard, field) != type(shard).model_fields[field].default and strategy not in strategies:
            readers = " or ".join(strategies)
            yield UserError("shard-setting-ignored", field=field, strategy=strategy, readers=readers)
    size = shard.hybrid_shard_size
    for workers in {config.launch.min_workers, config.launch.max_workers} if strategy == "hybrid" and size else ():
        if size is not None and workers % size:
            yield UserError("hybrid-uneven", workers=workers, size=size)
    if "shards" in shard.offload:
        if strategy in ("none", "ddp"):
            yield UserError("shards-of-nothing", strategy=strategy)
        if shard.frozen == "replicate":
            yield UserError("shards-of-a-replica")
