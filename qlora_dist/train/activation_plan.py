"""What each fused layer keeps from its forward: chosen before the first step, from the memory that is really there.

The leanest plan is rehearsed once at the run's largest micro-batch, with its backward; what it leaves free is spent on
what saves the most time a byte, and the chosen plan is rehearsed in its turn. Rehearsals leave no trace.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.state import MOST_LEANER
from qlora_dist.data.collate import MicroBatch
from qlora_dist.data.table import TokenTable
from qlora_dist.model.block import RECOMPUTE_ALL, Block, Plan
from qlora_dist.model.fused import limit_logits
from qlora_dist.plan.activations import KINDS, Kind, choose, describe, gains
from qlora_dist.shard.activations import offload_activations
from qlora_dist.shard.strategy import Strategy
from qlora_dist.train.step import lays_flat


class OutOfRoom(Exception):
    """A rank among several is out of memory, and the layers keep something that they can give up."""


# What is left to the allocator's rounding and to what the rehearsal did not see, such as a library's workspaces.
MARGIN_SHARE, MARGIN_BYTES = 0.03, 2**28
# Of the memory there is, the most that logits may take at a time, as a divisor.
LOGITS_SHARE = 40
# Of the room that a plan used too much of, what the next one gets.
SHRINK, ATTEMPTS = 0.85, 4


@dataclass(frozen=True)
class Largest:
    """The largest micro-batch of a run: rows, tokens a row, whether rows hold several documents, or one holds all."""

    rows: int
    length: int
    packed: bool = False
    flat: bool = False


def largest_micro_batch(config: RunConfig, table: TokenTable) -> Largest:
    """As many rows as a micro-batch has, each as long as the longest pack."""
    rows, length = config.train.per_device_train_batch_size, int(table.pack_tokens.max())
    return Largest(rows, length, config.data.packing, lays_flat(config))


def rehearsal_batch(size: Largest, pad_token_id: int, device: torch.device) -> MicroBatch:
    """A micro-batch of that size in which every token bears loss, of two documents a row where rows are packed."""
    shape = (1, size.rows * size.length) if size.flat else (size.rows, size.length)
    document = -(-size.length // 2) if size.packed else size.length
    ids_BT = torch.full(shape, pad_token_id, dtype=torch.int64)
    place_T = torch.arange(shape[1])
    predict_N = torch.arange(ids_BT.numel()).view(shape)[:, :-1].reshape(-1)
    starts = [line * shape[1] + start for line in range(shape[0]) for start in range(0, shape[1], document)]
    return MicroBatch(
        packs=(),
        input_ids_BT=ids_BT,
        attention_mask_BT=torch.ones_like(ids_BT),
        position_ids_BT=(place_T % document).expand(shape),
        predict_index_N=predict_N,
        target_N=torch.full_like(predict_N, pad_token_id),
        num_tokens=ids_BT.numel(),
        num_loss_tokens=len(predict_N),
        packed=size.packed,
        flat=size.flat,
        cu_seqlens_D1=torch.tensor([*starts, ids_BT.numel()], dtype=torch.int32) if size.packed else None,
        longest_document=document,
    ).to(device)


@dataclass(frozen=True)
class Rehearsal:
    """A step of the run's largest size, without its update.

    run: forwards and backwards, as many as make a difference to memory. element_size: bytes of an activation.
    alone: whether this is the only worker, whose strategy can go on after an out-of-memory error.
    """

    run: Callable[[], Tensor]
    strategy: Strategy
    device: torch.device
    largest: Largest
    element_size: int
    alone: bool

    def peak(self) -> int:
        """The most bytes allocated while it runs; its gradients are thrown away."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.run()
        throw_away_gradients(self.strategy)
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def peak_or_more(self, blocks: Sequence[Block]) -> float:
        """As `peak`; infinity where a single worker has less.

        Raises:
            OutOfRoom: among several, where the layers keep something that a leaner plan gives up.
            torch.OutOfMemoryError: where they keep nothing.
        """
        try:
            return self.peak()
        except torch.OutOfMemoryError as error:
            failure = str(error)
        # Only here has the error's traceback let go of its tensors. Other ranks stand in a collective by now.
        if not self.alone:
            raise (OutOfRoom if keeping(blocks) else torch.OutOfMemoryError)(failure)
        throw_away_gradients(self.strategy)
        return float("inf")


def can_go_on(config: RunConfig, world_size: int) -> bool:
    """Whether a step that ran out of memory can be tried again in the same process.

    Sharded strategies are left in the middle of gathering and reducing, and other ranks in a collective.
    """
    return world_size == 1 and config.strategy in ("none", "ddp")


def throw_away_gradients(strategy: Strategy) -> None:
    """Finish what a backward began, and leave its step out."""
    strategy.clip(0.0, 1.0)
    strategy.step(True)


