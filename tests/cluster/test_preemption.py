"""Ray says that a node will be taken away: real raylets and training, `ray drain-node` as an autoscaler calls it."""

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from qlora_dist.checkpoint.manifest import list_checkpoints, verify
from qlora_dist.track.metrics import read_metrics
from tests.cluster.faults import wait_until
from tests.cluster.test_two_nodes import Job, sections
from tests.cluster.two_nodes import BIN, RayNodes
from tests.single import small_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NODE_ID = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR")
print(*[node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == sys.argv[2]])
"""


@pytest.fixture
def cluster() -> Iterator[Callable[..., RayNodes]]:
    made: list[tuple[RayNodes, Path]] = []

    def make(cpus: Sequence[int], blocking: bool = False) -> RayNodes:
        # Not tmp_path: Ray's sockets live below it, and their paths may have 107 characters.
        folder = Path(tempfile.mkdtemp(prefix="qd"))
        made.append((RayNodes(folder, cpus, blocking), folder))
        return made[-1][0]

    yield make
    for nodes, folder in made:
        nodes.close()
        shutil.rmtree(folder, ignore_errors=True)


def node_id(nodes: RayNodes, node: int) -> str:
    """Ray's name of a node; "" where it has not joined."""
    asker = nodes.popen(0, sys.executable, "-c", NODE_ID, nodes.address, nodes.nodes.addresses[node], stdout=-1)
    return asker.communicate(timeout=60)[0].strip()


def drain(nodes: RayNodes, node: int, deadline_s: int) -> None:
    """Tell Ray that a node will be gone in so many seconds."""
    words = [
        str(BIN / "ray"), "drain-node", "--address", nodes.address, "--node-id", node_id(nodes, node),
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the spot instance is wanted back",
        "--deadline-remaining-seconds", str(deadline_s),
    ]  # fmt: skip
    drainer = nodes.popen(0, *words, stdout=-1, stderr=-1)
    out, err = drainer.communicate(timeout=60)
    assert drainer.returncode == 0, out + err


def steps_of(job: Job, attempt: int) -> list[int]:
    return sorted(record["step"] for record in read_metrics(job.run_dir) if record["attempt"] == attempt)


def end(job: Job) -> None:
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.process.wait(60) == 143, job.output.read_text()
    assert not [p for checkpoint in list_checkpoints(job.run_dir) for p in verify(checkpoint.path)]


@pytest.mark.parametrize("notice", ["ray drain-node", "SIGTERM"])
def test_a_run_leaves_a_node_before_it_is_gone(
    cluster: Callable[..., RayNodes], tiny_model: Path, tmp_path: Path, notice: str
) -> None:
    """[1, 2] workers: a checkpoint at the next step, then one worker on the other node, and no step done twice."""
    nodes = cluster((1, 1), notice == "SIGTERM")
    wait_until(lambda: bool(node_id(nodes, 1)), 60)
    config = small_config(
        tmp_path / "run", tiny_model,
        **sections(100_000, backend="ray", num_workers=[1, 2], address=nodes.address, collective_timeout_s=20)
        | {"checkpoint": {"save_steps": 100_000}},
    )  # fmt: skip
    job = Job(nodes, tmp_path, config)
    job.wait(lambda: job.last()["step"] >= 10)
    if notice == "SIGTERM":
        # As a Kubernetes pod or a spot instance gets it; Ray then waits 30 s before it ends the node's processes.
        nodes.blocking.send_signal(signal.SIGTERM)
    else:
        drain(nodes, 1, 120)
    drained = time.time()
    job.wait(lambda: job.last()["attempt"] == 2)
    print(f"\nthe first step without the node was done {job.last()['time'] - drained:.1f} s after the notice")
    (held,) = job.events("held")
    print(f"the checkpoint was committed {job.events('committed')[0]['time'] - drained:.1f} s after the notice")
    assert job.sizes() == [2, 1]
    assert job.events("resumed")[0]["step"] == held["step"] == steps_of(job, 1)[-1]
    assert nodes.nodes.addresses[1] in job.events("resize")[0]["reason"]
    nodes.kill(1)
    until = job.last()["step"] + 20
    job.wait(lambda: job.last()["step"] >= until)
    assert job.sizes() == [2, 1], "the run was on the node that was taken away"
    assert not job.events("restart"), "a notice counts as a failure"
    assert steps_of(job, 1) + steps_of(job, 2) == list(range(1, job.last()["step"] + 1))
    end(job)


def test_without_room_elsewhere_nothing_is_lost(
    cluster: Callable[..., RayNodes], tiny_model: Path, tmp_path: Path
) -> None:
    """One worker, which only the second node can hold: it stands still until another node comes."""
    nodes = cluster((0, 1))
    config = small_config(
        tmp_path / "run", tiny_model,
        **sections(100_000, backend="ray", num_workers=1, address=nodes.address, collective_timeout_s=20)
        | {"checkpoint": {"save_steps": 100_000}},
    )  # fmt: skip
    job = Job(nodes, tmp_path, config)
    job.wait(lambda: job.last()["step"] >= 10)
    drain(nodes, 1, 30)
    job.wait(lambda: bool(job.events("held")))
    (held,) = job.events("held")
    time.sleep(5)
    assert job.last()["step"] == held["step"], "it trained what will be lost"
    nodes.kill(1)
    nodes.start(1)
    job.wait(lambda: job.last()["attempt"] == 2)
    assert job.events("resumed")[0]["step"] == held["step"] == steps_of(job, 1)[-1]
    assert job.sizes() == [1, 1]
    end(job)
