"""What is reported of rounds: figures for the event, the metrics, and the summary at the end."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_dist.aggregate.changes import change_of, norm_of
from qlora_dist.aggregate.measures import Divergence, Traffic
from qlora_dist.aggregate.round_files import Version
from qlora_dist.coordinate.log import Event, EventLog, finite
from qlora_dist.coordinate.ranges import count
from qlora_dist.coordinate.replay import Run
from qlora_dist.coordinate.rounds import Contribution, Rounds
from qlora_dist.coordinate.rundir import ADAPTER, EVENTS_FILE
from qlora_dist.track.metrics import MetricsLog, read_metrics

# Adapters train in fp32, and data-parallel workers sum these gradients.
GRADIENT_DTYPE = torch.float32
# What islands tell (`train.island.Told`): of a lease, and of all that their session has moved.
TOLD = ("steps", "bytes_sent", "bytes_received")
MOST_FIGURE = 1e18
# A loss may be NaN: null in the log.
LOSSES = ("loss", "first_loss", "last_loss")
SESSION = ("session_bytes_sent", "session_bytes_received", "session_steps")
MEANS = ("exchange_seconds", "exposed_seconds", "seconds_per_step")


class RoundReport:
    """The figures of a run of islands.

    Args:
        islands: in how many DDP's bytes are counted.
        host: {"host", "pid"} of this process.
    """

    def __init__(self, metrics: MetricsLog, run_dir: Path, islands: int, host: dict[str, Any]):
        self.metrics, self.run_dir, self.islands, self.host = metrics, run_dir, islands, host
        self.parameters = 0
        self.committed_time = time.time()

    def begin(self, begun: Event, rounds: Rounds) -> None:
        """What the run is; a round whose record a kill has cost gets it."""
        self.parameters = begun["parameters"]
        self.committed_time = begun["time"] if rounds.last is None else rounds.last["time"]
        written = {record["step"] for record in read_metrics(self.run_dir) if "round" in record}
        if rounds.last is not None and rounds.round not in written:
            self.committed(rounds)

    def facts(
        self, number: int, counted: Sequence[Contribution], apart: Divergence | None, refused: Mapping[int, str],
        before: Version, after: Version, step_s: float,
    ) -> dict[str, Any]:  # fmt: skip
        """{"metrics": scalars of the round, "islands": figures of each participant}."""
        islands: dict[str, dict[str, Any]] = {}
        for one in counted:
            told = one.facts["told"]
            traffic = self._traffic(told["bytes_sent"], told["bytes_received"], told["steps"])
            islands[one.island] = {**told, "tokens": one.tokens, **traffic}
        told_of = [one.facts["told"] for one in counted]
        with_loss = [one for one in counted if one.facts["told"]["loss"] is not None]
        tokens_with_loss = sum(one.tokens for one in with_loss)
        metrics: dict[str, Any] = {
            "round": number,
            "participants": len({one.island for one in counted}),
            "tokens": sum(one.tokens for one in counted),
            "packs": sum(count(one.pieces) for one in counted),
            "late": sum(one.round < number for one in counted),
            "refused": len(refused),
            "loss": sum(one.facts["told"]["loss"] * one.tokens for one in with_loss) / tokens_with_loss
            if with_loss
            else None,
            "train_loss_before": _mean([told["last_loss"] for told in told_of]),
            "first_loss": _mean([told["first_loss"] for told in told_of]),
            "update_norm": norm_of(change_of(after.exact, before.exact)),
            "outer_step_seconds": step_s,
            "seconds": time.time() - self.committed_time,
            **self._all_traffic([(t["bytes_sent"], t["bytes_received"], t["steps"]) for t in told_of]),
            **{name: _mean([told[name] for told in told_of]) for name in MEANS},
        }
        if apart is not None:
            metrics |= {"divergence": apart.distance, "cosine": apart.cosine}
        evaluated = [told["eval_loss_before"] for told in told_of if told.get("eval_loss_before") is not None]
        if evaluated:
            metrics["eval_loss_before"] = evaluated[0]
        return {"metrics": finite(metrics), "islands": islands}

    def committed(self, rounds: Rounds) -> None:
        """Write the last committed round's record, and what its first steps tell of the round before."""
        last = rounds.last
        assert last is not None
        metrics = dict(last["facts"]["metrics"])
        first_loss = metrics.pop("first_loss")
        if rounds.round > 1:
            self.metrics.write(rounds.round - 1, train_loss_after=first_loss)
        packs = {"packs_trained": count(rounds.trained), "packs_dropped": count(rounds.dropped)}
        self.metrics.write(rounds.round, **metrics, **packs)
        self.committed_time = last["time"]

    def summary(self, run: Run, run_dir: Path) -> dict[str, Any]:
        """What the run came to. An island that died has told of its traffic up to its last contribution."""
        told: dict[tuple[str, str], tuple[int, int, int]] = {}
        counted = 0
        losses = {}
        for event in EventLog(run_dir / EVENTS_FILE).read_new():
            if event["kind"] in ("contributed", "island_told"):
                facts = event if event["kind"] == "island_told" else event["facts"]
                all_told = facts["told"]
                key = (event["island"], facts["session"] if event["kind"] == "island_told" else facts["speaker"])
                now = tuple(all_told[f"session_{name}"] for name in ("bytes_sent", "bytes_received", "steps"))
                told[key] = now  # type: ignore[assignment]
            elif event["kind"] == "round_committed":
                counted += sum(entry["tokens"] for entry in event["counted"])
            elif event["kind"] == "evaluated":
                losses[event["version"]] = event["eval_loss"]
        rounds = run.rounds
        steps = sum(one[2] for one in told.values())
        return {
            "adapter": str(run_dir / ADAPTER),
            "samples": [],
            "best_eval_loss": min(losses.values(), default=None),
            "best_step": min(losses, key=lambda version: losses[version], default=0),
            "skipped_steps": 0,
            "stopped_early": False,
            "complete": rounds.finished((run.begun or {"packs": 0})["packs"]),
            "rounds": rounds.round,
            "tokens": counted,
            "packs_trained": count(rounds.trained),
            "packs_dropped": count(rounds.dropped),
            "dropped": [list(part) for part in rounds.dropped],
            "parameters": self.parameters,
            "steps": steps,
            **self._all_traffic(list(told.values())),
            "ddp_gradient_dtype": str(GRADIENT_DTYPE).removeprefix("torch."),
        }

    def _traffic(self, sent: int, received: int, steps: int) -> dict[str, Any]:
        workers = max(2, self.islands)
        return Traffic(sent, received, self.parameters, GRADIENT_DTYPE, workers, steps).report()

    def _all_traffic(self, each: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
        sent, received, steps = (sum(one[place] for one in each) for place in range(3))
        told = self._traffic(sent, received, steps)
        return {name: value for name, value in told.items() if not isinstance(value, str)}


def check_told(told: Any) -> None:
    """Raise a ValueError where the figures of a contribution are not those that a round's record needs."""
    check_session_told(told)
    _check_numbers(told, (*TOLD, *MEANS))
    _check_numbers(told, LOSSES, must_be_finite=False)
    if told.get("eval_loss_before") is not None:
        _check_numbers(told, ("eval_loss_before",), must_be_finite=False)


def check_session_told(told: Any) -> None:
    """Raise a ValueError where what an island tells of its session is not what the summary needs."""
    _check_numbers(told, SESSION)


def _check_numbers(told: Any, names: Sequence[str], must_be_finite: bool = True) -> None:
    if not isinstance(told, dict):
        raise ValueError("it tells no figures")
    for name in names:
        if isinstance(told.get(name), bool) or not isinstance(told.get(name), int | float):
            raise ValueError(f"its figure {name} is no number")
        no_loss = not must_be_finite and isinstance(told[name], float) and not math.isfinite(told[name])
        if not no_loss and not abs(told[name]) <= MOST_FIGURE:
            raise ValueError(f"its figure {name} is beyond all measure")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
