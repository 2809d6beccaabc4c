"""What happens before an island trains: it meets the coordinator, whose settings decide what trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from qlora_dist.aggregate.changes import frozen_names
from qlora_dist.config.aggregate_section import AggregateConfig
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.client import HttpClient
from qlora_dist.coordinate.outer_address import outer_address, refuse_finished
from qlora_dist.train.context import Worker
from qlora_dist.train.island import Island
from qlora_dist.train.island_waiting import Agree, all_wait, aside

# A coordinator that was killed is back by then.
PATIENCE_S = 300.0


@dataclass(frozen=True)
class Met:
    """What an island knows when it has met the coordinator; fields of `IslandLoop`."""

    island: Island | None
    aggregate: AggregateConfig
    fixed: dict[str, Tensor]


def meet_islands(
    config: RunConfig, worker: Worker, identity: dict[str, Any], adapter: Mapping[str, nn.Parameter], agree: Agree
) -> Met:
    """Introduce this island to the coordinator, and freeze the factor that its settings freeze. All ranks call it.

    Args:
        adapter: the adapter's parameters by PEFT's names.
        agree: gives every rank rank 0's value.

    Raises:
        UserError: the coordinator's address or token is not known, or the other islands train something else.
    """
    met: list[Island] = []
    coordinator = config.aggregate.coordinator or ""

    def hello() -> dict[str, Any]:
        url, token = outer_address(coordinator, worker.run_dir)
        patience_s = max(PATIENCE_S, config.aggregate.round_deadline_s)
        client = HttpClient(url, token, patience_s=patience_s, before_again=partial(refuse_finished, coordinator))
        met.append(Island(client, config.aggregate.island or "", identity["model.name"], worker.device))
        settings: dict[str, Any] = met[0].hello(identity)["settings"]
        return settings

    aggregate = AggregateConfig.model_validate(all_wait(aside(hello) if worker.rank == 0 else None, agree))
    return Met(met[0] if met else None, aggregate, freeze_factor(adapter, aggregate.freeze))


def freeze_factor(adapter: Mapping[str, nn.Parameter], freeze: str) -> dict[str, Tensor]:
    """Freeze one LoRA factor where `aggregate.freeze` says so; copies of what is frozen, on the CPU."""
    frozen = sorted(frozen_names(adapter, "A")) if freeze == "A" else []
    for name in frozen:
        adapter[name].requires_grad_(False)
    return {name: adapter[name].detach().to("cpu", copy=True) for name in frozen}
