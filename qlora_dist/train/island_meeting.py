"""What happens before an island trains: it meets the coordinator, whose settings decide what trains."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from qlora_dist.aggregate.changes import frozen_names
from qlora_dist.config.aggregate_section import AggregateConfig
from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.client import HttpClient, Unreachable
from qlora_dist.coordinate.decisions import Decisions
from qlora_dist.coordinate.outer_address import outer_address, refuse_finished
from qlora_dist.coordinate.stop import LOCK_TIMEOUT_S
from qlora_dist.train.context import Worker
from qlora_dist.train.island import Island
from qlora_dist.train.island_waiting import Agree, all_wait, aside

# A coordinator that was killed is back by then.
PATIENCE_S = 300.0
# After which a person who waits is told what for.
TELL_S = 10.0


@dataclass(frozen=True)
class Met:
    """What an island knows when it has met the coordinator; fields of `IslandLoop`."""

    island: Island | None
    aggregate: AggregateConfig
    fixed: dict[str, Tensor]


def meet_islands(
    config: RunConfig, worker: Worker, identity: dict[str, Any], adapter: Mapping[str, nn.Parameter], agree: Agree,
    notice: Callable[[str], None],
) -> Met:  # fmt: skip
    """Introduce this island to the coordinator, and freeze the factor that its settings freeze. All ranks call it.

    A run that is asked to stop meanwhile goes on with its own settings, to its loop, which ends it.

    Args:
        adapter: the adapter's parameters by PEFT's names.
        agree: gives every rank rank 0's value.
        notice: tells a person that nobody answers yet, and which settings do not count.

    Raises:
        UserError: the coordinator's address or token is not known, nobody answers there, or the other islands train
            something else.
    """
    met: list[Island] = []
    coordinator = config.aggregate.coordinator or ""
    log = Decisions(worker.run_dir, LOCK_TIMEOUT_S)
    patience_s, began, told = max(PATIENCE_S, config.aggregate.round_deadline_s), time.monotonic(), False

    def hello() -> dict[str, Any]:
        url, token = outer_address(coordinator, worker.run_dir)
        client = HttpClient(url, token, patience_s=patience_s, before_again=partial(refuse_finished, coordinator))
        met.append(Island(client, config.aggregate.island or "", identity["model.name"], worker.device))
        try:
            settings: dict[str, Any] = met[0].hello(identity)["settings"]
        except Unreachable as error:
            raise UserError("island-unreachable", reason=str(error)) from error
        return settings

    def given_up() -> bool:
        nonlocal told
        if not told and time.monotonic() > began + TELL_S:
            told = True
            where = config.aggregate.coordinator
            notice(f"the coordinator of islands at {where} has not answered yet; this island goes on trying")
        log.catch_up()
        # There is no island to go on with before its address is known.
        return bool(met) and log.run.stop is not None

    settings = all_wait(aside(hello) if worker.rank == 0 else None, agree, given_up)
    aggregate = config.aggregate if settings is None else AggregateConfig.model_validate(settings)
    if worker.rank == 0:
        default = AggregateConfig()
        for name in sorted(AggregateConfig.model_fields.keys() - {"coordinator", "island"}):
            own, theirs = getattr(config.aggregate, name), getattr(aggregate, name)
            if own not in (theirs, getattr(default, name)):
                notice(f"aggregate.{name} is {theirs}, as the coordinator has it, not {own}")
    return Met(met[0] if met else None, aggregate, freeze_factor(adapter, aggregate.freeze))


def freeze_factor(adapter: Mapping[str, nn.Parameter], freeze: str) -> dict[str, Tensor]:
    """Freeze one LoRA factor where `aggregate.freeze` says so; copies of what is frozen, on the CPU."""
    frozen = sorted(frozen_names(adapter, "A")) if freeze == "A" else []
    for name in frozen:
        adapter[name].requires_grad_(False)
    return {name: adapter[name].detach().to("cpu", copy=True) for name in frozen}
