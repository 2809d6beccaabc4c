"""Spreading the training state over workers."""

from qlora_dist.config.catalogue.entry import Mendable

SHARDING: dict[str, Mendable] = {
    "deepspeed-unreadable": Mendable(
        "shard.deepspeed_config: {path} cannot be read as DeepSpeed's JSON ({reason})",
        "mend the file, or remove the setting",
    ),
    "deepspeed-contradicts": Mendable(
        "shard.deepspeed_config: {key} is {value} there and {ours} here",
        "remove {key} from the JSON file, or set in our own config what it stands for",
    ),
    "deepspeed-key": Mendable(
        "shard.deepspeed_config: {key} is nothing that the JSON file may set",
        "remove it from the file, as optimizer, schedule and precision are set in our own config",
    ),
    "zero2-shards-offloaded": Mendable(
        "shard.offload names shards, but zero2 keeps the base whole on every worker",
        "set shard.strategy to zero3 or fsdp, or remove shards from shard.offload",
    ),
    "shard-setting-ignored": Mendable(
        "shard.{field} is set, and shard.strategy={strategy} has no use for it",
        "remove it, or set shard.strategy to {readers}",
    ),
    "hybrid-uneven": Mendable(
        "shard.strategy=hybrid: {workers} workers cannot form groups of {size}",
        "set shard.hybrid_shard_size to the number of workers of one node, and start as many on each node",
    ),
    "shards-of-nothing": Mendable(
        "shard.offload names shards, but under shard.strategy={strategy} every worker holds the whole base",
        "set shard.strategy to fsdp, hybrid or zero3, or remove shards from shard.offload",
    ),
    "shards-of-a-replica": Mendable(
        "shard.offload names shards, but shard.frozen=replicate keeps the whole base on every worker",
        "set shard.frozen to shard, or remove shards from shard.offload",
    ),
}
