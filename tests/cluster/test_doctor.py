"""`qlora-dist doctor` on real processes, with real faults planted."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.doctor_faults import (
    Fault,
    bad,
    full_folder,
    other_clock,
    other_folder,
    other_version,
    result,
    start,
    start_nodes,
)
from tests.cluster.faults import REPOSITORY
from tests.cluster.two_nodes import RayNodes


@pytest.fixture
def nodes(tmp_path) -> Iterator[Callable[[Fault], RayNodes]]:
    """Starts a Ray cluster of two nodes, with something wrong on the second."""
    started: list[RayNodes] = []
    # Not tmp_path: sockets lie in it, whose path may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="qd"))

    def start_ray(fault: Fault) -> RayNodes:
        started.append(FaultyNodes(folder, fault))
        return started[0]

    yield start_ray
    for cluster in started:
        cluster.close()
    shutil.rmtree(folder, ignore_errors=True)


class FaultyNodes(RayNodes):
    """A Ray cluster whose second node is different."""

    def __init__(self, folder: Path, fault: Fault):
        self.fault = fault
        super().__init__(folder)

    def start(self, node: int) -> None:
        """See `RayNodes`."""
        plain, environment = self.nodes.command, self.environment
        if node == 1:
            self.nodes.command = lambda n, *words: plain(n, *self.fault.before, *words)  # type: ignore[method-assign]
            self.environment = environment | self.fault.environment
        super().start(node)
        self.nodes.command, self.environment = plain, environment  # type: ignore[method-assign]


# The process stops itself, as one does whose GPU or switch no longer answers, when it is to begin with gloo.
STOPS_IN_GLOO = """
import os, signal, sys, threading, time
def wait():
    while "bandwidth" not in vars(sys.modules.get("qlora_dist.cluster.doctor.devices", object)):
        time.sleep(0.002)
    sys.modules["qlora_dist.cluster.doctor.devices"].bandwidth = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
