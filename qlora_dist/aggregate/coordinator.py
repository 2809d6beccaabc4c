"""The coordinator of islands: it keeps the rounds' log, collects contributions, takes the outer step, commits.

Decisions are those of `coordinate.island_messages`, taken under the event log's lock; files are on the disk before the
event that names them. Killed at any moment and started again it goes on from the log: what was collected is collected
again and gives the same adapter, bit for bit.
"""

import hashlib
import inspect
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch

from qlora_dist.aggregate.changes import frozen_names
from qlora_dist.aggregate.exchange import Message, as_contribution, decode
from qlora_dist.aggregate.measures import divergence
from qlora_dist.aggregate.outer import OuterSettings, OuterState, outer_step
from qlora_dist.aggregate.round_files import (
    CHANGE,
    CONTRIBUTIONS,
    ROUNDS,
    Version,
    digest,
    read_version,
    sweep,
    take_contribution,
    whole_message,
    write_version,
)
from qlora_dist.aggregate.round_report import RoundReport
from qlora_dist.aggregate.safety import refuse, refuse_round
from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate import island_messages as say
from qlora_dist.coordinate import report
from qlora_dist.coordinate.decisions import Decisions
from qlora_dist.coordinate.heard import Heard
from qlora_dist.coordinate.island_messages import Decision
from qlora_dist.coordinate.log import Event
from qlora_dist.coordinate.ranges import count
from qlora_dist.coordinate.replay import Run
from qlora_dist.coordinate.rounds import Contribution, Lease, Rounds, Terms
from qlora_dist.coordinate.rundir import ADAPTER, read_run
from qlora_dist.model.adapter import write_adapter

logger = logging.getLogger(__name__)
Answer = dict[str, Any]
MESSAGES = frozenset(
    {"hello", "begin", "join", "lease", "contribute", "result", "evaluated", "leave", "island_ended", "status"}
)
# The longest that an answer is held back for something to happen.
MOST_WAIT_S = 20.0
TICK_S = 0.5
STATUS_EVERY_S = 2.0
# After which another island is asked for the adapter to start from.
BEGINNER_S = 120.0
# Of what an island trains with, what may differ from the others'.
OWN = {"train.global_batch_size"}


