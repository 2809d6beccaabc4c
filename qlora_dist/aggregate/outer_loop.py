"""The outer loop of a run of islands: it closes rounds, takes the outer step, commits, and goes on after a kill.

Decisions are those of `coordinate.island_messages`, taken under the event log's lock; files are on the disk before the
event that names them. Killed at any moment and started again it goes on from the log: what was collected is collected
again and gives the same adapter, bit for bit.
"""

import hashlib
import json
import logging
import math
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from qlora_dist.aggregate.changes import frozen_names
from qlora_dist.aggregate.exchange import Message, as_contribution, decode
from qlora_dist.aggregate.measures import divergence
from qlora_dist.aggregate.outer import OuterSettings, outer_step
from qlora_dist.aggregate.round_files import CONTRIBUTIONS, ROUNDS, Version, read_version, sweep, write_version
from qlora_dist.aggregate.round_report import RoundReport
from qlora_dist.aggregate.safety import refuse_round
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate import island_messages as say
from qlora_dist.coordinate import report
from qlora_dist.coordinate.decisions import Decisions
from qlora_dist.coordinate.files import explain
from qlora_dist.coordinate.heard import Heard
from qlora_dist.coordinate.island_messages import Decision
from qlora_dist.coordinate.log import Event
from qlora_dist.coordinate.replay import Run
from qlora_dist.coordinate.rounds import Contribution, Rounds, Terms
from qlora_dist.coordinate.rundir import ADAPTER, read_run
from qlora_dist.model.adapter import write_adapter

logger = logging.getLogger(__name__)
TICK_S = 0.5
STATUS_EVERY_S = 2.0


