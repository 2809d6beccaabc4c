"""The coordinator of islands: what they say to it, and the files that go over its service."""

import hashlib
import inspect
import json
import math
import re
import time
from collections.abc import Callable
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch

from qlora_dist.aggregate.exchange import Message, as_contribution, decode
from qlora_dist.aggregate.outer import OuterState
from qlora_dist.aggregate.outer_loop import OuterLoop, packs_in_all
from qlora_dist.aggregate.round_files import (
    CHANGE,
    ROUNDS,
    contribution_path,
    digest,
    take_contribution,
    whole_message,
    write_version,
)
from qlora_dist.aggregate.round_report import check_session_told, check_told
from qlora_dist.aggregate.safety import refuse
from qlora_dist.config.errors import UserError
from qlora_dist.coordinate import island_messages as say
from qlora_dist.coordinate.island_messages import Decision
from qlora_dist.coordinate.ranges import count
from qlora_dist.coordinate.replay import Run
from qlora_dist.coordinate.rounds import Contribution, Lease, Rounds

Answer = dict[str, Any]
MESSAGES = frozenset(
    {"hello", "begin", "join", "lease", "contribute", "result", "evaluated", "leave", "island_ended", "status"}
)
# The longest that an answer is held back for something to happen.
MOST_WAIT_S = 20.0
# After which another island is asked for the adapter to start from.
BEGINNER_S = 120.0
# Of what an island trains with, what may differ from the others'.
OWN = {"train.global_batch_size"}
# Beyond what any run has; before it has begun nobody knows its adapter's size.
MOST_START_BYTES = 32 << 30
MOST_PACKS = 1 << 40
MOST_TOKENS = 1 << 50
MOST_BATCH = 1 << 16