threading.Thread(target=wait, daemon=True).start()
"""


def test_it_finds_what_is_wrong_with_a_node(tmp_path):
    """Of two nodes the second has another folder at the run folder's path, another peft, a full cache, and its wall
    clock 90 s ahead: of the process only (LD_PRELOAD), since the two nodes share one kernel and so one clock."""
    shared, cache = tmp_path / "shared", tmp_path / "cache"
    shared.mkdir()
    cache.mkdir()
    version = other_version(tmp_path / "packages", "peft", "0.9.0")
    fault = Fault(
        before=[*other_folder(shared), *full_folder(cache)],
        environment=version | other_clock(tmp_path, 90) | {"QLORA_DIST_CACHE": str(cache)},
    )
    first, second = start_nodes({1: fault}, "--folder", str(shared / "run"))
    code, told = result(first)
    found = bad(told)
    host = socket.gethostname()
    assert code == 1
    assert second.wait(20) == 0
    assert second.communicate()[0] == ""
    (folder,) = found["fail folder"]
    assert folder == f"{shared} is another folder here than on the first node, or not there on {host}/1"
    (packages,) = found["fail versions"]
    assert packages == f"peft 0.9.0 on {host}/1; qlora-dist needs >=0.21"
    (clock,) = found["fail clock"]
    assert clock == f"{host}/1 is 90.0 s ahead of {host}/0"
    (space,) = found["fail space"]
    assert space == f"0 MiB of 1 MiB free in cache ({cache}) on {host}/1"
    # And nothing else is wrong: what the two nodes do together works.
    assert {line["check"]: line["verdict"] for line in told["lines"]}["gloo"] == "ok"
    assert {name for name in found if name.startswith("fail")} == {
        "fail folder", "fail versions", "fail clock", "fail space",
    }  # fmt: skip
    assert not list(shared.iterdir())


def test_it_finds_a_taken_port_and_a_full_run_folder_on_one_machine(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, told = result(start("--folder", str(full), before=full_folder(full), MASTER_PORT=str(port)))
    found = bad(told)
    assert code == 1
    (text,) = found["fail ports"]
    assert text.startswith(f"{port} (MASTER_PORT) is taken by ")
    assert f"(pid {os.getpid()})" in text
    (space,) = found["fail space"]
    assert space == f"0 MiB of 1 MiB free in run folder ({full})"
    (folder,) = found["fail folder"]
    assert "No space left on device" in folder
    assert {name for name in found if name.startswith("fail")} == {"fail ports", "fail space", "fail folder"}


@pytest.mark.slow
def test_two_nodes_with_nothing_wrong(tmp_path):
    first, second = start_nodes({}, "--folder", str(tmp_path / "run"))
    code, told = result(first)
    assert code == 0
    assert second.wait(20) == 0
    verdicts = {line["check"]: (line["verdict"], line["found"]) for line in told["lines"]}
    for check in ("nodes", "versions", "folder", "clock", "gloo"):
        assert verdicts[check][0] == "ok"
    assert "seen by all 2 nodes" in verdicts["folder"][1]
    assert verdicts["nodes"][1].startswith("2 node(s), 2 rank(s): ")
    turns = [turn for facts in told["ranks"] for turn in facts["folder"]["turns"]]
    assert sorted(turns) == list(range(10))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_collective_is_named_and_nobody_waits_for_ever(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(STOPS_IN_GLOO)
    faults = {1: Fault(environment={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"})}
    first, second = start_nodes(faults, "--folder", str(tmp_path / "run"), "--limit", "4")
    code, told = result(first)
    found = bad(told)
    assert code == 1
    assert second.wait(60) == 0
    (nodes,) = found["fail nodes"]
    assert nodes == f"rank 1 on {socket.gethostname()}/1 did not get through `gloo`: it was ended after 45 s"
    assert found["fail gloo"]


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named(tmp_path):
    first, second = start_nodes({}, "--folder", str(tmp_path / "run"), "--limit", "1")
    second.kill()
    code, told = result(first)
    assert code == 1
    (nodes,) = bad(told)["fail nodes"]
    assert nodes == "rank 1: it did not come; is it started, and can it reach rank 0?"
    assert {line["check"]: line["verdict"] for line in told["lines"]}["folder"] == "ok"


@pytest.mark.slow
def test_every_node_of_a_ray_cluster(tmp_path, nodes):
    """Two raylets, in network namespaces where the machine allows it; the driver is on the first node."""
    shared = tmp_path / "shared"
    shared.mkdir()
    version = other_version(tmp_path / "packages", "peft", "0.9.0")
    cluster = nodes(Fault(before=other_folder(shared), environment=version))
    words = ["doctor", "--address", cluster.address, "--folder", str(shared / "run"), "--json"]
    driver = cluster.popen(
        0, sys.executable, "-m", "qlora_dist.cli", *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, errors = driver.communicate(timeout=120)
    assert driver.returncode == 1, errors
    told = json.loads(out)
    found = bad(told)
    (second,) = {facts["node"] for facts in told["ranks"]} - {cluster.nodes.addresses[0]}
    assert second == cluster.nodes.addresses[1]
    assert found["fail versions"] == [f"peft 0.9.0 on {second}; qlora-dist needs >=0.21"]
    assert found["fail folder"] == [f"{shared} is another folder here than on the first node, or not there on {second}"]
    verdicts = {line["check"]: line["verdict"] for line in told["lines"]}
    assert (verdicts["nodes"], verdicts["gloo"], verdicts["clock"]) == ("ok", "ok", "ok")
    assert "fail gloo" not in found

    cluster.kill(1)
    driver = cluster.popen(
        0, sys.executable, "-m", "qlora_dist.cli", *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, errors = driver.communicate(timeout=120)
    assert driver.returncode == 1, errors
    assert bad(json.loads(out))["fail nodes"] == [f"{second}: Ray has lost it"]
