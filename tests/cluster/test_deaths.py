"""What of a Ray run may die, each by a SIGKILL, and what that costs: a test for each row of docs/recovery.md's table.

Two raylets, `launch.num_workers: [1, 2]`, a checkpoint every fifth step. Each test prints how long it took.
"""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from qlora_dist.checkpoint.manifest import list_checkpoints, verify
from qlora_dist.coordinate.report import read_status
from qlora_dist.track.metrics import read_metrics
from tests.cluster.test_two_nodes import Job, sections
from tests.cluster.two_nodes import RayNodes
from tests.single import small_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SAVE_STEPS = 5


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    # Not tmp_path: Ray's sockets live below it, and their paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="qd"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nodes(ray_folder: Path) -> Iterator[RayNodes]:
    made = RayNodes(ray_folder / "a")
    yield made
    made.close()


def start(nodes: RayNodes, folder: Path, model: Path) -> Job:
    """The command, as a person gives it (again)."""
    launch = {"backend": "ray", "num_workers": [1, 2], "address": nodes.address, "collective_timeout_s": 20}
    settings = sections(100_000, **launch) | {"checkpoint": {"save_steps": SAVE_STEPS, "keep_last": 3}}
    return Job(nodes, folder, small_config(folder / "run", model, **settings))


def at_work(nodes: RayNodes, folder: Path, model: Path) -> Job:
    """A run of two workers that has committed something."""
    job = start(nodes, folder, model)
    job.wait(lambda: len(job.events("committed")) > 1)
    assert job.sizes() == [2]
    return job


def process(nodes: RayNodes, node: int, name: str) -> psutil.Process:
    """The process on a node whose title begins with `name`."""
    found = [p for p in nodes.nodes.processes(node) if p.name() == name or "".join(p.cmdline()[:1]).startswith(name)]
    assert len(found) == 1, found
    return found[0]


def newest(job: Job) -> tuple[int, int]:
    return max((event["generation"], event["step"]) for event in job.events("committed"))


def finish(job: Job, committed: tuple[int, int]) -> None:
    """End it; what was committed before the death was there to go on from, and every step is there once."""
    for event in job.events("resumed"):
        assert event["step"] >= committed[1]
    os.kill(job.process.pid, signal.SIGTERM)
    assert job.process.wait(60) == 143, job.output.read_text()
    steps = sorted(record["step"] for record in read_metrics(job.run_dir))
    assert steps == list(range(1, steps[-1] + 1))
    assert not [p for checkpoint in list_checkpoints(job.run_dir) for p in verify(checkpoint.path)]
    assert read_status(job.run_dir)["last_checkpoint"]["step"] == steps[-1]


def test_the_coordinator(nodes: RayNodes, tiny_model: Path, tmp_path: Path) -> None:
    """Ray starts it again, it reads its event log, and the workers notice nothing but a slow answer."""
    job = at_work(nodes, tmp_path, tiny_model)
    actor = process(nodes, 0, "ray::CoordinatorActor")
    committed, killed = newest(job), time.time()
    actor.kill()
    job.wait(lambda: newest(job) > committed)
    print(f"\nthe next checkpoint was committed {time.time() - killed:.1f} s after the coordinator was killed")
    until = job.last()["step"] + 20
    job.wait(lambda: job.last()["step"] >= until)
    assert job.sizes() == [2]
    assert not job.events("restart")
    assert process(nodes, 0, "ray::CoordinatorActor").pid != actor.pid
    finish(job, committed)


def test_the_driver(nodes: RayNodes, tiny_model: Path, tmp_path: Path) -> None:
    """Its workers end with it; the same command goes on."""
    job = at_work(nodes, tmp_path, tiny_model)
    workers = [psutil.Process(member["pid"]) for member in job.events("generation")[0]["members"]]
    os.killpg(job.process.pid, signal.SIGKILL)
    killed = time.time()
    job.process.wait()
    deadline = time.time() + 60
    while any(worker.is_running() for worker in workers) and time.time() < deadline:
        time.sleep(0.05)
    committed = newest(job)
    print(f"\nthe workers were gone {time.time() - killed:.1f} s after the driver was killed")
    again = time.time()
    job = start(nodes, tmp_path, tiny_model)
    job.wait(lambda: job.last()["attempt"] == 2)
    print(f"the same command had done its first step {time.time() - again:.1f} s later")
    finish(job, committed)


def test_a_workers_raylet(nodes: RayNodes, tiny_model: Path, tmp_path: Path) -> None:
    """The raylet alone: its workers end with it, and the run goes on with the other node."""
    job = at_work(nodes, tmp_path, tiny_model)
    committed, killed = newest(job), time.time()
    process(nodes, 1, "raylet").kill()
    job.wait(lambda: job.last()["attempt"] == 2)
    print(f"\nthe first step without the node was done {time.time() - killed:.1f} s after its raylet was killed")
    assert job.sizes() == [2, 1]
    (restart,) = job.events("restart")
    assert not restart["counted"]
    finish(job, committed)


def test_the_head_nodes_raylet(nodes: RayNodes, ray_folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The driver is connected to it, so the run ends; the same command goes on once there is a head again."""
    job = at_work(nodes, tmp_path, tiny_model)
    workers = [psutil.Process(member["pid"]) for member in job.events("generation")[0]["members"]]
    killed = time.time()
    process(nodes, 0, "raylet").kill()
    code = job.process.wait(120)
    print(f"\nthe command had ended with code {code} {time.time() - killed:.1f} s after the head's raylet was killed")
    assert code == 1
    said = job.output.read_text()
    assert "error: Ray's processes on this node have ended: " in said
    assert "the same command goes on from the last checkpoint" in said
    assert "Traceback" not in said
    deadline = time.time() + 60
    while any(worker.is_running() for worker in workers) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(worker.is_running() for worker in workers)
    print(f"its workers were gone after {time.time() - killed:.1f} s")
    committed = newest(job)
    for node in range(2):
        nodes.kill(node)
    after = RayNodes(ray_folder / "b")
    try:
        again = time.time()
        job = start(after, tmp_path, tiny_model)
        job.wait(lambda: job.last()["attempt"] == 2)
        print(f"the same command on a new cluster had done its first step {time.time() - again:.1f} s later")
        finish(job, committed)
    finally:
        after.close()
