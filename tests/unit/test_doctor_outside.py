"""`qlora-dist doctor`: what W&B's server and the hub answer."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from qlora_dist.cluster.doctor import outside
from qlora_dist.cluster.doctor.wanted import Wanted
from tests.unit.doctor_facts import Facts


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """Answers what its `reply` says: (status, headers, body, seconds)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body, seconds = self.server.reply  # type: ignore[attr-defined]
            time.sleep(seconds)
            self.server.asked.append(self.headers.get("Authorization"))  # type: ignore[attr-defined]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ((200, {}, '{"data": {"viewer": {"username": "me"}}}', 0), {"answer": "accepted", "user": "me"}),
        ((200, {}, '{"data": {"viewer": null}}', 0), {"answer": "refused"}),
        ((401, {}, "", 0), {"answer": "refused"}),
        ((502, {}, "", 0), {"error": "it answers with status 502"}),
    ],
)
def test_wandb_is_asked_with_the_key(server: Any, monkeypatch: pytest.MonkeyPatch, reply: Any, expected: Facts) -> None:
    server.reply = reply
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    found = outside.wandb_facts("online")
    assert expected.items() <= found.items()
    assert server.asked[0].startswith("Basic ")
    assert "k" * 40 not in json.dumps(found)


def test_a_server_that_does_not_answer_is_waited_for_so_long_only(server: Any) -> None:
    begun = time.monotonic()
    found = outside.in_time(lambda: time.sleep(20) or {}, 0.2)
    assert found["error"] == "no answer within 0 s"
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ((200, {}, '{"id": "a/b", "siblings": [{"rfilename": "m.safetensors", "size": 7}]}', 0),
         {"answer": "there", "bytes": 7}),
        ((403, {"X-Error-Code": "GatedRepo"}, "{}", 0), {"answer": "gated"}),
        ((404, {"X-Error-Code": "RepoNotFound"}, "{}", 0), {"answer": "no such model"}),
        ((404, {"X-Error-Code": "RevisionNotFound"}, "{}", 0), {"answer": "no such revision"}),
    ],
)  # fmt: skip
def test_the_hub_is_asked_for_the_model(
    server: Any, monkeypatch: pytest.MonkeyPatch, reply: Any, expected: Facts
) -> None:
    from huggingface_hub import HfApi, constants

    server.reply = reply
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert HfApi().endpoint == address
    assert expected.items() <= outside.hub_facts(Wanted("/r", hub="a/b", revision="main")).items()
