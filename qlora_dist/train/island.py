"""An island's side of the rounds: what its first worker says to the coordinator, and the exchange of a round."""

import secrets
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qlora_dist.aggregate.changes import Tensors, apply_change
from qlora_dist.aggregate.exchange import Bits, Encoder, Header, decode, encode
from qlora_dist.aggregate.round_files import digest
from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.client import HttpClient, Unreachable

# An answer is held back so long at most, so that a question which nobody waits for any more soon ends.
WAIT_S = 5.0
BEGIN_POLL_S = 0.5


@dataclass(frozen=True)
class Received:
    """An adapter from the coordinator, and what it says of moments.

    Attributes:
        version: rounds that are in it.
        shared: PEFT's names; those that train, at least.
        reset: parameters whose moments start from zero.
    """

    version: int
    shared: Tensors
    reset: list[str]


@dataclass
class Told:
    """What an island measures of a lease, in the words of the coordinator's report."""

    steps: int = 0
    loss: float = 0.0
    first_loss: float = 0.0
    last_loss: float = 0.0
    seconds_per_step: float = 0.0
    exchange_seconds: float = 0.0
    exposed_seconds: float = 0.0
    eval_loss_before: float | None = None


class Exchange:
    """One contribution on its way, and the adapter that comes back; both in a thread of its own.

    Attributes:
        sent: done when the coordinator has answered: whether it counts the contribution.
        received: done when the adapter is here.
        seconds: how long it all took, once it is done.
        refused: why the coordinator does not count the contribution, once `sent` is done.
    """

    def __init__(self) -> None:
        self.sent: Future[bool] = Future()
        self.received: Future[Received] = Future()
        self.given_up = threading.Event()
        self.started, self.seconds = time.monotonic(), 0.0
        self.refused: str | None = None


