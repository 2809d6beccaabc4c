"""What each fused layer keeps from its forward: chosen before the first step, from the memory that is really there.

The leanest plan is rehearsed once at the run's largest micro-batch, with its backward, and the link to the host is
measured. What is free is spent on what saves the most time, copies to the host that hide behind the forward before
recomputation, and the chosen plan is rehearsed in its turn. Rehearsals leave no trace.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.host_memory import host_memory
from qlora_dist.coordinate.state import MOST_LEANER
from qlora_dist.model.block import Block, Plan
from qlora_dist.model.fused import limit_logits
from qlora_dist.model.host_store import PACKED, link_bytes_per_second, settle_all
from qlora_dist.plan.activations import (
    HOST_KINDS,
    KINDS,
    Choice,
    Gain,
    Kind,
    describe,
    forward_seconds,
    gains,
)
from qlora_dist.plan.offload import LAYERS_UNDER_WAY, Link, Placed, describe_worth, on_device, place, spread
from qlora_dist.shard.activations import offload_activations
from qlora_dist.train.rehearsal import (
    Rehearsal,
    Seen,
    bytes_of_state_to_come,
    least,
    median_seconds,
    memory_limit,
    timed_forwards,
)

# What is left to the allocator's rounding and to what the rehearsal did not see, such as a library's workspaces.
MARGIN_SHARE, MARGIN_BYTES = 0.03, 2**28
# And for a second plan of a single worker, whose rehearsal has been seen, and which can go on if memory runs out. With
# copies the allocator's memory is in more pieces, and in others from step to step: such a plan leaves the whole margin.
CLOSE_SHARE, CLOSE_BYTES = 0.015, 2**26
# Of the memory there is, the most that logits may take at a time, as a divisor.
LOGITS_SHARE = 40
# What the room of a plan that took too much shrinks by, as a share of it and of the memory there is; attempts in all.
SHRINK, SHRINK_OF_LIMIT, ATTEMPTS = 0.15, 0.01, 5
# By how much a run that takes its memory on the way may be slower for that.
AS_FAST = 0.03
# Of the host's free memory, what its workers pin where `train.host_memory_budget_gib` does not say.
HOST_SHARE = 0.5


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
    on_gpu = rehearsal.device.type == "cuda"
    if config.activations != "auto":
        choice = Choice({"attention", "gate_up"}) if config.activations == "keep" else Choice()
        if config.activations == "offload" and on_gpu:
            # About as many bytes as a copy to the host takes while the forward of a layer runs.
            choice = Choice({"input_on_host", "attention", "attention_on_host"})
            if config.train.gradient_checkpointing:
                choice = Choice({"input_on_host"})
        return _use(blocks, [choice] * len(blocks))
    if not on_gpu:
        return _use(blocks, choices_on_cpu(blocks, leaner))
    line = _set_on_gpu(config, model, blocks, rehearsal, leaner)
    rehearsal.over()
    return line


def choices_on_cpu(blocks: Sequence[Block], leaner: int) -> list[Choice]:
    """Everything is kept, but for a quarter of the layers a time that memory ran out, the earliest first.

    There is no telling on a CPU how much of the host's memory is ours.
    """
    first = -(-len(blocks) * min(leaner, MOST_LEANER) // MOST_LEANER)
    return [Choice()] * first + [Choice({"attention", "gate_up"})] * (len(blocks) - first)


def _set_on_gpu(config: RunConfig, model: nn.Module, blocks: Sequence[Block], rehearsal: Rehearsal, leaner: int) -> str:
    """The plan of `auto`: what the leanest plan's rehearsal leaves, filled, rehearsed, and told in one line."""
    device, limit = rehearsal.device, memory_limit(rehearsal.device)
    limit_logits(model, limit // LOGITS_SHARE)
    allowed = limit * (1 - MARGIN_SHARE) - MARGIN_BYTES - bytes_of_state_to_come(rehearsal.strategy)
    host_bytes = least(bytes_of_host(config, rehearsal.local_workers), device)
    fused_alone = len(blocks) == model_layers(model)
    leanest = _rehearse_leanest(model, blocks, rehearsal, limit, allowed, host_bytes, leaner, fused_alone)
    idle = [block for block in blocks if not block.trains]
    blocks = [block for block in blocks if block.trains]
    if leanest.hosted and not fused_alone:
        return _use(blocks, leanest.of(blocks)) + ", and what others save"
    _use(idle, [Choice()] * len(idle))
    if leaner >= MOST_LEANER or not blocks:
        return _use(blocks, leanest.of(blocks))
    tokens, length = rehearsal.largest.rows * rehearsal.largest.length, rehearsal.largest.length
    costs = [gains(b.shape, tokens, length, rehearsal.element_size, b.compute == "fp8") for b in blocks]
    inputs = [_input_bytes(block, rehearsal) for block in blocks]
    # The room is that beyond the leanest plan that has all inputs on the device.
    moved = sum(size for size, one in zip(inputs, leanest.of(blocks), strict=True) if one)
    smallest = -max(0, moved - LAYERS_UNDER_WAY * max(inputs))
    room = least(allowed - (leanest.peak - smallest), device)
    floor = 0 if room > 0 else smallest
    if room > floor:
        room = floor + (room - floor) * (1 - leaner / MOST_LEANER)
    sharded = any(block.sharded for block in blocks)
    kinds: list[Kind] = [kind for kind in KINDS if kind != "weights" or not sharded]
    link: Link | None = None
    if host_bytes and not _keeps_all(on_device(costs, room, kinds).choices):
        fp8 = blocks[0].compute == "fp8"
        as_modelled = forward_seconds(blocks[0].shape, tokens, length, rehearsal.element_size, fp8)
        link = Link(least(link_bytes_per_second(device), device), least(leanest.forward_seconds, device), host_bytes)
        # This GPU's rates, and not an H100's, say what a copy competes with.
        costs = [_scaled(cost, link.forward_seconds / as_modelled) for cost in costs]
    found = _rehearsed(Terms(costs, inputs, link, kinds), room, blocks, rehearsal, limit, allowed)
    if found is None:
        return _use(blocks, leanest.of(blocks))
    placed, peak = found
    timed = ""
    if link is not None and placed.copied and leanest.fits:
        placed, peak, timed = _faster(placed, peak, on_device(costs, room, kinds), blocks, rehearsal)
        if peak == float("inf"):
            return _use(blocks, leanest.of(blocks))
    line = _use(blocks, placed.choices)
    if idle:
        line += f" ({len(idle)} before the first adapter need nothing)"
    return (
        f"{line}; {describe_worth(placed, link)}{timed}; "
        f"peak {peak / 2**30:.1f} GiB of {limit / 2**30:.1f} in rehearsal"
    )


@dataclass(frozen=True)
class Leanest:
    """The leanest plan that fits, as rehearsed.

    hosted: of the layers, those whose inputs wait in host memory. fits: whether the plan without that fits, too, as far
    as is known. forward_seconds: a layer's.
    """

    peak: float
    fits: bool
    forward_seconds: float
    hosted: frozenset[Block]

    def of(self, blocks: Iterable[Block]) -> list[Choice]:
        """What of each layer is kept."""
        return [Choice({"input_on_host"}) if block in self.hosted else Choice() for block in blocks]


def _rehearse_leanest(
    model: nn.Module, blocks: Sequence[Block], rehearsal: Rehearsal, limit: int, allowed: float, host_bytes: float,
    leaner: int, fused_alone: bool,
) -> Leanest:  # fmt: skip
    """All is recomputed; where that is too much, layers' inputs go to the host and come back while others compute.

    An error among several workers is the end of their group: they start again with the inputs on the host.

    Args:
        fused_alone: every decoder layer is a fused one.

    Raises:
        OutOfRoom: several workers start again.
        torch.OutOfMemoryError: it is too much all the same.
    """
    helps = bool(host_bytes) and fused_alone
    tries = rehearsal.alone or not (leaner and helps)
    if tries:
        _use(blocks, [Choice()] * len(blocks))
        with timed_forwards(blocks) as forwards:
            peak = rehearsal.once_or_too_much(blocks, leaner=helps).peak
        # Among several workers an error would be the end, so that the margin decides.
        fits = least((limit if rehearsal.alone else allowed) - peak, rehearsal.device) >= 0
        if fits or (not host_bytes and peak <= limit):
            return Leanest(peak, fits, median_seconds(forwards), frozenset())
        if not host_bytes:
            raise torch.OutOfMemoryError("train.host_memory_budget_gib is 0, and not even recomputation fits the GPU")
    size = max(_input_bytes(block, rehearsal) for block in blocks)
    hosted = spread(len(blocks), 0, min(len(blocks), int(host_bytes / size)))
    _use(blocks, [Choice(one) for one in hosted])
    if not fused_alone:
        # And so does what the layers that are not fused save.
        offload_activations(model)
    with timed_forwards(blocks) as forwards:
        peak = rehearsal.once().peak
    on_host = frozenset(block for block, one in zip(blocks, hosted, strict=True) if one)
    held = sum(_input_bytes(block, rehearsal) for block in on_host if block.trains)
    fits = least(allowed - peak - max(0, held - LAYERS_UNDER_WAY * size), rehearsal.device) >= 0
    return Leanest(peak, fits and not tries, median_seconds(forwards), on_host)


def _input_bytes(block: Block, rehearsal: Rehearsal) -> int:
    return rehearsal.largest.rows * rehearsal.largest.length * block.shape.hidden * rehearsal.element_size


def model_layers(model: nn.Module) -> int:
    """How many decoder layers it has."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return int(base.config.num_hidden_layers)


@dataclass(frozen=True)
class Terms:
    """What `place` takes beside the room."""

    layers: Sequence[dict[Kind, Gain]]
    inputs: Sequence[int]
    link: Link | None
    kinds: Sequence[Kind]


def _rehearsed(
    terms: Terms, room: float, blocks: Sequence[Block], rehearsal: Rehearsal, limit: int, allowed: float
) -> tuple[Placed, float] | None:
    """The best plan whose rehearsal fits, and its peak; None where none did.

    A single worker gives what its rehearsal leaves to another, larger plan: an error there costs nothing.
    """
    close = allowed + limit * (MARGIN_SHARE - CLOSE_SHARE) + MARGIN_BYTES - CLOSE_BYTES
    fitting: tuple[Placed, float] | None = None
    for _ in range(ATTEMPTS):
        placed = place(terms.layers, terms.inputs, room, terms.link, terms.kinds)
        if fitting is not None and placed.choices == fitting[0].choices:
            return fitting
        _use(blocks, placed.choices)
        peak = rehearsal.once_or_too_much(blocks, leaner=placed.copied > 0).peak
        # What a plan with copies takes differs from step to step, so that half the margin is left at least.
        left = least(((allowed + limit) / 2 if placed.copied else limit) - peak, rehearsal.device)
        if left < 0:
            if fitting is not None:
                return fitting
            room = least(room - SHRINK * abs(room) - SHRINK_OF_LIMIT * limit, rehearsal.device)
            continue
        slack = (allowed if placed.copied else close) - peak
        if not rehearsal.alone or fitting is not None or slack <= 0:
            return placed, peak
        fitting, room = (placed, peak), placed.size + slack
    return fitting


def _faster(
    placed: Placed, peak: float, without: Placed, blocks: Sequence[Block], rehearsal: Rehearsal
) -> tuple[Placed, float, str]:
    """Of the plan and one without the host that which runs faster, its peak, and what was measured.

    The first has run before. The other has not, and takes its memory on the way: where that might be what makes it the
    slower one, it runs once more.
    """

    def timed(plan: Placed) -> Seen:
        _use(blocks, plan.choices)
        seen = rehearsal.once_or_too_much(blocks, warm=True)
        # The slowest rank keeps the others waiting.
        return Seen(seen.peak, -least(-seen.seconds, rehearsal.device))

    ours = timed(placed).seconds
    other = timed(without)
    if ours < other.seconds < (1 + AS_FAST) * ours:
        other = timed(without)
    if other.seconds == float("inf") and ours < float("inf"):
        return placed, peak, ""
    if ours == float("inf"):
        return without, other.peak, "; with the host memory ran out the second time"
    told = f"; {1e3 * ours:.0f} ms in rehearsal, {1e3 * other.seconds:.0f} without the host"
    return (placed, peak, told) if ours < other.seconds else (without, other.peak, told)


def bytes_of_host(config: RunConfig, workers: int) -> float:
    """What a worker's tensors may take on the host, of `workers` that share it."""
    asked = config.train.host_memory_budget_gib
    return PACKED * (HOST_SHARE * host_memory()["free"] / workers if asked is None else asked * 2**30)


def _scaled(costs: dict[Kind, Gain], factor: float) -> dict[Kind, Gain]:
    return {kind: replace(gain, seconds=gain.seconds * factor) for kind, gain in costs.items()}


def _keeps_all(choices: Sequence[Choice]) -> bool:
    return all({"attention", "gate_up"} <= choice for choice in choices)


def _use(blocks: Sequence[Block], choices: Sequence[Choice]) -> str:
    # How much may be under way is this plan's.
    settle_all()
    for block, choice in zip(blocks, choices, strict=True):
        block.set_plan(Plan(**{kind: kind in choice for kind in (*KINDS, *HOST_KINDS)}))
    return describe(choices)
