"""The coordinator as a small HTTP service, for islands on different clusters and for launchers without Ray.

One request: `POST /call` with `Authorization: Bearer TOKEN` and
`{"method": ..., "arguments": {...}, "request_id": ...}`; the answer is the coordinator's, or {"error", "kind"}.
A coordinator that takes and gives files has them at `/files/NAME`, by PUT and GET.
"""

import contextlib
import hmac
import json
import logging
import os
import re
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Protocol

from qlora_dist.config.errors import UserError

logger = logging.getLogger(__name__)
MAX_BODY_BYTES = 4 << 20
REMEMBERED_REQUESTS = 1024
# Messages that are not to be acted on twice; the others do no harm when they come again.
ONCE = frozenset({"start_job", "commit", "fail", "finish", "request_stop", "should_restart", "note"})
SOCKET_TIMEOUT_S = 30.0
# A refused body is read to its end, so that whoever sends it comes to read why, but not for longer than this.
REFUSED_BODY_S = 300.0
FILES = "/files/"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
Reply = tuple[int, dict[str, Any]]


class Answers(Protocol):
    """What a service serves: `coordinate.state.Coordinator` and others."""

    def handle(self, method: str, **kwargs: Any) -> dict[str, Any]: ...


class Files(Protocol):
    """Files that go over the service, too.

    `take` reads `size` bytes of a file from a stream and keeps them; it raises ValueError where it does not take it.
    `give` names a file to send, None where there is none of that name.
    """

    def take(self, name: str, stream: BufferedIOBase, size: int) -> None: ...

    def give(self, name: str) -> Path | None: ...


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class CoordinatorService:
    """Serves a coordinator from a daemon thread until `stop`.

    Args:
        token: the secret that every request must carry; not empty.
        port: 0 for a free one; `url` then tells it.
        files: what is at `/files/`; nothing where None.

    Raises:
        OSError: the address cannot be bound.
    """

    def __init__(
        self, coordinator: Answers, token: str, host: str = "127.0.0.1", port: int = 0, files: Files | None = None
    ):
        if not token:
            raise ValueError("a service without a token would obey anybody")
        self._coordinator = coordinator
        self._token = token.encode()
        self._files = files
        # A message that comes again (its answer got lost) gets the same answer and is not acted on again.
        self._requests: OrderedDict[str, Future[Reply]] = OrderedDict()
        self._guard = threading.Lock()
        service = self

        class Handler(_Handler):
            def answer(self) -> Reply:
                return service._answer(self)

            def take_file(self) -> Reply:
                return service._take_file(self)

            def give_file(self) -> Path | Reply:
                return service._give_file(self)

        self._server = _Server((host, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Where clients on this host reach it."""
        return f"http://{self._server.server_address[0]!s}:{self.port}"

    def stop(self, timeout_s: float = 30.0) -> None:
        """Take no more requests, wait for those under way, close the socket."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout_s)
        with self._guard:
            under_way = [future for future in self._requests.values() if not future.done()]
        wait(under_way, timeout_s)

    def _stranger(self, request: "_Handler") -> Reply | None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self._token):
            return 401, {"error": "wrong or missing token"}
        return None

    def _file_name(self, request: "_Handler") -> str | Reply:
        if (stranger := self._stranger(request)) is not None:
            return stranger
        name = request.path.removeprefix(FILES)
        if self._files is None or not request.path.startswith(FILES) or not FILE_NAME.fullmatch(name):
            return 404, {"error": "there is no such file here"}
        return name

    def _take_file(self, request: "_Handler") -> Reply:
        name = self._file_name(request)
        if not isinstance(name, str):
            return name
        assert self._files is not None
        length = request.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            return 411, {"error": "Content-Length is needed"}
        try:
            self._files.take(name, request.body, int(length))
        except UserError as error:
            return 422, {"error": error.to_dict(), "kind": "user"}
        except ValueError as error:
            return 400, {"error": f"{name}: {error}", "kind": "error"}
        return 200, {}

    def _give_file(self, request: "_Handler") -> Path | Reply:
        name = self._file_name(request)
        if not isinstance(name, str):
            return name
        assert self._files is not None
        return self._files.give(name) or (404, {"error": f"{name} is not here (any more)", "kind": "error"})

    def _answer(self, request: "_Handler") -> Reply:
        """Check the request, then act on it."""
        if (stranger := self._stranger(request)) is not None:
            return stranger
        if request.path != "/call":
            return 404, {"error": "only /call is here"}
        if request.headers.get_content_type() != "application/json":
            return 415, {"error": "only application/json is taken"}
        length = request.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            return 411, {"error": "Content-Length is needed"}
        if int(length) > MAX_BODY_BYTES:
            return 413, {"error": f"more than {MAX_BODY_BYTES} bytes"}
        try:
            message = json.loads(request.body.read(int(length)))
            method, arguments, request_id = message["method"], message["arguments"], message.get("request_id")
            if not isinstance(method, str) or not isinstance(arguments, dict):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            return 400, {"error": "not a message: method and arguments are needed"}
        if request_id and method in ONCE:
            return self._once(str(request_id), method, arguments)
        return self._act(method, arguments)

    def _once(self, request_id: str, method: str, arguments: dict[str, Any]) -> Reply:
        with self._guard:
            future = self._requests.get(request_id)
            mine = future is None
            if future is None:
                future = self._requests[request_id] = Future()
                while len(self._requests) > REMEMBERED_REQUESTS:
                    self._requests.popitem(last=False)
        if mine:
            future.set_result(self._act(method, arguments))
        return future.result()

    def _act(self, method: str, arguments: dict[str, Any]) -> Reply:
        try:
            return 200, self._coordinator.handle(method, **arguments)
        except UserError as error:
            return 422, {"error": error.to_dict(), "kind": "user"}
        except ValueError as error:
            return 400, {"error": f"{method}: {error}", "kind": "error"}
        except Exception as error:
            # The caller gets one line and raises; the traceback belongs where the fault is.
            logger.exception("%s failed", method)
            return 500, {"error": f"{method}: {type(error).__name__}: {error}", "kind": "error"}


class _Body(BufferedIOBase):
    """A request's body: reads no further than its end."""

    def __init__(self, stream: BufferedIOBase, size: int):
        self._stream, self._left = stream, size

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = self._left if size is None or size < 0 else min(size, self._left)
        data = self._stream.read(wanted) if wanted else b""
        self._left -= len(data)
        return data

    def skip(self) -> None:
        """Read what is left, and forget it."""
        deadline = time.monotonic() + REFUSED_BODY_S
        while self._left and time.monotonic() < deadline:
            # What is there, and not all of a piece: whoever sends a byte now and then is not waited for any longer.
            data = self._stream.read1(min(self._left, 1 << 20))
            self._left = self._left - len(data) if data else 0


class _Handler(BaseHTTPRequestHandler):
    """A request; the service that it is for says, in a subclass of its own, what it is answered."""

    timeout = SOCKET_TIMEOUT_S
    server_version = "qlora-dist"
    sys_version = ""
    body: _Body

    def answer(self) -> Reply:
        raise NotImplementedError

    def take_file(self) -> Reply:
        raise NotImplementedError

    def give_file(self) -> Path | Reply:
        raise NotImplementedError

    def do_POST(self) -> None:
        self._reply(self.answer)

    def do_PUT(self) -> None:
        self._reply(self.take_file)

    def do_GET(self) -> None:
        found = self.give_file()
        if not isinstance(found, Path):
            self._reply(lambda: found)
            return
        # Opened before the headers are sent: what is removed meanwhile can still be read.
        with found.open("rb") as file:
            self._head(200, "application/octet-stream", os.fstat(file.fileno()).st_size)
            shutil.copyfileobj(file, self.wfile, 1 << 20)

    def _reply(self, act: Callable[[], Reply]) -> None:
        started = time.monotonic()
        length = self.headers.get("Content-Length", "")
        self.body = _Body(self.rfile, int(length) if length.isascii() and length.isdigit() else 0)
        status, answer = act()
        body = json.dumps(answer).encode()
        self._head(status, "application/json", len(body))
        self.wfile.write(body)
        with contextlib.suppress(OSError):  # whoever has read the answer may be gone
            self.body.skip()
        logger.debug("%s %s %d %.3f s", self.client_address[0], self.path, status, time.monotonic() - started)

    def _head(self, status: int, kind: str, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