def set_activations(
    config: RunConfig, model: nn.Module, blocks: Sequence[Block], rehearsal: Rehearsal, leaner: int = 0
) -> str | None:
    """Set the plan of all fused layers as `train.activations` says, and say it in one line; None where none is fused.

    All ranks call it together, and agree.

    Args:
        leaner: how often the run met an out-of-memory error under a plan of `auto`; each takes a quarter off it.

    Raises:
        OutOfRoom: among several workers the chosen plan does not fit; a leaner one may.
        torch.OutOfMemoryError: not even the leanest plan fits.
    """
    if not blocks:
        return None
    device, none = rehearsal.device, frozenset[Kind]()
    if config.activations != "auto":
        keeps: frozenset[Kind] = frozenset({"attention", "gate_up"}) if config.activations == "keep" else none
        if config.activations == "offload" and device.type == "cuda" and not config.train.gradient_checkpointing:
            # About as many bytes as a copy to the host takes while the forward of a layer runs.
            return _use(blocks, [frozenset({"attention"})] * len(blocks)) + ", in host memory like the layers' inputs"
        return _use(blocks, [keeps] * len(blocks))
    if device.type != "cuda":
        # There is no telling on a CPU how much of the host's memory is ours.
        first = -(-len(blocks) * min(leaner, MOST_LEANER) // MOST_LEANER)
        return _use(blocks, [none] * first + [frozenset({"attention", "gate_up"})] * (len(blocks) - first))
    limit = memory_limit(device)
    limit_logits(model, limit // LOGITS_SHARE)
    _use(blocks, [none] * len(blocks))
    allowed = limit * (1 - MARGIN_SHARE) - MARGIN_BYTES - bytes_of_state_to_come(rehearsal.strategy)
    away, lean = "", rehearsal.peak_or_more(blocks)
    # Among several workers an error would be the end, so that the margin decides.
    if _least((limit if rehearsal.alone else allowed) - lean, device) < 0:
        # Layers' inputs go to the host and come back while others compute.
        offload_activations(model)
        away, lean = ", their inputs in host memory", rehearsal.peak()
    room = _least(allowed - lean, device) * (1 - min(leaner, MOST_LEANER) / MOST_LEANER)
    sharded = any(block.sharded for block in blocks)
    kinds = [kind for kind in KINDS if kind != "weights" or not sharded]
    tokens, length = rehearsal.largest.rows * rehearsal.largest.length, rehearsal.largest.length
    costs = [gains(b.shape, tokens, length, rehearsal.element_size, b.compute == "fp8") for b in blocks]
    for _ in range(ATTEMPTS):
        line = _use(blocks, choose(costs, room, kinds)) + away
        peak = rehearsal.peak_or_more(blocks)
        if _least(limit - peak, device) >= 0:
            return f"{line}; peak {peak / 2**30:.1f} GiB of {limit / 2**30:.1f} in rehearsal"
        room *= SHRINK
    return _use(blocks, [none] * len(blocks)) + away


def keeping(blocks: Sequence[Block]) -> list[Block]:
    """The layers that keep something."""
    return [block for block in blocks if block.plan != RECOMPUTE_ALL]


def lean_down(blocks: Sequence[Block]) -> str | None:
    """Give up what a quarter of the layers keep, the earliest first; what is left in one line, None where nothing was.

    For a run that met an out-of-memory error all the same.
    """
    found = keeping(blocks)
    if not found:
        return None
    for block in found[: -(-len(blocks) // MOST_LEANER)]:
        block.set_plan(RECOMPUTE_ALL)
    return describe([_kinds(block.plan) for block in blocks])


def bytes_of_state_to_come(strategy: Strategy) -> int:
    """What an optimizer that makes its state at the first step will take of the GPU: two fp32 moments a weight."""
    state = strategy.optimizer.state
    trained = (p for group in strategy.optimizer.param_groups for p in group["params"])
    return sum(8 * p.numel() for p in trained if p.is_cuda and not state.get(p))


def memory_limit(device: torch.device) -> int:
    """Bytes that this process may have allocated: what it has and what is free, or its cap where that is less."""
    free, total = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total
    return int(min(torch.cuda.memory_reserved(device) + free, allowed))


def _least(number: float, device: torch.device) -> float:
    """The smallest over all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return number
    box = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(box, dist.ReduceOp.MIN)
    return float(box)


def _use(blocks: Sequence[Block], kept: Sequence[frozenset[Kind]]) -> str:
    for block, kinds in zip(blocks, kept, strict=True):
        block.set_plan(Plan(**{kind: kind in kinds for kind in KINDS}))
    return describe(kept)


def _kinds(plan: Plan) -> frozenset[Kind]:
    return frozenset(kind for kind in KINDS if getattr(plan, kind))