class OuterLoop:
    """What the coordinator does by itself. One thread calls `run`; all others that speak for islands use the rest.

    Args:
        config: the run's; `aggregate` counts for all islands, whatever theirs say.
        run_dir: an opened run folder (`coordinate.rundir.open_run`).
        round_report: takes what each round came to.
    """

    def __init__(self, config: RunConfig, run_dir: Path, round_report: RoundReport):
        self.config, self.run_dir, self.info = config, run_dir, read_run(run_dir)
        self.report = round_report
        self.decisions = Decisions(run_dir, 60.0)
        aggregate = config.aggregate
        self.outer = OuterSettings(
            aggregate.method, aggregate.outer_learning_rate, aggregate.outer_momentum, aggregate.robust, aggregate.trim,
            aggregate.clip_norm, aggregate.noise, config.seed,
        )  # fmt: skip
        self.version: Version | None = None
        self.messages: dict[int, Message] = {}
        self.changed = threading.Condition()
        self.changes = 0
        # What was sent and no message had followed when the last round was closed.
        self.unfollowed: set[str] = set()
        # The round that is being aggregated.
        self.closing: int | None = None
        # Who was asked for the adapter to start from, and when.
        self.beginner = ("", -1e9)
        self.heard_time = time.monotonic()
        self.status_time = -1e9
        with self.decisions.deciding() as run:
            self._start(run)

    def _start(self, run: Run) -> None:
        """Put right what a coordinator that was killed has left, and take up the last committed version."""
        kept = [one.facts["file"] for one in run.rounds.contributions.values()]
        sweep(self.run_dir, self._named_versions(run), kept)
        if run.begun is None:
            return
        self.version = read_version(self.run_dir, self._named_versions(run)[-1])
        self.report.begin(run.begun, run.rounds)
        self.decide(say.resume(run.rounds, time.time()))

    def _named_versions(self, run: Run) -> list[str]:
        """The folders that count, the current one last."""
        if run.begun is None:
            return []
        last = run.rounds.last
        return [run.begun["folder"]] if last is None else [last["facts"]["before"], last["facts"]["folder"]]

    def run(self) -> None:
        """Close rounds until there is nothing left to train, or the run was stopped and no island is heard of any more.

        Raises:
            UserError: the storage is full or cannot be written.
            RuntimeError: another coordinator has gone on with this run.
        """
        while True:
            seen = self.changes
            with self.decisions.deciding() as run:
                why = None
                if run.begun is not None:
                    self._check_alone(run)
                    terms = self.terms(run)
                    self.decide(say.tick(run.rounds, terms, time.time()))
                    why = run.rounds.due(terms, time.time())
                    collected = run.rounds.collect()
                    left = not anybody(run.rounds) or self._silent(run)
                    over = run.rounds.finished(terms.packs) or (run.stop is not None and left)
                    self.closing = run.rounds.round if why is not None else None
            if why is not None:
                self._close_round(why, collected)
                self.closing = None
                self.tell_change()
                continue
            if run.begun is not None and over:
                return self._finish()
            if run.begun is None and run.stop is not None:
                return
            self._write_status()
            with self.changed:
                self.changed.wait_for(lambda seen=seen: self.changes != seen, TICK_S)  # type: ignore[misc]

    def _close_round(self, why: str, collected: list[Contribution]) -> None:
        """Aggregate what was collected, write the next version, commit it."""
        run, before, started = self.decisions.run, self.version, time.monotonic()
        assert before is not None
        assert run.begun is not None
        begun = run.begun
        terms, number = self.terms(run), before.state.round
        refused: dict[int, str] = {}
        contributions = []
        for one in collected:
            message = self._message_of(one)
            if isinstance(message, str):
                refused[one.lease] = message
            else:
                contributions.append(as_contribution(message, say.discount(run.rounds, terms, one)))
        reference = {name: before.exact[name] for name in self.trained_names()}
        most = self.config.aggregate.max_norm_ratio
        refused |= refuse_round(contributions, reference, begun["base"], before.state.known_norms(), most)
        counted = [one for one in contributions if one.lease not in refused]
        if not counted:
            with self.decisions.deciding() as run:
                for lease, reason in refused.items():
                    self.decide(say.reject(run.rounds, terms, lease, reason, time.time()))
            self._forget(collected)
            return
        outcome = outer_step(self.outer, before.state, before.exact, counted)
        try:
            following = write_version(
                self.run_dir, before, outcome.adapter, outcome.state, self.trained_names(),
                self.config.aggregate.exchange_bits, begun["base"],
                json.dumps(begun["adapter_config"], indent=2).encode(), begun["notes"],
            )  # fmt: skip
        except OSError as error:
            raise explain(error, self.run_dir) from error
        by_lease = {one.lease: one for one in collected}
        facts = self.report.facts(
            number, [by_lease[one.lease] for one in counted], divergence([one.change for one in counted]), refused,
            before, following, time.monotonic() - started,
        )  # fmt: skip
        with self.decisions.deciding() as run:
            self._check_alone(run, following)
            decision = say.commit(
                run.rounds, terms, number, [one.lease for one in counted], refused, why, time.time(),
                folder=following.folder, before=before.folder, sha256=following.sha256, reset=outcome.reset,
                lost=outcome.lost, **facts,
            )  # fmt: skip
            oldest = self._named_versions(run)[0]
            with self.decisions.memory:
                self.decide(decision)
                self.version = following
        self.tell_change()
        self.report.committed(run.rounds)
        if oldest != before.folder:
            shutil.rmtree(self.run_dir / ROUNDS / oldest, ignore_errors=True)
        self._forget(collected)
        self._drop_unfollowed()
        self._write_status(at_once=True)

    def _check_alone(self, run: Run, following: Version | None = None) -> None:
        """Raise where another coordinator over this folder goes on: this one was taken for dead.

        Args:
            following: what is to be committed; whoever starts removes files that no event names.
        """
        gone = following is not None and (
            run.rounds.closed or not (self.run_dir / ROUNDS / following.folder).is_dir()
        )  # fmt: skip
        if gone or self.version is None or self.version.state.round != run.rounds.round:
            raise RuntimeError(f"another coordinator is at work in {self.run_dir}")

    def _silent(self, run: Run) -> bool:
        """Whether islands were asked to stop, and for as long as a round may last there was no message."""
        patience_s = self.config.aggregate.round_deadline_s
        asked = run.stop is not None and time.time() > run.stop["time"] + patience_s
        return asked and time.monotonic() > self.heard_time + patience_s

    def _forget(self, collected: list[Contribution]) -> None:
        """Remove what was collected and is counted or refused by now."""
        for one in collected:
            if one.lease not in self.decisions.run.rounds.contributions:
                self.messages.pop(one.lease, None)
                (self.run_dir / CONTRIBUTIONS / one.facts["file"]).unlink(missing_ok=True)

    def _drop_unfollowed(self) -> None:
        """Remove what was sent more than a round ago and no message has followed; an island that is late sends anew."""
        with self.decisions.deciding() as run:
            named = {one.facts["file"] for one in run.rounds.contributions.values()}
            found = {path.name for path in (self.run_dir / CONTRIBUTIONS).glob("[!.]*")} - named
            for name in found & self.unfollowed:
                (self.run_dir / CONTRIBUTIONS / name).unlink(missing_ok=True)
            self.unfollowed = found - self.unfollowed

    def _message_of(self, contribution: Contribution) -> Message | str:
        """What was sent, or why it cannot be read again."""
        if contribution.lease in self.messages:
            return self.messages[contribution.lease]
        who = f"island {contribution.island}, round {contribution.round + 1}:"
        try:
            data = (self.run_dir / CONTRIBUTIONS / contribution.facts["file"]).read_bytes()
        except FileNotFoundError:
            return f"{who} its file {contribution.facts['file']} is gone"
        if hashlib.sha256(data).hexdigest() != contribution.facts["sha256"]:
            return f"{who} its file {contribution.facts['file']} has been altered"
        return decode(data)

    def _finish(self) -> None:
        """Write the final adapter, wait for the islands that are still there, say that the run is done."""
        version, begun = self.version, self.decisions.run.begun
        assert version is not None
        assert begun is not None
        config_json = json.dumps(begun["adapter_config"], indent=2).encode()
        write_adapter(version.exact, config_json, self.run_dir / ADAPTER, begun["notes"])
        self.tell_change()
        patience_s = self.config.aggregate.round_deadline_s
        while time.monotonic() < self.heard_time + patience_s:
            self.decisions.catch_up()
            with self.decisions.memory:
                if not anybody(self.decisions.run.rounds):
                    break
            with self.changed:
                self.changed.wait(TICK_S)
            self._write_status()
        with self.decisions.deciding() as run:
            summary = self.report.summary(run, self.run_dir)
            if run.finished is None:
                self.decisions.decide("finished", generation=None, step=run.rounds.round, summary=summary)
        self._write_status(at_once=True)

    # Small things

    def begun(self, run: Run) -> Event:
        if run.begun is None:
            raise ValueError("an island says hello before it joins, and begins where nobody has")
        return run.begun

    def terms(self, run: Run) -> Terms:
        aggregate = self.config.aggregate
        return Terms(
            packs=self.begun(run)["packs"], islands=aggregate.islands, quorum=aggregate.quorum,
            deadline_s=aggregate.round_deadline_s, start_timeout_s=self.config.launch.start_timeout_s,
            late_rounds=aggregate.late_rounds, late_discount=aggregate.late_discount,
            most_leases=aggregate.most_leases, overlap=aggregate.overlap,
        )  # fmt: skip

    def trained_names(self) -> list[str]:
        """The names that islands train and exchange."""
        assert self.version is not None
        names = set(self.version.exact)
        return sorted(names - frozen_names(names, "A") if self.config.aggregate.freeze == "A" else names)

    def decide(self, decision: Decision) -> None:
        for event in decision.events:
            self.decisions.decide(**event)

    def tell_change(self) -> None:
        with self.changed:
            self.changes += 1
            self.changed.notify_all()

    def status(self) -> dict[str, Any]:
        """What a person wants to know of the run; see `coordinate.report.build`."""
        self.decisions.catch_up()
        with self.decisions.memory:
            status = report.build(self.info.run_id, self.decisions.run, Heard(None, []), [])
        return status | {"coordinator": {"rank": 0, **self.report.host}}

    def _write_status(self, at_once: bool = False) -> None:
        if not at_once and time.monotonic() - self.status_time < STATUS_EVERY_S:
            return
        self.status_time = time.monotonic()
        try:
            report.write(self.run_dir, self.status())
        except OSError as error:
            logger.warning("the status cannot be written: %s", error)


def packs_in_all(config: RunConfig, num_packs: int) -> int:
    """What a run of islands trains, with so many packs an epoch."""
    steps = config.train.max_steps
    if steps:
        return steps * config.aggregate.islands * config.global_batch_size
    return math.ceil((config.train.num_train_epochs or 1.0) * num_packs)


def anybody(rounds: Rounds) -> bool:
    return any(island.present for island in rounds.islands.values())
