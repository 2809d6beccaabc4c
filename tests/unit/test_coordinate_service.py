"""The HTTP service, with real sockets."""

import http.client
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_dist.config.errors import UserError
from qlora_dist.coordinate.client import CoordinatorError, HttpClient, Unreachable, join_and_wait
from qlora_dist.coordinate.log import EventLog
from qlora_dist.coordinate.rundir import open_run
from qlora_dist.coordinate.service import MAX_BODY_BYTES, CoordinatorService
from qlora_dist.coordinate.state import Coordinator

TOKEN = "correct horse"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[CoordinatorService]:
    open_run(tmp_path / "run", "")
    service = CoordinatorService(Coordinator(tmp_path / "run"), TOKEN)
    yield service
    service.stop()


def post(service: CoordinatorService, body: bytes, path: str = "/call", **headers: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=10)
    fields = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    connection.request("POST", path, body, {**fields, **{k.replace("_", "-"): v for k, v in headers.items()}})
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def test_only_the_right_token_is_obeyed(service: CoordinatorService, tmp_path: Path) -> None:
    body = json.dumps({"method": "note", "arguments": {"kind": "hello"}}).encode()
    for wrong in ("Bearer wrong", "Bearer ", "Basic " + TOKEN, "Bearer " + TOKEN + "x", "Bearer \u00e9"):
        assert post(service, body, Authorization=wrong)[0] == 401
    with pytest.raises(UserError, match="refuses the token"):
        HttpClient(service.url, "wrong").call("status")
    assert [e["kind"] for e in EventLog(tmp_path / "run" / "events.jsonl").read_new()] == ["opened"]
    assert post(service, body)[0] == 200
    with pytest.raises(ValueError, match="token"):
        CoordinatorService(Coordinator(tmp_path / "run"), "")


def test_what_a_person_can_mend_arrives_as_it_was_raised(service: CoordinatorService, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"^output_dir .*/run: .*/run is a file where .*; remove it") as told:
        HttpClient(service.url, TOKEN).call("request_stop", reason="enough")
    assert told.value.code == "run-folder-is-file"
    assert told.value.facts["folder"] == str(tmp_path / "run")


def test_only_messages_are_taken(service: CoordinatorService) -> None:
    body = json.dumps({"method": "status", "arguments": {}}).encode()
    assert post(service, body, path="/other")[0] == 404
    assert post(service, body, Content_Type="text/plain")[0] == 415
    for bad in (b"{", b"[]", b'"x"', b'{"method": 1, "arguments": {}}', b'{"method": "status"}', b"\xff"):
        assert post(service, bad)[0] == 400
    assert post(service, b'{"method": "run_dir", "arguments": {}}')[0] == 400
    assert post(service, b'{"method": "join", "arguments": {"x": 1}}')[0] == 400
    assert post(service, b"", Content_Length=str(MAX_BODY_BYTES + 1))[0] == 413
    assert post(service, b"", Content_Length="-1")[0] == 411
    assert post(service, body)[1]["state"] == "starting"


def test_eight_clients_at_once_form_one_group(service: CoordinatorService) -> None:
    results: list[tuple[int, int]] = []

    def work(rank: int) -> None:
        client = HttpClient(service.url, TOKEN)
        generation = join_and_wait(client, "group", rank, 8, "a", 100 + rank, 20.0)
        beats = [client.call("heartbeat", generation=1, rank=rank, step=n, phase="compute") for n in range(10)]
        results.append((generation, sum(beat["current"] for beat in beats)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(1, 10)] * 8
    assert len(HttpClient(service.url, TOKEN).call("status")["ranks"]) == 8


def test_a_message_that_comes_twice_is_acted_on_once(service: CoordinatorService) -> None:
    arguments = {"message": "worker died", "step": 3}
    body = json.dumps({"method": "should_restart", "arguments": arguments, "request_id": "r1"}).encode()
    assert post(service, body) == post(service, body)  # the answer got lost: no second failure at the same step
    other = body.replace(b"r1", b"r2")
    assert post(service, other)[1]["restart"] is False


def test_errors_reach_the_caller(service: CoordinatorService, tmp_path: Path) -> None:
    client = HttpClient(service.url, TOKEN)
    with pytest.raises(CoordinatorError, match="phase 'asleep'"):
        client.call("heartbeat", generation=1, rank=0, step=0, phase="asleep")
    with pytest.raises(CoordinatorError, match="outside a world"):
        client.call("join", attempt="a", rank=3, world_size=2, host="a", pid=1)
    (tmp_path / "run" / "events.jsonl").unlink()
    (tmp_path / "run" / "events.jsonl").symlink_to("events.jsonl")  # no such error has a sentence for a person
    with pytest.raises(CoordinatorError, match="500"):
        client.call("note", kind="x")


def test_a_service_that_comes_late_is_waited_for_and_one_that_never_comes_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = HttpClient(f"http://127.0.0.1:{port}", TOKEN, patience_s=0.5)
    with pytest.raises(Unreachable, match=rf"127.0.0.1:{port} gave no answer to status"):
        client.call("status")
    open_run(tmp_path / "run", "")
    services: list[CoordinatorService] = []

    def start() -> None:
        services.append(CoordinatorService(Coordinator(tmp_path / "run"), TOKEN, port=port))

    timer = threading.Timer(0.5, start)
    timer.start()
    assert HttpClient(f"http://127.0.0.1:{port}", TOKEN, patience_s=10).call("status")["state"] == "starting"
    timer.join()
    services[0].stop()
    with pytest.raises(Unreachable):
        client.call("status")
    with pytest.raises(UserError, match="is not of the form"):
        HttpClient("localhost:1", TOKEN)