class OuterCoordinator(OuterLoop):
    """One method a message; arguments and answers are JSON. Any number of threads may call it; one runs `run`."""

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
                    raise UserError(
                        "island-differs", setting=name, theirs=_shown(value), own=_shown(identity.get(name))
                    )
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
                path = contribution_path(self.run_dir, what["file"])
                if not path.exists():
                    return {"begun": False, "send": True}
                self._begin(run, start, path.read_bytes(), **what)
                path.unlink(missing_ok=True)
            begun, now = run.begun is not None, time.monotonic()
            send = not begun and (self.beginner[0] == island or now > self.beginner[1] + BEGINNER_S)
            if send and self.beginner[0] != island:
                self.beginner = (island, now)
        self.tell_change()
        return {"begun": begun, "send": send}

    def _begin(
        self, run: Run, start: str, data: bytes, file: str, zeros: dict[str, list[int]], identity: dict[str, Any],
        num_packs: int, adapter_config: str, compute: str,
    ) -> None:  # fmt: skip
        _check_number("num_packs", num_packs, MOST_PACKS)
        sizes = [size for shape in zeros.values() for size in shape]
        if any(type(size) is not int or size < 0 for size in sizes):
            raise ValueError("a shape in zeros is wrong")
        _check_number("the size of zeros", 1 + sum(map(math.prod, zeros.values())), MOST_START_BYTES // 4)
        message = decode(data)
        base = message.header.base
        adapter = message.tensors | {name: torch.zeros(shape) for name, shape in zeros.items()}
        if message.header.kind != "adapter" or message.bits != 32 or digest(adapter) != start:
            raise ValueError("islands begin with a whole adapter of 32 bits, which is what its digest says")
        notes = {"base": base, "compute": compute}
        config_json = json.dumps(json.loads(adapter_config), indent=2).encode()
        version = write_version(self.run_dir, None, adapter, OuterState(), (), 32, base, config_json, notes)
        batch = self.config.aggregate.islands * self.config.global_batch_size
        packs = packs_in_all(self.config, num_packs)
        with self.decisions.memory:
            self.version = version
            begun = self.decisions.decide(
                "islands_begun", base=base, identity=identity, num_packs=num_packs, packs=packs, start=start,
                total_steps=math.ceil(packs / batch), adapter_config=json.loads(adapter_config), notes=notes,
                folder=version.folder, sha256=version.sha256,
                parameters=sum(version.exact[name].numel() for name in self.trained_names()),
            )  # fmt: skip
        self.report.begin(begun, run.rounds)

    def join(self, island: str, session: str, facts: dict[str, Any]) -> Answer:
        """See `island_messages.join`; also {"packs", "num_packs", "total_steps", "islands", "start"}: of the run."""
        with self.decisions.deciding() as run:
            begun = self.begun(run)
            decision = say.join(run.rounds, self.terms(run), island, session, time.time(), **facts)
            self.decide(decision)
        self.tell_change()
        told = {key: begun[key] for key in ("packs", "num_packs", "total_steps", "start")}
        return {**decision.answer, **told, "islands": self.config.aggregate.islands}

    def lease(self, island: str, session: str, packs: int, sending: int | None = None, wait_s: float = 0.0) -> Answer:
        """See `island_messages.lease`; waits up to `wait_s` seconds for one.

        Returns:
            Its answer, with {"stop": the run is to end, "before": how many packs earlier rounds took, "present": how
            many islands there are, "evaluates": whether it is this island's to measure held-out losses}.
        """
        _check_number("packs", packs, MOST_BATCH * self.config.aggregate.sync_every)

        def ask() -> tuple[Answer, bool]:
            with self.decisions.deciding() as run:
                terms = self.terms(run)
                stop = run.stop is not None and not run.rounds.finished(terms.packs)
                if stop:
                    answer: Answer = {"lease": None, "version": run.rounds.round, "done": False, "wait": None}
                    answer |= {"round": None, "ranges": [], "refused": None, "seconds_left": None}
                else:
                    decision = say.lease(run.rounds, terms, island, session, packs, time.time(), sending)
                    if self.closing == decision.answer["round"] and decision.events:
                        # What is leased for a round that is being closed would come too late for it.
                        decision = Decision([], decision.answer | {"lease": None, "round": None, "ranges": []})
                    self.decide(decision)
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
        path = contribution_path(self.run_dir, file)
        _check_number("tokens", tokens, MOST_TOKENS, least=0)
        with self.decisions.memory:
            known = lease in self.decisions.run.rounds.contributions or lease in self.decisions.run.rounds.counted
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            # Never sent, or counted meanwhile.
            data = None
        if data is None and not known:
            return {"accepted": False, "reason": None, "round": None, "missing": True}
        reason, message = (None, None) if data is None else self._examine(data, island, lease, tokens)
        try:
            check_told(told)
        except ValueError as error:
            reason = reason or f"island {island}: {error}"
        with self.decisions.deciding() as run:
            if not known and not path.exists():
                # It lay there for so long that it was removed meanwhile.
                return {"accepted": False, "reason": None, "round": None, "missing": True}
            facts = {"file": file, "sha256": hashlib.sha256(data or b"").hexdigest(), "bytes": len(data or b"")}
            decision = say.contribute(
                run.rounds, self.terms(run), island, session, lease, trained, tokens, time.time(), reason,
                speaker=session, told=told, **facts,
            )  # fmt: skip
            self.decide(decision)
            pending = run.rounds.contributions.get(lease)
            if pending is not None and pending.facts["file"] == file and message is not None:
                self.messages[lease] = message
            elif pending is None or pending.facts["file"] != file:
                path.unlink(missing_ok=True)
        self.tell_change()
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
        reference = {name: version.exact[name] for name in self.trained_names()}
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
                    reset = self.trained_names()
                answer = {"version": now, "change": 0 <= have == now - 1, "reset": reset, "stop": run.stop is not None}
            return answer, now > have

        return self._wait(ask, wait_s)

    def evaluated(self, version: int, eval_loss: float) -> Answer:
        """The held-out loss of a version."""
        version, eval_loss = int(version), float(eval_loss)
        if math.isfinite(eval_loss):
            with self.decisions.deciding():
                self.decisions.decide("evaluated", version=version, eval_loss=eval_loss)
        self.report.metrics.write(version, eval_loss=eval_loss)
        return {}

    def leave(self, island: str, session: str, reason: str, told: Answer) -> Answer:
        """See `island_messages.leave`; `told` is all that the island has moved."""
        check_session_told(told)
        with self.decisions.deciding() as run:
            self.decisions.decide("island_told", island=island, session=session, told=told)
            self.decide(say.leave(run.rounds, self.terms(run), island, session, reason, time.time()))
        self.tell_change()
        return {}

    def island_ended(self, island: str, reason: str) -> Answer:
        """Whoever started an island knows that it is gone."""
        with self.decisions.deciding() as run:
            known = run.rounds.islands.get(island)
            if run.begun is not None and known is not None and known.present:
                self.decide(say.leave(run.rounds, self.terms(run), island, known.session, reason, time.time()))
        self.tell_change()
        return {}

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
        elif size > MOST_START_BYTES:
            raise ValueError(f"{size} bytes are too many for an adapter to start from")
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


def _check_number(name: str, value: Any, most: int, least: int = 1) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is to be a number from {least} to {most}, not {str(value)[:40]}")


def _packs_before(rounds: Rounds, round: int | None) -> int:
    """How many packs belong to rounds before `round`: where the learning rate's schedule stands."""
    if round is None:
        return 0
    open_: list[Lease | Contribution] = [*rounds.contributions.values(), *rounds.leases.values()]
    earlier = count(piece for one in open_ if one.round < round for piece in one.pieces)
    return count(rounds.trained) + count(rounds.dropped) + earlier


def _shown(value: Any) -> Any:
    """A setting for people: enough of a fingerprint to tell two apart."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value