@dataclass
class Island:
    """A session with the coordinator of islands: one process of one island; its first worker has it.

    Attributes:
        version: of the adapter that the island goes on from, `shared`.
        encoder: keeps what rounding left out of its messages.
        session_steps: optimizer steps of this session.
        joined: the coordinator may know of this session.
        leaving: the island has given up on what it still asks for in another thread.
    """

    client: HttpClient
    name: str
    base: str
    device: torch.device
    version: int = -1
    shared: Tensors = field(default_factory=dict)
    encoder: Encoder = field(default_factory=lambda: Encoder(32))
    session: str = field(default_factory=lambda: secrets.token_hex(8))
    session_steps: int = 0
    joined: bool = False
    leaving: bool = False
    told_bytes: tuple[int, int] = (0, 0)

    def hello(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Introduce the island; see `OuterCoordinator.hello`."""
        return self.client.call("hello", identity=identity)

    def begin(
        self, adapter: Mapping[str, Tensor], identity: dict[str, Any], num_packs: int, config: bytes, compute: str
    ) -> None:
        """Offer what all islands start from, and wait until there is something.

        Raises:
            UserError: what has begun is another training than this island's.
        """
        start = digest(adapter)
        zeros = {name: list(tensor.shape) for name, tensor in adapter.items() if not bool(tensor.any())}
        answer = self.client.call("begin", island=self.name, start=start)
        while not answer["begun"] and not self.leaving:
            what: dict[str, Any] = {}
            if answer["send"]:
                parts = {name: tensor for name, tensor in adapter.items() if name not in zeros}
                data = encode(parts, Header("adapter", self.name, 0, 0, 0, self.base), 32)
                what = {"file": self._send(data, "start"), "zeros": zeros, "identity": identity}
                what |= {"num_packs": num_packs, "adapter_config": config.decode(), "compute": compute}
            else:
                time.sleep(BEGIN_POLL_S)
            answer = self.client.call("begin", island=self.name, start=start, **what)
        # At the first hello there may have been nothing yet to differ from.
        self.hello(identity)

    def join(self, bits: Bits, adapter: Mapping[str, Tensor], **facts: Any) -> dict[str, Any]:
        """Join as a new session; see `OuterCoordinator.join`.

        Args:
            adapter: the island's own, which need not be fetched where it is what all start from.
        """
        self.encoder = Encoder(bits)
        self.joined = not self.leaving
        if self.leaving:
            return {}
        answer = self.client.call("join", island=self.name, session=self.session, facts=facts)
        if answer["version"] == 0 and answer["start"] == digest(adapter):
            self.version, self.shared = 0, dict(adapter)
        return answer

    def lease(self, packs: int, sending: int | None) -> dict[str, Any]:
        """Ask for packs, waiting a little for them; see `OuterCoordinator.lease`.

        Raises:
            UserError: another process speaks for this island.
        """
        arguments = {"island": self.name, "session": self.session, "packs": packs, "sending": sending}
        answer = self.client.call("lease", **arguments, wait_s=WAIT_S)
        if answer["refused"] is not None and not self.leaving:
            if "another process" in answer["refused"]:
                raise UserError("island-taken-over", island=self.name)
            # It was given up while it was paused.
            self.client.call("join", island=self.name, session=self.session, facts={})
            answer = self.client.call("lease", **arguments, wait_s=WAIT_S)
        return answer

    def fetch(self, moments_of: int | None = None) -> Received | None:
        """The current version, where it is newer than this island's.

        Args:
            moments_of: the version that the optimizer's moments belong to, where that is another one.
        """
        answer = self.client.call("result", have=self.version)
        if answer["version"] <= self.version:
            return None
        received = self._fetch(answer)
        if moments_of is None:
            return received
        return replace(received, reset=self.client.call("result", have=moments_of)["reset"])

    def _fetch(self, answer: dict[str, Any]) -> Received:
        while True:
            version = answer["version"]
            data = self.client.get_file(f"{'change' if answer['change'] else 'whole'}-{version}")
            if data is not None:
                break
            # A newer one has taken its place meanwhile.
            answer = self.client.call("result", have=self.version)
        message = decode(data)
        if message.header.kind == "change":
            return Received(version, apply_change(self.shared, message.tensors), answer["reset"])
        return Received(version, {**self.shared, **message.tensors}, answer["reset"])

    def take(self, received: Received) -> None:
        """Go on from what was received."""
        self.version, self.shared = received.version, received.shared
        self.encoder.forget(received.reset)

    def exchange(
        self, lease: dict[str, Any], change: Tensors, trained: list[list[int]], tokens: int, told: Told
    ) -> Exchange:
        """Start the exchange of a round: send `change`, wait for the round's end, fetch the adapter."""
        under_way = Exchange()
        self.session_steps += told.steps
        arguments = (under_way, lease, change, trained, tokens, told, self.session_steps)
        threading.Thread(target=self._exchange, args=arguments, name="exchange", daemon=True).start()
        return under_way

    def _exchange(
        self, under_way: Exchange, lease: dict[str, Any], change: Tensors, trained: list[list[int]], tokens: int,
        told: Told, session_steps: int,
    ) -> None:  # fmt: skip
        try:
            counts, under_way.refused = self._contribute(lease, change, trained, tokens, told, session_steps)
            under_way.sent.set_result(counts is not None)
            if counts is not None and counts > lease["round"]:
                # It was late. The others are at work for the round that counts it, and would wait for this island.
                counts = None
            # Refused or late, the island goes on from the adapter there is, which may be the one that it has.
            have, wait_s = (self.version, 0.0) if counts is None else (counts, WAIT_S)
            while not under_way.given_up.is_set():
                answer = self.client.call("result", have=have, wait_s=wait_s)
                if answer["version"] > have:
                    answer = answer if have == self.version else self.client.call("result", have=self.version)
                    received = self._fetch(answer)
                elif counts is None:
                    received = Received(self.version, self.shared, [])
                else:
                    continue
                under_way.seconds = time.monotonic() - under_way.started
                under_way.received.set_result(received)
                return
        except BaseException as error:  # raised in the trainer's thread
            for future in (under_way.sent, under_way.received):
                if not future.done():
                    future.set_exception(error)

    def _contribute(
        self, lease: dict[str, Any], change: Tensors, trained: list[list[int]], tokens: int, told: Told, steps: int
    ) -> tuple[int | None, str | None]:
        """Send a contribution; the round that counts it, or None and why none does."""
        header = Header("change", self.name, lease["round"], lease["lease"], tokens, self.base)
        data, _ = self.encoder.encode(change, header, self.device)
        while True:
            file = self._send(data, str(lease["lease"]))
            sent, received = self.client.sent, self.client.received
            numbers = {
                **vars(told),
                "bytes_sent": sent - self.told_bytes[0], "bytes_received": received - self.told_bytes[1],
                **self._all_told(steps),
            }  # fmt: skip
            answer = self.client.call(
                "contribute", island=self.name, session=self.session, lease=lease["lease"], trained=trained,
                tokens=tokens, file=file, told=numbers,
            )  # fmt: skip
            if not answer["missing"]:
                break
        self.told_bytes = sent, received
        return (int(answer["round"]), None) if answer["accepted"] else (None, answer["reason"])

    def _send(self, data: bytes, name: str) -> str:
        file = f"{name}-{secrets.token_hex(6)}"
        self.client.put_file(file, data)
        return file

    def _all_told(self, steps: int) -> dict[str, int]:
        sent, received = self.client.sent, self.client.received
        return {"session_bytes_sent": sent, "session_bytes_received": received, "session_steps": steps}

    def evaluated(self, version: int, eval_loss: float) -> bool:
        """Report the held-out loss of a version; False where there is no coordinator any more."""
        return self._told("evaluated", version=version, eval_loss=eval_loss)

    def leave(self, reason: str) -> bool:
        """Say that the island ends; False where there is no coordinator any more to hear it."""
        self.leaving = True
        if not self.joined:
            return True
        told = self._all_told(self.session_steps)
        return self._told("leave", island=self.name, session=self.session, reason=reason, told=told)

    def _told(self, method: str, **arguments: Any) -> bool:
        try:
            self.client.call(method, **arguments)
        except Unreachable:
            return False
        except UserError as error:
            if error.code != "islands-done":
                raise
            return False
        return True
