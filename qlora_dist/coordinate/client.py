"""How workers and drivers talk to the coordinator, wherever it is hosted.

A transport is anything with `call(method, **arguments) -> dict`; the functions below are written on top of it.
"""

import contextlib
import http.client
import json
import secrets
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.state import Coordinator


class CoordinatorClient(Protocol):
    """A transport.

    `call` raises UserError as the coordinator raised it, and `Unreachable` where no answer came: the message may
    have been acted on or not.
    """

    def call(self, method: str, **arguments: Any) -> dict[str, Any]: ...


class Unreachable(ConnectionError):
    """The coordinator gave no answer."""


class CoordinatorError(RuntimeError):
    """The coordinator raised something that is no mistake of the person's."""


class Fenced(RuntimeError):
    """A newer generation has taken this one's place; the process is to end without touching anything."""


class DirectClient:
    """For the process that holds the coordinator."""

    def __init__(self, coordinator: Coordinator):
        self._coordinator = coordinator

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        # Through JSON, so that what works here works over every transport.
        arguments = json.loads(json.dumps(arguments))
        answer: dict[str, Any] = json.loads(json.dumps(self._coordinator.handle(method, **arguments)))
        return answer


class HttpClient:
    """For the service in `service.py`.

    Connections that fail are tried again with growing pauses; the service acts on a message once, however often it
    comes.

    Args:
        url: `http://HOST:PORT` or `https://HOST:PORT`.
        token: the service's secret.
        timeout_s: for one try.
        patience_s: for all tries of a call.
        before_again: called before each further try; raises where there is nobody to reach any more.

    Attributes:
        sent, received: bytes of all requests and answers so far, HTTP's own lines included.
    """

    def __init__(
        self, url: str, token: str, timeout_s: float = 120.0, patience_s: float = 300.0,
        before_again: Callable[[], None] | None = None,
    ):  # fmt: skip
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError("coordinator-address-form", url=url)
        self.url = url
        self._parts = parts
        self._token, self._timeout_s, self._patience_s = token, timeout_s, patience_s
        self._before_again = before_again
        self.sent = self.received = 0
        self._counting = threading.Lock()

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Send one message.

        Raises:
            UserError: the coordinator said so, or the token is wrong.
            CoordinatorError: anything else went wrong in the coordinator.
            Unreachable: no answer within `patience_s`.
        """
        message = {"method": method, "arguments": arguments, "request_id": secrets.token_hex(16)}
        status, answer = self._request("POST", "/call", json.dumps(message).encode(), method)
        return _read_answer(self.url, status, answer)

    def put_file(self, name: str, data: bytes) -> None:
        """Send a file; raises as `call`."""
        status, answer = self._request("PUT", f"/files/{name}", data, name)
        _read_answer(self.url, status, answer)

    def get_file(self, name: str) -> bytes | None:
        """Fetch a file, None where there is none of that name (any more); raises as `call`."""
        status, answer = self._request("GET", f"/files/{name}", None, name)
        if status == 404:
            return None
        if status != 200:
            _read_answer(self.url, status, answer)
        return answer

    def _request(self, verb: str, path: str, body: bytes | None, what: str) -> tuple[int, bytes]:
        deadline = time.monotonic() + self._patience_s
        pause_s = 0.1
        while True:
            try:
                status, answer = self._try(verb, path, body)
                # A gateway between here and the service says so when the service does not answer.
                if status not in (502, 503, 504):
                    return status, answer
                raise ConnectionError(f"answer {status}")
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() + pause_s > deadline:
                    raise Unreachable(
                        f"the coordinator at {self.url} gave no answer to {what} for {self._patience_s:.0f} s: "
                        f"{error or type(error).__name__}"
                    ) from error
            if self._before_again is not None:
                # Storage may be away for a moment, too.
                with contextlib.suppress(OSError):
                    self._before_again()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 5.0)

    def _try(self, verb: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        parts = self._parts
        kind = _HttpsConnection if parts.scheme == "https" else _HttpConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self._timeout_s)
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            connection.request(verb, parts.path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
            answer = response.read()
            head = len(f"HTTP/1.1 {response.status} {response.reason}") + 4
            head += sum(len(name) + len(value) + 4 for name, value in response.getheaders())
            with self._counting:
                self.received += head + len(answer)
            return response.status, answer
        finally:
            with self._counting:
                self.sent += connection.sent
            connection.close()


class _HttpConnection(http.client.HTTPConnection):
    """Counts the bytes that it sends."""

    sent = 0

    def send(self, data: Any) -> None:
        super().send(data)
        self.sent += len(data)


class _HttpsConnection(http.client.HTTPSConnection):
    """Counts the bytes that it sends, before they are encrypted."""

    sent = 0

    def send(self, data: Any) -> None:
        super().send(data)
        self.sent += len(data)


def _read_answer(url: str, status: int, body: bytes) -> dict[str, Any]:
    if status == 401:
        raise UserError("coordinator-token", url=url)
    try:
        answer = json.loads(body)
    except ValueError:
        raise Unreachable(f"what answers at {url} is no coordinator ({status}): {body[:200]!r}") from None
    if status == 200:
        return dict(answer)
    if answer.get("kind") == "user":
        raise UserError.from_dict(answer["error"])
    raise CoordinatorError(f"the coordinator at {url} answered {status}: {answer.get('error')}")


def join_and_wait(
    client: CoordinatorClient, attempt: str, rank: int, world_size: int, host: str, pid: int, timeout_s: float
) -> int:
    """Join with the group `attempt` and wait until it is complete; return its generation number.

    Raises:
        Fenced: another group has taken its place.
        TimeoutError: the group was not complete within `timeout_s` seconds; the message says who is there.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        answer = client.call("join", attempt=attempt, rank=rank, world_size=world_size, host=host, pid=pid)
        if answer["refused"] is not None:
            raise Fenced(answer["refused"])
        if answer["generation"] is not None:
            return int(answer["generation"])
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, answer["joined"]))
            raise TimeoutError(f"after {timeout_s:.0f} s only ranks {ranks} of {world_size} workers have joined")
        time.sleep(0.1)


def commit(
    client: CoordinatorClient,
    generation: int,
    step: int,
    folder: str,
    files: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, Any],
) -> str:
    """Commit a written folder; return the committed folder's name.

    Raises:
        Fenced: a newer generation has taken this one's place.
        CoordinatorError: the folder is not complete.
    """
    fields = {"folder": folder, "files": dict(files), "metrics": dict(metrics)}
    answer = client.call("commit", generation=generation, step=step, **fields)
    if answer["fenced"]:
        raise Fenced(answer["reason"])
    if not answer["committed"]:
        raise CoordinatorError(answer["reason"])
    return str(answer["folder"])