class OuterCoordinator:
    """One method a message; arguments and answers are JSON. Any number of threads may call it; one runs `run`.

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
        self._decide(say.resume(run.rounds, time.time()))

    def _named_versions(self, run: Run) -> list[str]:
        """The folders that count, the current one last."""
        if run.begun is None:
            return []
        last = run.rounds.last
        return [run.begun["folder"]] if last is None else [last["facts"]["before"], last["facts"]["folder"]]

    # Messages

    def handle(self, method: str, **kwargs: Any) -> Answer:
        """Answer one message; what the service calls.

        Raises:
            ValueError: there is no such message, or its arguments are wrong.
        """
        if method not in MESSAGES:
            raise ValueError(f"the coordinator of islands has no message {method!r}")
        message = getattr(self, method)
        try:
            inspect.signature(message).bind(**kwargs)
        except TypeError as error:
            raise ValueError(str(error)) from None
        self.heard_time = time.monotonic()
        answer: Answer = message(**kwargs)
        return answer

    def hello(self, identity: dict[str, Any]) -> Answer:
        """An island introduces itself, before it joins.

        Args:
            identity: what decides over what is trained, by setting (`train.identity.run_identity`).

        Returns:
            {"settings": `aggregate` of the coordinator's configuration, which holds for all}.

        Raises:
            UserError: the other islands train something else.
        """
        self.decisions.catch_up()
        begun = self.decisions.run.begun
        if begun is not None:
            for name, value in begun["identity"].items():
                if name not in OWN and identity.get(name) != value:
                    raise UserError("island-differs", setting=name, theirs=value, own=identity.get(name))
        return {"settings": self.config.aggregate.model_dump(mode="json")}

    def begin(self, island: str, start: str, **what: Any) -> Answer:
        """An island offers its adapter for all to start from.

        One is asked to send it, the others wait until it is there; whoever has the same need not fetch it.

        Args:
            start: the adapter's digest (`round_files.digest`).
            what: nothing, or the adapter: `file`, an `adapter` message that was sent before, 32 bits, without tensors
                of zeros; `zeros`, their shapes by name; `identity`; `num_packs` of an epoch; `adapter_config`, its
                JSON; `compute`, for the adapter's notes.

        Returns:
            {"begun": whether there is an adapter to start from, "send": whether this island is to send its own}.
        """
        with self.decisions.deciding() as run:
            if run.begun is None and what:
                path = self.run_dir / CONTRIBUTIONS / what["file"]
                if not path.exists():
                    return {"begun": False, "send": True}
                self._begin(run, start, path.read_bytes(), **what)
                path.unlink(missing_ok=True)
            begun, now = run.begun is not None, time.monotonic()
            send = not begun and (self.beginner[0] == island or now > self.beginner[1] + BEGINNER_S)
            if send and self.beginner[0] != island:
                self.beginner = (island, now)
        self._tell_change()
        return {"begun": begun, "send": send}

    def _begin(
        self, run: Run, start: str, data: bytes, file: str, zeros: dict[str, list[int]], identity: dict[str, Any],
        num_packs: int, adapter_config: str, compute: str,
    ) -> None:  # fmt: skip
        message = decode(data)
        base = message.header.base
        adapter = message.tensors | {name: torch.zeros(shape) for name, shape in zeros.items()}
        if message.header.kind != "adapter" or message.bits != 32 or digest(adapter) != start:
            raise ValueError("islands begin with a whole adapter of 32 bits, which is what its digest says")
        notes = {"base": base, "compute": compute}
        config_json = json.dumps(json.loads(adapter_config), indent=2).encode()
        version = write_version(self.run_dir, None, adapter, OuterState(), (), 32, base, config_json, notes)
        config, batch = self.config, self.config.aggregate.islands * self.config.global_batch_size
        steps = config.train.max_steps
        packs = steps * batch if steps else math.ceil((config.train.num_train_epochs or 1.0) * num_packs)
        with self.decisions.memory:
            self.version = version
            begun = self.decisions.decide(
                "islands_begun", base=base, identity=identity, num_packs=num_packs, packs=packs, start=start,
                total_steps=math.ceil(packs / batch), adapter_config=json.loads(adapter_config), notes=notes,
                folder=version.folder, sha256=version.sha256,
                parameters=sum(version.exact[name].numel() for name in self._trained()),
            )  # fmt: skip
        self.report.begin(begun, run.rounds)

    def join(self, island: str, session: str, facts: dict[str, Any]) -> Answer:
        """See `island_messages.join`; also {"packs", "num_packs", "total_steps", "islands", "start"}: of the run."""
        with self.decisions.deciding() as run:
            begun = self._begun(run)
            decision = say.join(run.rounds, self._terms(run), island, session, time.time(), **facts)
            self._decide(decision)
        self._tell_change()
        told = {key: begun[key] for key in ("packs", "num_packs", "total_steps", "start")}
        return {**decision.answer, **told, "islands": self.config.aggregate.islands}

    def lease(self, island: str, session: str, packs: int, sending: int | None = None, wait_s: float = 0.0) -> Answer:
        """See `island_messages.lease`; waits up to `wait_s` seconds for one.

        Returns:
            Its answer, with {"stop": the run is to end, "before": how many packs earlier rounds took, "present": how
            many islands there are, "evaluates": whether it is this island's to measure held-out losses}.
        """

        def ask() -> tuple[Answer, bool]:
            with self.decisions.deciding() as run:
                terms = self._terms(run)
                stop = run.stop is not None
                if stop:
                    answer: Answer = {"lease": None, "version": run.rounds.round, "done": False, "wait": None}
                    answer |= {"round": None, "ranges": [], "refused": None, "seconds_left": None}
                else:
                    decision = say.lease(run.rounds, terms, island, session, packs, time.time(), sending)
                    if self.closing == decision.answer["round"] and decision.events:
                        # What is leased for a round that is being closed would come too late for it.
                        decision = Decision([], decision.answer | {"lease": None, "round": None, "ranges": []})
                    self._decide(decision)
                    answer = decision.answer
                present = sorted(name for name, one in run.rounds.islands.items() if one.present)
                answer |= {"stop": stop, "before": _packs_before(run.rounds, answer["round"])}
                answer |= {"present": len(present), "evaluates": present[:1] == [island]}
            return answer, stop or answer["lease"] is not None or answer["done"] or answer["refused"] is not None

        return self._wait(ask, wait_s)

    def contribute(
        self, island: str, session: str, lease: int, trained: list[list[int]], tokens: int, file: str, told: Answer
    ) -> Answer:
        """See `island_messages.contribute`.

        Args:
            file: the message, which was sent before.
            told: what the island has measured: numbers for the report.

        Returns:
            Its answer, with {"missing": True where the file has to be sent again}.
        """
        path = self.run_dir / CONTRIBUTIONS / file
        with self.decisions.memory:
            known = lease in self.decisions.run.rounds.contributions or lease in self.decisions.run.rounds.counted
        data = path.read_bytes() if path.exists() else None
        if data is None and not known:
            return {"accepted": False, "reason": None, "round": None, "missing": True}
        reason, message = (None, None) if data is None else self._examine(data, island, lease, tokens)
        with self.decisions.deciding() as run:
            facts = {"file": file, "sha256": hashlib.sha256(data or b"").hexdigest(), "bytes": len(data or b"")}
            decision = say.contribute(
                run.rounds, self._terms(run), island, session, lease, trained, tokens, time.time(), reason,
                speaker=session, told=told, **facts,
            )  # fmt: skip
            self._decide(decision)
            pending = run.rounds.contributions.get(lease)
            if pending is not None and pending.facts["file"] == file and message is not None:
                self.messages[lease] = message
            elif pending is None or pending.facts["file"] != file:
                path.unlink(missing_ok=True)
        self._tell_change()
        return {**decision.answer, "missing": False}

    def _examine(self, data: bytes, island: str, lease: int, tokens: int) -> tuple[str | None, Message | None]:
        """Why a message cannot be used, if it cannot, and the message, if it is one."""
        run, version = self.decisions.run, self.version
        assert version is not None
        assert run.begun is not None
        try:
            message = decode(data)
        except ValueError as error:
            return f"island {island}: {error}", None
        held, header = run.rounds.leases.get(lease), message.header
        said = (header.kind, header.island, header.lease, header.tokens)
        if said != ("change", island, lease, tokens) or (held is not None and header.round != held.round):
            return f"island {island}: the message is not that of lease {lease}, but says {header}", None
        contribution = as_contribution(message)
        reference = {name: version.exact[name] for name in self._trained()}
        norms, most = version.state.known_norms(), self.config.aggregate.max_norm_ratio
        return refuse(contribution, reference, run.begun["base"], norms, most), message

    def result(self, have: int, wait_s: float = 0.0) -> Answer:
        """Wait up to `wait_s` seconds for a version after `have`.

        Returns:
            {"version": the current one, "change": whether `change-VERSION` leads to it from `have`; else
            `whole-VERSION` is to be fetched, "reset": parameters whose moments start from zero, "stop": the run is to
            end}.
        """

        def ask() -> tuple[Answer, bool]:
            self.decisions.catch_up()
            with self.decisions.memory:
                run, version = self.decisions.run, self.version
                now = version.state.round if version is not None else 0
                last = run.rounds.last
                reset = [] if last is None or now == have else last["facts"]["reset"]
                if now > have + 1 and self.config.aggregate.method == "svd":
                    # What the rounds between have reset is not kept in memory; anew is always right.
                    reset = self._trained()
                answer = {"version": now, "change": 0 <= have == now - 1, "reset": reset, "stop": run.stop is not None}
            return answer, now > have

        return self._wait(ask, wait_s)

    def evaluated(self, version: int, eval_loss: float) -> Answer:
        """The held-out loss of a version."""
        with self.decisions.deciding():
            self.decisions.decide("evaluated", version=version, eval_loss=eval_loss)
        self.report.metrics.write(version, eval_loss=eval_loss)
        return {}

    def leave(self, island: str, session: str, reason: str, told: Answer) -> Answer:
        """See `island_messages.leave`; `told` is all that the island has moved."""
        with self.decisions.deciding() as run:
            self.decisions.decide("island_told", island=island, session=session, told=told)
            self._decide(say.leave(run.rounds, self._terms(run), island, session, reason, time.time()))
        self._tell_change()
        return {}

    def island_ended(self, island: str, reason: str) -> Answer:
        """Whoever started an island knows that it is gone."""
        with self.decisions.deciding() as run:
            known = run.rounds.islands.get(island)
            if run.begun is not None and known is not None and known.present:
                self._decide(say.leave(run.rounds, self._terms(run), island, known.session, reason, time.time()))
        self._tell_change()
        return {}

    def status(self) -> Answer:
        """What a person wants to know of the run; see `coordinate.report.build`."""
        self.decisions.catch_up()
        with self.decisions.memory:
            status = report.build(self.info.run_id, self.decisions.run, Heard(None, []), [])
        return status | {"coordinator": {"rank": 0, **self.report.host}}

    # Files of the service

    def take(self, name: str, stream: BufferedIOBase, size: int) -> None:
        """Keep what an island sends.

        Raises:
            ValueError: it is too large to be one of its messages.
        """
        if self.version is not None:
            elements = sum(tensor.numel() for tensor in self.version.exact.values())
            if size > 5 * elements + (64 << 20):
                raise ValueError(f"{size} bytes are too many for a message of {elements} elements")
        take_contribution(self.run_dir, name, stream, size)

    def give(self, name: str) -> Path | None:
        """`change-VERSION` and `whole-VERSION` of the current version."""
        kind, _, number = name.partition("-")
        version, begun = self.version, self.decisions.run.begun
        if version is None or begun is None or number != str(version.state.round):
            return None
        if kind == "whole":
            return whole_message(self.run_dir, version, begun["base"])
        path = self.run_dir / ROUNDS / version.folder / CHANGE
        return path if kind == CHANGE and path.exists() else None

    # Rounds

    def run(self) -> None:
        """Close rounds until there is nothing left to train, or the run was stopped and all islands have left.

        Raises:
            UserError: the storage is full or cannot be written.
        """
        while True:
            seen = self.changes
            with self.decisions.deciding() as run:
                why = None
                if run.begun is not None:
                    terms = self._terms(run)
                    self._decide(say.tick(run.rounds, terms, time.time()))
                    why = run.rounds.due(terms, time.time())
                    collected = run.rounds.collect()
                    over = run.rounds.finished(terms.packs) or (run.stop is not None and not _anybody(run.rounds))
                    self.closing = run.rounds.round if why is not None else None
            if why is not None:
                self._close_round(why, collected)
                self.closing = None
                self._tell_change()
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
        terms, number = self._terms(run), run.rounds.round
        refused: dict[int, str] = {}
        contributions = []
        for one in collected:
            message = self._message_of(one)
            if isinstance(message, str):
                refused[one.lease] = message
            else:
                contributions.append(as_contribution(message, say.discount(run.rounds, terms, one)))
        reference = {name: before.exact[name] for name in self._trained()}
        most = self.config.aggregate.max_norm_ratio
        refused |= refuse_round(contributions, reference, begun["base"], before.state.known_norms(), most)
        counted = [one for one in contributions if one.lease not in refused]
        if not counted:
            with self.decisions.deciding() as run:
                for lease, reason in refused.items():
                    self._decide(say.reject(run.rounds, terms, lease, reason, time.time()))
            return
        outcome = outer_step(self.outer, before.state, before.exact, counted)
        following = write_version(
            self.run_dir, before, outcome.adapter, outcome.state, self._trained(), self.config.aggregate.exchange_bits,
            begun["base"], json.dumps(begun["adapter_config"], indent=2).encode(), begun["notes"],
        )  # fmt: skip
        by_lease = {one.lease: one for one in collected}
        facts = self.report.facts(
            number, [by_lease[one.lease] for one in counted], divergence([one.change for one in counted]), refused,
            before, following, time.monotonic() - started,
        )  # fmt: skip
        with self.decisions.deciding() as run:
            decision = say.commit(
                run.rounds, terms, number, [one.lease for one in counted], refused, why, time.time(),
                folder=following.folder, before=before.folder, sha256=following.sha256, reset=outcome.reset,
                lost=outcome.lost, **facts,
            )  # fmt: skip
            oldest = self._named_versions(run)[0]
            with self.decisions.memory:
                self._decide(decision)
                if decision.answer["committed"]:
                    self.version = following
        if not decision.answer["committed"]:
            # Another coordinator over this folder was faster.
            shutil.rmtree(self.run_dir / ROUNDS / following.folder, ignore_errors=True)
            raise RuntimeError(f"another coordinator has committed round {number} of {self.run_dir}")
        self._tell_change()
        self.report.committed(run.rounds)
        if oldest != before.folder:
            shutil.rmtree(self.run_dir / ROUNDS / oldest, ignore_errors=True)
        for lease in [lease for lease in by_lease if lease not in run.rounds.contributions]:
            self.messages.pop(lease, None)
            (self.run_dir / CONTRIBUTIONS / by_lease[lease].facts["file"]).unlink(missing_ok=True)
        self._write_status(at_once=True)

    def _message_of(self, contribution: Contribution) -> Message | str:
        """What was sent, or why it cannot be read again."""
        if contribution.lease in self.messages:
            return self.messages[contribution.lease]
        who = f"island {contribution.island}, round {contribution.round}:"
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
        self._tell_change()
        patience_s = self.config.aggregate.round_deadline_s
        while _anybody(self.decisions.run.rounds) and time.monotonic() < self.heard_time + patience_s:
            with self.changed:
                self.changed.wait(TICK_S)
            self.decisions.catch_up()
            self._write_status()
        with self.decisions.deciding() as run:
            summary = self.report.summary(run, self.run_dir)
            if run.finished is None:
                self.decisions.decide("finished", generation=None, step=run.rounds.round, summary=summary)
        self._write_status(at_once=True)

    # Small things

    def _begun(self, run: Run) -> Event:
        if run.begun is None:
            raise ValueError("an island says hello before it joins, and begins where nobody has")
        return run.begun

    def _terms(self, run: Run) -> Terms:
        aggregate = self.config.aggregate
        return Terms(
            packs=self._begun(run)["packs"], islands=aggregate.islands, quorum=aggregate.quorum,
            deadline_s=aggregate.round_deadline_s, start_timeout_s=self.config.launch.start_timeout_s,
            late_rounds=aggregate.late_rounds, late_discount=aggregate.late_discount,
            most_leases=aggregate.most_leases, overlap=aggregate.overlap,
        )  # fmt: skip

    def _trained(self) -> list[str]:
        """The names that islands train and exchange."""
        assert self.version is not None
        names = set(self.version.exact)
        return sorted(names - frozen_names(names, "A") if self.config.aggregate.freeze == "A" else names)

    def _decide(self, decision: Decision) -> None:
        for event in decision.events:
            self.decisions.decide(**event)

    def _tell_change(self) -> None:
        with self.changed:
            self.changes += 1
            self.changed.notify_all()

    def _wait(self, ask: Callable[[], tuple[Answer, bool]], wait_s: float) -> Answer:
        """Ask again whenever something has happened, until the second answer is True or the time is over."""
        deadline = time.monotonic() + min(wait_s, MOST_WAIT_S)
        while True:
            seen = self.changes
            answer, enough = ask()
            left_s = deadline - time.monotonic()
            if enough or left_s <= 0:
                return answer
            with self.changed:
                # A person's wish to stop is an event that another process has written.
                self.changed.wait_for(lambda seen=seen: self.changes != seen, min(left_s, 1.0))  # type: ignore[misc]

    def _write_status(self, at_once: bool = False) -> None:
        if not at_once and time.monotonic() - self.status_time < STATUS_EVERY_S:
            return
        self.status_time = time.monotonic()
        try:
            report.write(self.run_dir, self.status())
        except OSError as error:
            logger.warning("the status cannot be written: %s", error)


def _anybody(rounds: Rounds) -> bool:
    return any(island.present for island in rounds.islands.values())


def _packs_before(rounds: Rounds, round: int | None) -> int:
    """How many packs belong to rounds before `round`: where the learning rate's schedule stands."""
    if round is None:
        return 0
    open_: list[Lease | Contribution] = [*rounds.contributions.values(), *rounds.leases.values()]
    earlier = count(piece for one in open_ if one.round < round for piece in one.pieces)
    return count(rounds.trained) + count(rounds.dropped) + earlier
