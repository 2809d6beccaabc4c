"""The loop of an island: leases of packs in place of the whole order, and an exchange after each.

The first rank talks to the coordinator; all ranks take the same decisions, from what it tells them.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor

from qlora_dist.aggregate.changes import change_of, rebase
from qlora_dist.checkpoint.format import Snapshot
from qlora_dist.config.aggregate_section import AggregateConfig
from qlora_dist.coordinate.ranges import Piece, as_ranges, first
from qlora_dist.data.collate import loss_tokens
from qlora_dist.data.order import GlobalOrder, LeasedOrder
from qlora_dist.data.tokens import TokenTable
from qlora_dist.optim.schedules import build_schedule
from qlora_dist.train.island import Island, Received, Told
from qlora_dist.train.island_waiting import STOP_S, IslandWaiting
from qlora_dist.train.moments import reset_moments


@dataclass
class IslandLoop(IslandWaiting):
    """A loop that trains what the coordinator of islands leases.

    Attributes:
        aggregate: the coordinator's settings, which hold for all islands.
        whole_order: the run's order, of which leases are ranges; its batch is this island's.
        fixed: parameters of the adapter that do not train.
        resumed: the checkpoint that this attempt went on from, on rank 0.
    """

    aggregate: AggregateConfig = field(default_factory=AggregateConfig)
    whole_order: GlobalOrder = field(default_factory=lambda: GlobalOrder(1, 1))
    fixed: dict[str, Tensor] = field(default_factory=dict)
    resumed: Snapshot | None = None
    # The adapter that the next change starts from: what was received last.
    shared: dict[str, Tensor] = field(default_factory=dict)
    version: int = 0
    islands: int = 1
    # Of the whole run, all islands together.
    packs: int = 1
    lease_end: int = 0
    # Loss-bearing tokens and loss of each step since the last contribution.
    losses: list[tuple[int, float]] = field(default_factory=list)
    exchanging: bool = False
    sending: int | None = None
    sent_adapter: dict[str, Tensor] = field(default_factory=dict)
    arrived: bool = False
    exposed_s: float = 0.0
    exchange_s: float = 0.0
    # Seconds of evaluations, which are no exchange's.
    evaluation_s: float = 0.0
    step_seconds: float = 0.0
    contributed_step: int = 0
    evaluate_next: bool = False
    evaluated_version: int = -1
    all_is_trained: bool = False
    rate_at: Callable[[float], float] = lambda steps: 0.0

    def train(self) -> None:
        """Lease, train, exchange, until nothing is left to train or the island is asked to stop."""
        self.model.train()
        self.saved_step = self.first_step = self.progress.step
        reason, entered = "asked to stop", self.enter()
        lease: dict[str, Any] = {"evaluates": False}
        while entered:
            lease = self.next_lease()
            if lease["lease"] is None:
                if lease["done"]:
                    reason, self.all_is_trained = "everything is trained", True
                break
            if lease["evaluates"] and self.version == 0 and not self.progress.step and self.config.eval.eval_on_start:
                self.evaluate_version()
            trained, tokens = self.train_lease(lease)
            if self.asked_to_stop:
                # Whoever has asked may not wait until the coordinator answers.
                self.save()
            if self.exchanging:
                self.take_result(wait_for_it=not self.asked_to_stop)
            self.contribute(lease, trained, tokens)
            if self.asked_to_stop:
                break
            if not self.aggregate.overlap:
                self.take_result()
                if self.asked_to_stop:
                    break
                self.keep()
        self.end(lease, reason)

    def enter(self) -> bool:
        """Join, and go on from the current adapter; moments stay where the checkpoint is of about this version.

        Returns:
            False where the island is asked to stop first.
        """
        island, adapter = self.island, self.full_adapter()

        def join(island: Island) -> dict[str, Any]:
            config, packs = self.adapter_config_json, self.whole_order.num_packs
            island.begin(adapter, self.identity, packs, config, self.config.model.compute)
            bits = self.aggregate.exchange_bits
            told = island.join(bits, adapter, workers=self.world_size, device=self.device.type)
            return told | {"same": island.version == 0}

        told = self.ask(join)
        if told is None:
            return False
        if told["same"]:
            self.version, self.shared = 0, adapter
        self.islands, self.packs, self.total_steps = told["islands"], told["packs"], told["total_steps"]
        self.contributed_step = self.progress.step
        # transformers rounds no step, so that a share of one is as good.
        self.rate_at = cast(Callable[[float], float], build_schedule(self.config.train, self.total_steps))
        kept = self.resumed.state.get("island") if self.resumed is not None else None
        self.load_newest(None if kept is None else kept["version"])
        if self.asked_to_stop:
            return False
        good, same = False, False
        if kept is not None:
            # A checkpoint is made every so many rounds.
            every = max(1, math.ceil(self.config.checkpoint.save_steps / self.aggregate.sync_every))
            good, same = self.version - kept["version"] <= every, self.version == kept["version"]
        if island is not None and same and self.resumed is not None:
            island.encoder.load_state_dict(self.resumed.extra)
        self.resumed = None
        if self.progress.step and not self.agree(good):
            self.notice("the moments of the checkpoint are too old for the islands' adapter and start from zero")
            reset_moments(self.strategy, None)
        return True

    def load_newest(self, moments_of: int | None = None, after_stop_s: float = 0.0) -> None:
        """Go on from the coordinator's current adapter, whatever this island has; see `Island.fetch`."""
        received = self.ask(lambda island: island.fetch(moments_of), after_stop_s)
        if received is not None:
            self.load(received)

    def load(self, received: Received) -> None:
        """Go on from `received`. All ranks call it together."""
        if self.island is not None:
            self.island.take(received)
        self.version, self.shared = received.version, received.shared
        self.fixed = {name: received.shared[name] for name in self.fixed}
        self.strategy.load_adapter(dict(received.shared))
        if received.reset and self.progress.step:
            reset_moments(self.strategy, received.reset)

    # Leases

    def next_lease(self) -> dict[str, Any]:
        """The next lease, waited for; {"lease": None} where none will come."""
        packs = self.aggregate.sync_every * self.whole_order.global_batch_size
        with self.exposed():
            lease = self._ask_for_lease(packs)
            if lease["lease"] is not None and not self.exchanging and lease["version"] != self.version:
                self.load_newest()
            if self.asked_to_stop:
                # What was leased goes back when the island leaves.
                lease["lease"] = None
        return lease

    def _ask_for_lease(self, packs: int) -> dict[str, Any]:
        while True:
            lease = self.ask(lambda island: island.lease(packs, self.sending))
            if lease is None:
                return {"lease": None, "done": False, "evaluates": False}
            if self.exchanging and (lease["lease"] is None or self.agree(self.has_arrived())):
                # Without it there may be nothing to lease.
                self.take_result(wait_for_it=lease["done"])
            if lease["lease"] is not None or lease["done"] or lease["stop"] or self.asked_to_stop:
                return lease

    @contextlib.contextmanager
    def exposed(self) -> Iterator[None]:
        """Time inside is what training waits for an exchange, but for evaluations; it may be nested."""
        began, exposed_s, evaluation_s = time.monotonic(), self.exposed_s, self.evaluation_s
        yield
        self.exposed_s = exposed_s + time.monotonic() - began - (self.evaluation_s - evaluation_s)

    def train_lease(self, lease: dict[str, Any]) -> tuple[list[list[int]], int]:
        """Train a lease, or a part of it where the island is asked to stop.

        Returns:
            The ranges that were trained, and their loss-bearing tokens.
        """
        order = LeasedOrder.of(self.whole_order, lease["ranges"], self.islands)
        self.order, self.progress.position = order, order.start
        self.ahead.clear()
        start = self.progress.step
        self.lease_end = start + order.num_steps
        self.set_schedule(lease, start, order)
        self.interval_start = self.arrivals.now()
        tokens = 0
        while self.progress.step < self.lease_end and not (self.asked_to_stop and self.progress.step > start):
            packs, _ = order.batch_at(self.progress.position)
            self.take_step()
            tokens += loss_tokens(self.train_table, packs)
            if self.arrived and self.exchanging:
                self.take_result()
            if self.writer is not None:
                self.writer.poll()
            if self.asked_to_hold and not self.asked_to_stop:
                self.save_and_hold()
        self.log()
        pieces = first([Piece(*part) for part in lease["ranges"]], (self.progress.step - start) * self.batch_size)
        return [list(part) for part in as_ranges(pieces)], tokens

    @property
    def batch_size(self) -> int:
        """Packs a step of this island."""
        return self.whole_order.global_batch_size

    def set_schedule(self, lease: dict[str, Any], start: int, order: LeasedOrder) -> None:
        """The learning rate follows the share of the run's packs that all islands together have trained.

        Steps are those of the whole run, whatever this island's batch: a round's packs are spread evenly over the
        islands that are there.
        """
        rate, most = self.rate_at, self.total_steps
        before = lease["before"] * most / self.packs
        together = lease["present"] * self.batch_size * most / self.packs
        self.schedule = lambda steps: rate(min(most, before + (steps - start) * together))

    def complete(self) -> bool:
        """See `Loop.complete`; of all islands together."""
        return self.all_is_trained

    def goes_on(self) -> bool:
        """See `Loop.goes_on`; a batch of the next lease is not known yet."""
        return self.progress.step < self.lease_end

    def votes(self) -> tuple[bool, ...]:
        """See `Loop.votes`; and whether the adapter of the exchange under way is here."""
        return (*super().votes(), self.has_arrived())

    def heed(self, votes: Any) -> None:
        """See `Loop.heed`."""
        super().heed(votes)
        self.arrived = bool(votes[2])

    def write_records(self) -> None:
        """See `Loop.write_records`; keeps the losses for the coordinator, too."""
        self.losses += [(taken.loss_tokens, loss) for taken, loss, _ in self.unlogged if math.isfinite(loss)]
        steps = len(self.unlogged)
        super().write_records()
        if steps and "seconds_per_step" in self.heartbeat.metrics:
            self.step_seconds += self.heartbeat.metrics["seconds_per_step"] * steps

    # Exchanges

    def contribute(self, lease: dict[str, Any], trained: list[list[int]], tokens: int) -> None:
        """Start sending what the lease has changed; without overlap nothing is trained until the result is here."""
        told = self.measured(lease)
        # What rounding left out of the message before goes into this one.
        if self.exchanging and not self.has_sent():
            return
        if self.exchange is not None:
            self.exchange.given_up.set()
        with self.exposed():
            self._contribute(lease, trained, tokens, told)

    def _contribute(self, lease: dict[str, Any], trained: list[list[int]], tokens: int, told: Told) -> None:
        adapter = self.strategy.full_adapter()
        changed = sorted(adapter.keys() - self.fixed.keys())
        # What an exchange under way has not brought yet, this change does not know of either.
        start = self.sent_adapter if self.exchanging else self.shared
        if self.island is not None:
            change = change_of({name: adapter[name] for name in changed}, start)
            self.exchange = self.island.exchange(lease, change, trained, tokens, told)
        self.exchanging, self.arrived = True, False
        self.sending, self.sent_adapter = lease["lease"], adapter

    def measured(self, lease: dict[str, Any]) -> Told:
        """What this lease was like, for the coordinator's report."""
        self.evaluate_next = lease["evaluates"] and self.evaluation_due() and not self.asked_to_stop
        before = None
        if self.evaluate_next and self.eval_table is not None:
            before = self.timed_loss(self.eval_table)
            if self.metrics is not None:
                self.metrics.write(self.progress.step, eval_loss_before=before)
        losses, self.losses = self.losses, []
        steps, tokens = self.progress.step - self.contributed_step, sum(count for count, _ in losses)
        told = Told(
            steps=steps,
            loss=sum(count * loss for count, loss in losses) / tokens if tokens else math.nan,
            first_loss=losses[0][1] if losses else math.nan,
            last_loss=losses[-1][1] if losses else math.nan,
            seconds_per_step=self.step_seconds / max(1, steps),
            exchange_seconds=self.exchange_s, exposed_seconds=self.exposed_s, eval_loss_before=before,
        )  # fmt: skip
        if self.metrics is not None:
            self.metrics.write(
                self.progress.step, exchange_seconds=self.exchange_s, exposed_seconds=self.exposed_s,
                round=lease["round"],
            )  # fmt: skip
        self.contributed_step, self.step_seconds, self.exchange_s, self.exposed_s = self.progress.step, 0.0, 0.0, 0.0
        return told

    def evaluation_due(self) -> bool:
        """Whether a multiple of `eval.eval_steps` lies between this contribution and the last one."""
        every = self.config.eval.eval_steps
        return self.eval_table is not None and every is not None and (
            self.progress.step // every > self.contributed_step // every
        )  # fmt: skip

    def has_arrived(self) -> bool:
        """Whether rank 0 has the adapter of the exchange under way, or its failure."""
        return self.exchange is not None and self.exchange.received.done()

    def has_sent(self) -> bool:
        """Wait until the coordinator has answered the contribution under way; False where it does not before the end.

        All ranks call it together.
        """
        return self.wait_for(None if self.exchange is None else self.exchange.sent, STOP_S) is not None

    def take_result(self, wait_for_it: bool = True) -> None:
        """Go on from what the exchange under way brings. All ranks call it together.

        Args:
            wait_for_it: where it is not here yet; else the exchange stays under way.
        """
        # Steps before it are no part of it; a GPU's last one is still to be taken up.
        self.log()
        with self.exposed():
            self._take_result(wait_for_it)
            self.interval_start = self.arrivals.now()
        if self.aggregate.overlap and not self.exchanging:
            self.keep()

    def _take_result(self, wait_for_it: bool) -> None:
        if not wait_for_it and not self.agree(self.has_arrived()):
            return
        received = self.wait_for(None if self.exchange is None else self.exchange.received)
        if received is None:
            return
        now = self.strategy.full_adapter() if self.aggregate.overlap else {}
        self.load(received)
        if self.exchange is not None:
            self.exchange_s += self.exchange.seconds
            if self.exchange.refused is not None:
                self.notice(f"the coordinator does not count what this island has trained: {self.exchange.refused}")
        self.exchange, self.exchanging, self.arrived, self.sending = None, False, False, None
        if self.evaluate_next:
            self.evaluate_version()
            self.evaluate_next = False
        if self.aggregate.overlap:
            self.strategy.load_adapter({**self.shared, **rebase(now, self.sent_adapter, self.shared)})

    def evaluate_version(self) -> None:
        """Measure the held-out loss of the adapter that all islands have."""
        if self.eval_table is None or self.evaluated_version == self.version:
            return
        loss = self.timed_loss(self.eval_table)
        self.evaluated_version = self.version
        self.last_eval = (self.progress.step, loss)
        self.progress.note_evaluation(loss, self.config.eval)
        if self.metrics is not None:
            self.metrics.write(self.progress.step, eval_loss=loss)
        version = self.version
        self.ask(lambda island: island.evaluated(version, loss), STOP_S)

    def timed_loss(self, table: TokenTable) -> float:
        """The held-out loss of the adapter as it is."""
        began = time.monotonic()
        loss = self.held_out_loss(table)
        self.evaluation_s += time.monotonic() - began
        return loss

    def keep(self) -> None:
        """A checkpoint, where the last one is `checkpoint.save_steps` steps old."""
        if self.progress.step - max(0, self.saved_step) >= self.config.checkpoint.save_steps:
            self.save()

    def end(self, lease: dict[str, Any], reason: str) -> None:
        """The final adapter where there is one, a last checkpoint, and goodbye."""
        if self.exchanging and not self.has_sent():
            self.notice(
                "the coordinator did not answer, and what this island has trained last is lost; others train it"
            )
        if self.all_is_trained:
            if self.exchanging:
                self.take_result()
            self.load_newest(after_stop_s=STOP_S)
            if lease["evaluates"]:
                self.evaluate_version()
        if self.exchange is not None:
            self.exchange.given_up.set()
        self.save()
        if not self.ask(lambda island: island.leave(reason), STOP_S):
            self.notice("the coordinator did not answer, and has not heard that this island ends")

    # Checkpoints

    def full_adapter(self) -> dict[str, Tensor]:
        """See `Loop.full_adapter`; some strategies hold only what trains."""
        return {**self.fixed, **self.strategy.full_adapter()}

    def kept_state(self) -> dict[str, Any]:
        """See `Loop.kept_state`."""
        return {"island": {"version": self.version}}

    def kept_tensors(self) -> dict[str, Tensor]:
        """See `Loop.kept_tensors`: what rounding left out of this island's messages."""
        return {} if self.island is None else self.island.encoder.state_dict()
