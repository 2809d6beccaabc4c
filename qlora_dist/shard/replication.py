"""Whether every worker keeps the whole frozen base, where the config leaves that open (`shard.frozen: auto`).

A sharded base travels twice a micro-batch; one that takes a small part of the memory may as well stay.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from qlora_dist.config.schema import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Frozen = Literal["shard", "replicate"]
# Of the memory that is free, what a base may take that is replicated.
SHARE = 1 / 3
GIB = 2**30


def base_bytes(model: "PreTrainedModel") -> int:
    """What the weights of `model` take on one device when they are there; it may be empty still (on `meta`)."""
    from bitsandbytes.nn import Linear4bit

    tied = set(model.all_tied_weights_keys)
    total = 0
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        module_name, _, attribute = name.rpartition(".")
        layer: Any = model.get_submodule(module_name)
        if not isinstance(layer, Linear4bit) or attribute != "weight":
            total += parameter.numel() * parameter.element_size()
            continue
        # bitsandbytes: a scale for every `blocksize` weights, in fp32, or in a byte and quantised 256 at a time.
        weight: Any = layer.weight
        scales = layer.in_features * layer.out_features / weight.blocksize
        total += layer.in_features * layer.out_features // 2
        total += int(scales * (1 + 4 / 256) if weight.compress_statistics else 4 * scales)
    return total


def free_bytes(device: torch.device) -> int | None:
    """What this process can still take of a GPU, blocks that PyTorch keeps for it included; None elsewhere."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def is_open(config: RunConfig, copies_of: int) -> bool:
    """Whether it is to be decided.

    Args:
        copies_of: workers over which one copy of the model is spread.
    """
    shard = config.shard
    return (
        config.strategy in ("fsdp", "hybrid")
        and shard.frozen == "auto"
        and copies_of > 1
        # Whoever sends shards to the host is short of memory.
        and "shards" not in shard.offload
    )


def decide(model: "PreTrainedModel", device: torch.device, budget_gib: float | None) -> tuple[Frozen, str | None]:
    """Replicate or shard the base, and the reason; all ranks call it together and come to the same.

    Args:
        model: the base as it is going to be, empty or filled.
        device: this rank's.
        budget_gib: `train.memory_budget_gib`.
    """
    free = free_bytes(device)
    if free is None:
        return "shard", None
    if budget_gib is not None:
        free = min(free, int(budget_gib * GIB))
    smallest = torch.tensor(free, device=device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    needed, room = base_bytes(model), int(smallest)
    chosen: Frozen = "replicate" if needed <= SHARE * room else "shard"
    done = "stays whole on every worker" if chosen == "replicate" else "is sharded"
    compared = "at most" if chosen == "replicate" else "more than"
    return chosen, (
        f"shard.frozen: auto: the base {done}, as its {needed / GIB:.1f} GiB are {compared} {SHARE:.0%} of the "
        f"{room / GIB:.1f} GiB that the fullest GPU has left"
    )
