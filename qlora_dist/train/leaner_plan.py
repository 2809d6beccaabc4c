"""What a run gives up that meets an out-of-memory error, to go on with less."""

from collections.abc import Sequence
from dataclasses import replace

from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.state import MOST_LEANER
from qlora_dist.model.block import RECOMPUTE_ALL, Block, Plan
from qlora_dist.model.host_store import settle_all
from qlora_dist.plan.activations import HOST_KINDS, KINDS, Choice, describe
from qlora_dist.shard.strategy import Strategy


class OutOfRoom(Exception):
    """A rank among several is out of memory, and the layers keep something that they can give up."""


def can_go_on(config: RunConfig, world_size: int) -> bool:
    """Whether a step that ran out of memory can be tried again in the same process.

    Sharded strategies are left in the middle of gathering and reducing, and other ranks in a collective.
    """
    return world_size == 1 and config.strategy in ("none", "ddp")


def throw_away_gradients(strategy: Strategy) -> None:
    """Finish what a backward began, and leave its step out."""
    strategy.clip(0.0, 1.0)
    strategy.step(True)


def keeping(blocks: Sequence[Block]) -> list[Block]:
    """The layers that keep something to give up: on the device, and where none does, in copies to and from the host."""
    return [block for block in blocks if _on_device(block.plan)] or [b for b in blocks if b.plan.attention_on_host]


def lean_down(blocks: Sequence[Block]) -> str | None:
    """Give up what a quarter of the layers keep, the earliest first; what is left in one line, None where nothing was.

    For a run that met an out-of-memory error all the same.
    """
    found = keeping(blocks)
    settle_all()
    if not found:
        return None
    for block in found[: -(-len(blocks) // MOST_LEANER)]:
        # What is on the host takes little here: it goes last, and a layer's input stays there.
        stays = block.plan.attention_on_host and _on_device(block.plan)
        host = {"attention": stays, "attention_on_host": stays, "input_on_host": block.plan.input_on_host}
        block.set_plan(replace(RECOMPUTE_ALL, **host))
    return describe([_choice(block.plan) for block in blocks])


def _choice(plan: Plan) -> Choice:
    return frozenset(kind for kind in (*KINDS, *HOST_KINDS) if getattr(plan, kind))


def _on_device(plan: Plan) -> bool:
    """Whether it keeps anything on the device beside the layer's input."""
    return plan.gate_up or plan.weights or plan.norms or (plan.attention and not plan.attention_on_host)
