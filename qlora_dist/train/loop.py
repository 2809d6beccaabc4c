"""The loop: it owns the step, and decides when to log, evaluate, save and stop. The same over all strategies.

The host does not wait for the device within a step: what a step's loss, norm and votes came to is taken up a step later
(`Arrivals`), and the next batch is on its way while this one trains.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from qlora_dist.checkpoint.format import Snapshot
from qlora_dist.checkpoint.writer import BackgroundWriter
from qlora_dist.config.errors import UserError
from qlora_dist.config.load import to_yaml
from qlora_dist.config.schema import RunConfig
from qlora_dist.data.collate import MicroBatch, collate, loss_tokens, num_tokens, tokens_of_ranks
from qlora_dist.data.order import GlobalOrder, LeasedOrder, Position, micro_batches
from qlora_dist.data.tokens import TokenTable
from qlora_dist.model.block import Block
from qlora_dist.optim.optimizers import set_learning_rate
from qlora_dist.shard.strategy import Strategy
from qlora_dist.track.metrics import MetricsLog
from qlora_dist.train.arrivals import Arrivals, Stamp, seconds_between
from qlora_dist.train.evaluate import held_out_loss
from qlora_dist.train.heartbeat import Heartbeat, memory_bytes
from qlora_dist.train.leaner_plan import OutOfRoom, can_go_on, lean_down, throw_away_gradients
from qlora_dist.train.progress import Progress
from qlora_dist.train.step import accumulate_gradients, draw_seed, lays_flat

CLOSE_TIMEOUT_S = 60.0
HOLD_POLL_S = 0.1


@dataclass(frozen=True)
class Taken:
    """What the host knows of a step that it has launched: tokens are those of the global batch, and of each rank."""

    step: int
    learning_rate: float
    num_tokens: int
    loss_tokens: int
    tokens_of_ranks: np.ndarray


@dataclass
class Loop:
    """Everything one rank's loop works with. `metrics` and `writer` are rank 0's alone."""

    config: RunConfig
    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
    strategy: Strategy
    schedule: Callable[[int], float]
    compute_dtype: torch.dtype
    pad_token_id: int
    order: GlobalOrder | LeasedOrder
    train_table: TokenTable
    eval_table: TokenTable | None
    total_steps: int
    progress: Progress
    identity: dict[str, Any]
    adapter_config: dict[str, Any]
    adapter_config_json: bytes
    heartbeat: Heartbeat
    metrics: MetricsLog | None
    writer: BackgroundWriter | None
    # The ranks of each node, for rank 0.
    nodes: dict[str, list[int]] = field(default_factory=dict)
    blocks: Sequence[Block] = ()
    notice: Callable[[str], None] = print
    # Steps whose loss and norm have arrived, and when the last of them was done.
    unlogged: list[tuple[Taken, float, float]] = field(default_factory=list)
    done: Stamp = 0.0
    ahead: dict[Position, list[MicroBatch]] = field(default_factory=dict)
    interval_start: Stamp = 0.0
    last_eval: tuple[int, float] | None = None
    saved_step: int = -1
    asked_to_stop: bool = False
    asked_to_hold: bool = False

    def __post_init__(self) -> None:
        self.arrivals: Arrivals[Taken] = Arrivals(self.device)

    def run(self) -> None:
        """Train from where `progress` stands to the last step, until early stopping, or until asked to stop.

        Raises:
            UserError: too many non-finite steps in a row, or a checkpoint that cannot be written.
        """
        try:
            self.train()
        except BaseException:
            # A checkpoint under way is worth a moment's wait, whatever went wrong; that failure is the one to tell of.
            if self.writer is not None:
                with contextlib.suppress(Exception):
                    self.writer.close(timeout=CLOSE_TIMEOUT_S)
            raise
        self.heartbeat.at(self.progress.step, "checkpoint")
        if self.writer is not None:
            self.writer.close()

    def train(self) -> None:
        """The steps."""
        self.model.train()
        self.saved_step = self.progress.step
        if self.progress.step == 0 and self.config.eval.eval_on_start:
            self.evaluate()
        self.interval_start = self.arrivals.now()
        while self.progress.step < self.total_steps and not self.stopped_early() and not self.asked_to_stop:
            self.take_step()
            step, last = self.progress.step, self.progress.step == self.total_steps
            if last:
                self.log()
            improved = False
            if last or self.due(self.config.eval.eval_steps):
                improved = self.evaluate()
            if (
                last
                or self.stopped_early()
                or self.asked_to_stop
                or self.asked_to_hold
                or improved
                or self.due(self.config.checkpoint.save_steps)
            ):
                self.save()
            if self.writer is not None:
                self.writer.poll()
            if self.asked_to_hold and not last and not self.asked_to_stop and self.saved_step == step:
                self.hold()

    def hold(self) -> None:
        """Stand still after this step's checkpoint, until the launcher ends this group or calls the resize off."""
        self.heartbeat.at(self.progress.step, "checkpoint")
        if self.writer is not None:
            self.writer.close()
            self.heartbeat.client.call("held", generation=self.heartbeat.generation, step=self.progress.step)
        while self.heartbeat.hold_asked:
            time.sleep(HOLD_POLL_S)
        self.asked_to_hold = False
        self.interval_start = self.arrivals.now()

    def due(self, every: int | None) -> bool:
        """Whether something done `every` so many steps is due now."""
        return every is not None and self.progress.step % every == 0

    def stopped_early(self) -> bool:
        """Whether evaluation has stopped improving for long enough."""
        patience = self.config.eval.early_stopping_patience
        return patience is not None and self.progress.stale_evals >= patience

    def complete(self) -> bool:
        """Whether nothing is left to train."""
        return self.progress.step >= self.total_steps or self.stopped_early()

    def take_step(self) -> None:
        """One optimizer step over one global batch."""
        progress, config = self.progress, self.config
        self.heartbeat.at(progress.step + 1, "compute")
        waits = self.strategy.waits
        waits.begin_step()
        packs, following = self.order.batch_at(progress.position)
        batches = [
            (batch, draw_seed(config.seed, progress.step, batch.packs[0] if batch.packs else 0))
            for batch in self.ahead.pop(progress.position, None) or self.fetch(progress.position)
        ]
        bear_loss = loss_tokens(self.train_table, packs)
        share = self.forward_and_backward(batches, bear_loss)
        self.heartbeat.at(progress.step + 1, "collective")
        asked = self.votes()
        with waits:
            norm = self.strategy.clip(config.train.max_grad_norm, progress.loss_scale.scale)
            if self.world_size > 1:
                # The votes on stopping and holding ride along, so that all ranks do so after the same step.
                totals = torch.stack([share, *(torch.full_like(share, vote) for vote in asked)])
                dist.all_reduce(totals)
            else:
                totals = share.view(1)
                self.heed(asked)
        learning_rate = self.schedule(progress.step)
        set_learning_rate(self.strategy.optimizer, learning_rate)
        self.strategy.step(~(torch.isfinite(norm) & torch.isfinite(totals[0])))
        progress.step += 1
        progress.position = following
        of_ranks = tokens_of_ranks(self.train_table, packs, config.train.per_device_train_batch_size, self.world_size)
        taken = Taken(progress.step, learning_rate, num_tokens(self.train_table, packs), bear_loss, of_ranks)
        self.arrivals.send(taken, torch.cat([norm.view(1), totals]))
        if self.goes_on():
            self.ahead[following] = self.fetch(following)
        # The next step's loss is multiplied by what this one says of the scale.
        self.take_up(everything=progress.loss_scale.enabled)
        waits.end_step(sum(batch.input_ids_BT.numel() for batch, _ in batches))
        self.heartbeat.busy = waits.busy
        self.heartbeat.steps.append((progress.step, int(of_ranks[self.rank])))

    def goes_on(self) -> bool:
        """Whether another step follows, whose batch is worth fetching."""
        return self.progress.step < self.total_steps

    def votes(self) -> tuple[bool, ...]:
        """What this rank has heard: to stop, to hold still."""
        return self.heartbeat.stop_asked, self.heartbeat.hold_asked

    def heed(self, votes: Sequence[bool]) -> None:
        """Take up what any rank has heard; all ranks do so after the same step."""
        self.asked_to_stop, self.asked_to_hold = votes[:2]

    def forward_and_backward(self, batches: list[tuple[MicroBatch, int]], bear_loss: int) -> Tensor:
        """This rank's share of the global loss; out of memory, a worker that can tries again with a leaner plan.

        Raises:
            OutOfRoom: for all workers to start again with a leaner plan.
            torch.OutOfMemoryError: no plan is leaner.
        """
        while True:
            try:
                scale = self.progress.loss_scale.scale
                return accumulate_gradients(self.model, self.strategy, batches, bear_loss, scale, self.compute_dtype)
            except torch.OutOfMemoryError as error:
                failure = str(error)
            # Only here has the error's traceback let go of the tensors of the forward.
            line = lean_down(self.blocks) if self.config.activations == "auto" else None
            if line is None:
                raise torch.OutOfMemoryError(failure)
            if not can_go_on(self.config, self.world_size):
                raise OutOfRoom(failure)
            throw_away_gradients(self.strategy)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.notice(f"out of memory at step {self.progress.step + 1}; the step is tried again, activations {line}")

    def fetch(self, position: Position) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch at `position`, on their way to the device."""
        packs, _ = self.order.batch_at(position)
        mine = micro_batches(packs, self.config.train.per_device_train_batch_size, self.rank, self.world_size)
        flat = lays_flat(self.config)
        return [
            collate(self.train_table, part, self.pad_token_id, flat=flat).to(self.device, non_blocking=True)
            for part in mine
        ]

    def take_up(self, everything: bool = False) -> None:
        """Take up what has arrived of earlier steps, or all there is, and log it where a record is due.

        Raises:
            UserError: too many non-finite steps in a row.
        """
        for taken, (norm, loss, *votes), done in self.arrivals.take(everything):
            self.done = done
            self.unlogged.append((taken, loss, norm))
            if votes:
                self.heed([vote > 0 for vote in votes])
            self.count_bad_step(taken.step, not (math.isfinite(loss) and math.isfinite(norm)))
            if taken.step % self.config.train.logging_steps == 0:
                self.write_records()

    def count_bad_step(self, step: int, bad: bool) -> None:
        """Keep count of non-finite steps, and give up after `train.max_bad_steps` in a row."""
        progress = self.progress
        progress.skipped_steps += bad
        if progress.loss_scale.update(bad):
            return
        progress.bad_steps = progress.bad_steps + 1 if bad else 0
        if progress.bad_steps >= self.config.train.max_bad_steps:
            self.write_records()
            raise UserError("loss-not-finite", bad_steps=progress.bad_steps, step=step)

    def log(self) -> None:
        """Write a record for each step since the last one logged."""
        self.take_up(everything=True)
        self.write_records()

    def write_records(self) -> None:
        """Write a record for each step that has arrived since the last call."""
        if not self.unlogged:
            return
        losses = [loss for _, loss, _ in self.unlogged]
        seconds = seconds_between(self.interval_start, self.done)
        of_ranks = np.sum([taken.tokens_of_ranks for taken, *_ in self.unlogged], axis=0) / seconds
        tokens_per_second = sum(taken.num_tokens for taken, *_ in self.unlogged) / seconds
        loss_tokens_per_second = sum(taken.loss_tokens for taken, *_ in self.unlogged) / seconds
        memory = memory_bytes(self.device)
        if self.metrics is not None:
            nodes = self.nodes if len(self.nodes) > 1 else {}
            for taken, loss, norm in self.unlogged:
                self.metrics.write(
                    taken.step, loss=loss, grad_norm=norm, learning_rate=taken.learning_rate,
                    epoch=taken.step / self.order.steps_per_epoch, tokens_per_second=tokens_per_second,
                    loss_tokens_per_second=loss_tokens_per_second, seconds_per_step=seconds / len(losses),
                    skipped_steps=self.progress.skipped_steps, memory_bytes=memory,
                    **{f"tokens_per_second/{host}": float(of_ranks[ranks].sum()) for host, ranks in nodes.items()},
                )  # fmt: skip
        self.heartbeat.metrics = {
            "tokens_per_second": float(of_ranks[self.rank]),
            "loss": losses[-1] if math.isfinite(losses[-1]) else None,
            "max_steps": self.total_steps, "seconds_per_step": seconds / len(losses),
        }  # fmt: skip
        self.unlogged.clear()
        self.interval_start = self.done

    def evaluate(self) -> bool:
        """Measure the held-out loss, if there are held-out rows; True where it is the best so far."""
        if self.eval_table is None:
            return False
        started = time.monotonic()
        eval_loss = self.held_out_loss(self.eval_table)
        if self.metrics is not None:
            self.metrics.write(
                self.progress.step, eval_loss=eval_loss, eval_perplexity=_exp(eval_loss),
                eval_seconds=time.monotonic() - started,
            )  # fmt: skip
        self.last_eval = (self.progress.step, eval_loss)
        # The untrained adapter has no checkpoint, so it is never the best one.
        improved = self.progress.step > 0 and self.progress.note_evaluation(eval_loss, self.config.eval)
        return improved and self.config.checkpoint.keep_best > 0

    def held_out_loss(self, table: TokenTable) -> float:
        """The held-out loss of the adapter as it is; its time is no step's."""
        self.log()
        self.heartbeat.at(self.progress.step, "compute")
        loss = held_out_loss(
            self.model, table, self.config.eval.per_device_eval_batch_size, self.rank, self.world_size,
            self.pad_token_id, self.compute_dtype, self.device, self.strategy.collective_forward,
        )  # fmt: skip
        self.interval_start = self.arrivals.now()
        return loss

    def full_adapter(self) -> dict[str, Tensor]:
        """The whole adapter, what does not train included. All ranks call it together."""
        return self.strategy.full_adapter()

    def kept_state(self) -> dict[str, Any]:
        """What else goes into a checkpoint's state."""
        return {}

    def kept_tensors(self) -> dict[str, Tensor]:
        """What else goes into a checkpoint's tensors."""
        return {}

    def save(self) -> None:
        """Hand a snapshot to the background writer, unless this step has one or is in the middle of bad steps."""
        self.log()
        if self.progress.step == self.saved_step or self.progress.bad_steps:
            return
        self.heartbeat.at(self.progress.step, "checkpoint")
        state = self.strategy.full_state()
        if self.writer is not None:
            evaluated_now = (
                self.last_eval is not None
                and self.last_eval[0] == self.progress.step
                and math.isfinite(self.last_eval[1])
            )
            self.writer.save(
                Snapshot(
                    step=self.progress.step,
                    adapter=state.adapter,
                    adapter_config=self.adapter_config,
                    optimizer=state.optimizer,
                    optimizer_scalars=state.optimizer_scalars,
                    state={"progress": self.progress.to_dict(), "identity": self.identity, **self.kept_state()},
                    extra=self.kept_tensors(),
                    config_yaml=to_yaml(self.config),
                ),
                {"eval_loss": self.last_eval[1]} if self.last_eval is not None and evaluated_now else {},
            )
        self.saved_step = self.progress.step


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
