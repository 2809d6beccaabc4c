"""What settings of islands say against each other, and against the rest."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qlora_dist.config.errors import UserError

if TYPE_CHECKING:
    from qlora_dist.config.schema import RunConfig


def island_contradictions(config: "RunConfig") -> Iterator[UserError]:
    """What is wrong with `aggregate`."""
    aggregate = config.aggregate
    if (aggregate.coordinator is None) != (aggregate.island is None):
        given, missing = ("coordinator", "island") if aggregate.island is None else ("island", "coordinator")
        yield UserError("island-by-halves", given=given, missing=missing)
    if aggregate.method == "svd":
        others = {
            "aggregate.robust": aggregate.robust != "none",
            "aggregate.noise": aggregate.noise > 0,
            "aggregate.freeze": aggregate.freeze != "none",
            "aggregate.overlap": aggregate.overlap,
            "adapter.use_dora": config.adapter.use_dora,
        }
        for setting, used in others.items():
            if used:
                yield UserError("svd-with", setting=setting)
    if aggregate.noise and not aggregate.clip_norm:
        yield UserError("noise-without-clip-norm", noise=aggregate.noise)
    if aggregate.noise and aggregate.robust != "none":
        yield UserError("noise-with-robust", robust=aggregate.robust)
    if aggregate.overlap and aggregate.sync_every == 1:
        yield UserError("overlap-every-step")
    if aggregate.islands > 1 or aggregate.coordinator is not None:
        for field in ("early_stopping_patience", "load_best_model_at_end"):
            if getattr(config.eval, field):
                yield UserError("islands-with-best", field=field)
