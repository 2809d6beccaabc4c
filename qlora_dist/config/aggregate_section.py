"""The section `aggregate` of the configuration: training in islands."""

from typing import Annotated, Literal

from pydantic import Field

from qlora_dist.config.section import Fraction, NonNegativeInt, PositiveInt, Section


class AggregateConfig(Section):
    """Islands: groups of workers that train apart and whose adapters are put together every few steps."""

    islands: PositiveInt = Field(
        1, description="How many islands train; 1 is none. Without `coordinator` this command starts them all here."
    )
    coordinator: str | None = Field(
        None,
        description="Be an island of the coordinator at HOST:PORT (QLORA_DIST_TOKEN holds its token), or of the one "
        "whose run folder this is.",
    )
    island: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="This island's name; for `coordinator`."
    )
    sync_every: PositiveInt = Field(50, description="Optimizer steps of an island between two exchanges.")
    method: Literal["mean", "diloco", "svd"] = Field(
        "diloco",
        description="`mean` of the changes; `diloco`: Nesterov momentum on it; `svd`: the exact mean of the products.",
    )
    outer_learning_rate: Annotated[float, Field(gt=0)] = Field(0.7, description="diloco.")
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5, description="diloco. What a round adds goes on for 1 / (1 - this) rounds: 0.9 is for runs of many."
    )
    freeze: Literal["none", "A"] = Field("none", description="`A`: train and exchange the B matrices only.")
    robust: Literal["none", "median", "trimmed"] = Field(
        "none", description="Element by element, in place of the mean; bears islands that send anything."
    )
    trim: Annotated[float, Field(ge=0, lt=0.5)] = Field(0.25, description="trimmed: the share left out at each end.")
    exchange_bits: Literal[4, 8, 16, 32] = Field(
        32, description="Of an exchanged element. Below 32, what rounding left out goes into the next message."
    )
    overlap: bool = Field(False, description="An exchange goes on behind the steps of the next round.")
    quorum: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="The share of the awaited islands whose contributions close a round."
    )
    round_deadline_s: Annotated[float, Field(gt=0)] = Field(
        600.0, description="Seconds after its first lease a round closes with what there is."
    )
    late_rounds: NonNegativeInt = Field(
        1, description="A contribution that is later by more rounds is refused, and its packs are trained by others."
    )
    late_discount: Fraction = Field(0.5, description="A late contribution's change is multiplied by it for each round.")
    most_leases: PositiveInt = Field(5, description="A pack is dropped after so many leases that came to nothing.")
    max_norm_ratio: Annotated[float, Field(gt=1)] = Field(
        10.0, description="A contribution is refused whose norm is more than so many times the usual one."
    )
    clip_norm: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Each contribution's norm is brought down to it; 0 turns it off."
    )
    noise: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Gaussian noise on the mean, in units of clip_norm x the largest share of an island."
    )

    @property
    def here(self) -> bool:
        """Whether this command starts the coordinator and all islands."""
        return self.islands > 1 and self.coordinator is None
