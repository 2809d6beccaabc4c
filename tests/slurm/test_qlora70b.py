"""slurm/qlora70b.sh itself on a real Slurm of two nodes: the tiny model in place of its own, a CPU worker on each node.

Losses are compared exactly where the number of workers is the same: a resumed run repeats the uninterrupted one.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from qlora_dist.checkpoint.manifest import list_checkpoints, verify
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.report import read_status
from qlora_dist.track.metrics import read_metrics
from tests.cluster.faults import REPOSITORY, wait_until
from tests.cluster.test_ray_jobs import holding
from tests.distributed.group import series
from tests.single import small_config
from tests.slurm.cluster import AGENT_RETRY_S, ENDED, Slurm
from tests.unit.test_track_sinks import wandb_values

LAUNCHERS = ["torchrun", "ray"]
CANARIES = {"HF_TOKEN": "canary-hub-5f1c09", "WANDB_API_KEY": "canary-wandb-77ab21"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class Submitted:
    """A job, its run folder and its logs."""

    def __init__(
        self, slurm: Slurm, folder: Path, model: Path, launcher: str, steps: int, *words: str,
        sbatch: Sequence[str] = (), **more: str,
    ):  # fmt: skip
        self.slurm, self.folder = slurm, folder
        folder.mkdir(exist_ok=True)
        self.config = config(folder / "run", model, steps)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config.model_dump(mode="json", exclude_unset=True)))
        variables = {
            "LAUNCHER": launcher, "WORKERS_PER_NODE": "1", "QLORA_DIST_LOGS": str(folder / "logs"),
            "QLORA_DIST_SCRATCH": str(slurm.folder), "RAY_OBJECT_STORE_BYTES": "80000000", **more,
        }  # fmt: skip
        self.id = slurm.submit(
            "--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={folder}/out.txt", *sbatch,
            "slurm/qlora70b.sh", str(path), *words, **variables,
        )  # fmt: skip

    @property
    def output(self) -> str:
        return "".join(file.read_text() for file in [self.folder / "out.txt", *self.folder.glob("logs/*/*/ray.log")])

    def wait(self, timeout_s: float = 180) -> dict[str, str]:
        """The job's end, and what it said where the test fails."""
        try:
            return self.slurm.wait(self.id, timeout_s)
        finally:
            print(self.output)
            print(*(self.slurm.folder / "slurmctld.log").read_text().splitlines()[-40:], sep="\n")

    def until(self, true: Callable[[], bool], timeout_s: float = 150) -> None:
        """Wait while the job lives."""
        deadline = time.monotonic() + timeout_s
        while not true():
            found = self.slurm.release(self.id)
            if time.monotonic() > deadline or found["JobState"] in ENDED:
                print(*(self.slurm.folder / "slurmctld.log").read_text().splitlines()[-40:], sep="\n")
                raise AssertionError(f"job {self.id} is {found}: {self.output}")
            time.sleep(0.1)

    def step(self) -> int:
        """The newest step of metrics.jsonl."""
        return max((r["step"] for r in read_metrics(self.config.run_dir)), default=0)

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.config.run_dir / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def left(self) -> list[psutil.Process]:
        """The job's processes that still run, after a moment to leave."""
        deadline = time.monotonic() + 15
        while (found := self.slurm.processes(self.id)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found


def config(run_dir: Path, model: Path, steps: int) -> RunConfig:
    """A constant learning rate: the first steps are the same however many follow."""
    return small_config(
        run_dir, model,
        data={"max_rows": 60},
        train={"max_steps": steps, "global_batch_size": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant"},
        checkpoint={"save_steps": 100000},
        launch={"backend": "ray", "device": "cpu"},
        track={"tensorboard": False, "report": False},
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(slurm: Slurm, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    job = Submitted(slurm, tmp_path_factory.mktemp("whole"), tiny_model, "torchrun", 200)
    assert job.wait()["JobState"] == "COMPLETED"
    return job


def test_success_by_torchrun(uninterrupted: Submitted) -> None:
    assert uninterrupted.slurm.job(uninterrupted.id)["ExitCode"] == "0:0"
    check_success(uninterrupted)


def test_success_by_ray(slurm: Slurm, tiny_model: Path, tmp_path: Path) -> None:
    job = Submitted(slurm, tmp_path, tiny_model, "ray", 6)
    assert job.wait()["JobState"] == "COMPLETED"
    check_success(job)


def check_success(job: Submitted) -> None:
    assert read_status(job.config.run_dir)["state"] == "finished"
    assert (job.config.run_dir / "adapter" / "adapter_model.safetensors").exists()
    assert [len(event["members"]) for event in job.events("generation")] == [2]
    assert not job.left()
    assert not list(job.slurm.folder.glob("qd-*")), "temporary folders are left"
    assert not list(job.folder.glob("logs/*/*/ray-token")), "the token is left"
    assert [path.name for path in job.folder.glob("logs/*/*")] == ["attempt-1"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_failing_run_fails_the_job(slurm: Slurm, tiny_model: Path, tmp_path: Path, launcher: str) -> None:
    """What a person can mend is exit code 2, as of `qlora-dist train` itself."""
    job = Submitted(slurm, tmp_path, tiny_model, launcher, 6, "data.train=missing.jsonl")
    found = job.wait()
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "2:0")
    assert "missing.jsonl" in job.output
    assert not job.left()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_that_dies_fails_the_job(slurm: Slurm, tiny_model: Path, tmp_path: Path, launcher: str) -> None:
    """A worker is killed, and nothing starts it again: exit code 1. All nodes live, so this is no requeue."""
    job = Submitted(slurm, tmp_path, tiny_model, launcher, 100000, "launch.max_restarts=0")
    job.until(lambda: job.step() > 5)
    psutil.Process(job.events("generation")[0]["members"][1]["pid"]).kill()
    found = job.wait()
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "1:0", "0")
    assert not job.left()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_cancelled_job_leaves_nothing(slurm: Slurm, tiny_model: Path, tmp_path: Path, launcher: str) -> None:
    job = Submitted(slurm, tmp_path, tiny_model, launcher, 100000)
    job.until(lambda: job.step() > 5)
    slurm.command("scancel", job.id)
    assert job.wait()["JobState"] == "CANCELLED"
    assert not job.left()
    assert not list(slurm.folder.glob("qd-*"))
    assert slurm.job(job.id)["Restarts"] == "0"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_notice_checkpoint_requeue_resume(
    slurm: Slurm, tiny_model: Path, tmp_path: Path, launcher: str, uninterrupted: Submitted
) -> None:
    """SIGUSR1 as Slurm sends it before the time limit or a preemption, twice; there is no other checkpoint."""
    job = Submitted(slurm, tmp_path, tiny_model, launcher, 200, "track.wandb=offline")
    job.until(lambda: job.step() > 20)
    for _ in range(2):
        slurm.command("scancel", "--batch", "--signal=USR1", job.id)
    found = job.wait()
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1")
    (resumed,) = job.events("resumed")
    assert 20 < resumed["step"] < 200
    assert series(job.config.run_dir, "loss") == series(uninterrupted.config.run_dir, "loss")
    assert sorted(path.name for path in job.folder.glob("logs/*/*")) == ["attempt-1", "attempt-2"]
    # Both attempts are one run of W&B, of which the folder of the last one has every step.
    told = re.findall(r"wandb sync \S+/offline-run-\S+?-(\S+)", job.output)
    assert told == [read_status(job.config.run_dir)["run_id"]] * 2
    losses = {step for name, step, _ in wandb_values(job.config.run_dir) if name == "loss"}
    assert losses == set(range(1, 201))
    assert not [problem for one in list_checkpoints(job.config.run_dir) for problem in verify(one.path)]
    assert not job.left()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_that_does_not_stop_in_time_is_ended_and_requeued(
    slurm: Slurm, tiny_model: Path, tmp_path: Path, launcher: str, uninterrupted: Submitted
) -> None:
    """It gets no time to stop in, and ends all the same; the next attempt goes on from its last checkpoint."""
    job = Submitted(slurm, tmp_path, tiny_model, launcher, 200, "checkpoint.save_steps=10", STOP_S="0")
    job.until(lambda: len(job.events("committed")) > 0)
    slurm.command("scancel", "--batch", "--signal=USR1", job.id)
    found = job.wait()
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1")
    assert "the run did not end within 0 s" in job.output
    assert 10 <= job.events("resumed")[0]["step"] < 200
    assert series(job.config.run_dir, "loss") == series(uninterrupted.config.run_dir, "loss")
    assert not job.left()


@pytest.mark.timeout(700)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_time_limit_gives_notice_itself(
    slurm: Slurm, tiny_model: Path, tmp_path: Path, launcher: str, uninterrupted: Submitted
) -> None:
    """Slurm's notice comes up to a minute early: of one minute nothing may be left to train in."""
    limit = ["--time=2", "--signal=B:USR1@35"]
    job = Submitted(slurm, tmp_path, tiny_model, launcher, 100000, sbatch=limit)
    job.until(lambda: len(job.events("resumed")) > 0, 300)
    resumed = job.events("resumed")[0]["step"]
    job.until(lambda: job.step() > resumed + 5, 300)
    slurm.command("scancel", job.id)
    assert int(job.wait()["Restarts"]) >= 1
    assert resumed > 0
    (committed, *_) = job.events("committed")
    assert committed["step"] == resumed
    assert {record["step"] for record in read_metrics(job.config.run_dir)} >= set(range(1, resumed + 5))
    losses, whole = series(job.config.run_dir, "loss"), series(uninterrupted.config.run_dir, "loss")
    assert {step: losses[step] for step in whole.keys() & losses.keys()} == {
        step: whole[step] for step in whole.keys() & losses.keys()
    }
    assert not job.left()


@pytest.mark.timeout(700)
@pytest.mark.parametrize("power", [False, True], ids=["processes", "power cut"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_lost_node_is_a_requeue(
    slurm: Slurm, tiny_model: Path, tmp_path: Path, launcher: str, power: bool, uninterrupted: Submitted
) -> None:
    """The second node is gone, comes back, and the job goes on from its last checkpoint.

    By a power cut nobody tells srun of the node's tasks: Slurm finds out itself, and requeues the job.
    """
    job = Submitted(slurm, tmp_path, tiny_model, launcher, 200, "checkpoint.save_steps=10")
    job.until(lambda: len(list_checkpoints(job.config.run_dir)) > 0)
    slurm.kill_node("n2", power)
    if not power:
        job.until(lambda: "a node is lost: requeued" in job.output)
    wait_until(lambda: slurm.job(job.id)["JobState"] != "RUNNING", 120)
    # Slurm revokes a job that starts in the second in which it was ended, and here a node would be back within that.
    time.sleep(2)
    # As whoever looks after the cluster does; Slurm itself takes minutes to find out.
    slurm.command("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")
    # ReturnToService=2: it is back when it says so.
    slurm.start_node("n2")
    # What Slurm could not tell the lost node (to end the step) it seems to try again within a minute: the next attempt,
    # whose step has the same number, was killed by it. The job is held back by Slurm for two minutes as it is.
    time.sleep(AGENT_RETRY_S)
    found = job.wait(300)
    # Slurm 22.05 may have lost count of the GPUs of a job that it requeued without its node ("Invalid generic
    # resource"), and refuses its first step; that is one more requeue.
    assert found["JobState"] == "COMPLETED"
    assert 1 <= int(found["Restarts"]) <= 3
    assert 10 <= job.events("resumed")[0]["step"] < 200
    assert series(job.config.run_dir, "loss") == series(uninterrupted.config.run_dir, "loss")
    assert not job.left()


def strangers_are_refused(job: Submitted) -> None:
    """Another user of the node, who has not the token, gets no driver of the job's Ray cluster, and no worker."""
    address = re.search(r"--address=(\S+)", " ".join(word for p in job.slurm.processes(job.id) for word in p.cmdline()))
    assert address is not None
    words = [sys.executable, "-m", "qlora_dist.cli", "train", str(job.folder / "config.yaml"), "launch.backend=ray"]
    told = subprocess.run(
        [*words, f"launch.address={address[1]}", f"output_dir={job.folder / 'stranger'}"],
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (told.returncode, told.stdout) == (2, ""), told.stderr
    assert f"the Ray cluster at launch.address={address[1]} wants a token" in told.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_jobs_on_the_same_nodes(slurm: Slurm, tiny_model: Path, tmp_path: Path, launcher: str) -> None:
    """One is cancelled while the other runs on; secrets are in no command line, log, script or run folder."""
    short = Submitted(slurm, tmp_path / "short", tiny_model, launcher, 100000, **CANARIES)
    long = Submitted(slurm, tmp_path / "long", tiny_model, launcher, 100000, **CANARIES)
    short.until(lambda: short.step() > 5 and long.step() > 5, 240)
    assert slurm.job(short.id)["NodeList"] == slurm.job(long.id)["NodeList"]
    tokens = [path.read_text() for path in tmp_path.glob("*/logs/*/*/ray-token")]
    assert all(os.stat(path).st_mode & 0o77 == 0 for path in tmp_path.glob("*/logs/*/*/ray-token"))
    if launcher == "ray":
        assert len(set(tokens)) == 2
        strangers_are_refused(long)
    else:
        tokens = [json.loads((job.config.run_dir / "coordinator.json").read_text())["token"] for job in (short, long)]
    lines = [" ".join(process.cmdline()) for process in slurm.processes()]
    assert any("qlora_dist.cli train" in line for line in lines)
    places = {"ray-token", "coordinator.json"}  # for this user's eyes alone
    for secret in (*tokens, *CANARIES.values()):
        assert not [line for line in lines if secret in line]
        assert not [path for path in holding(tmp_path, secret) if Path(path).name not in places]
        assert not [path for folder in slurm.folder.glob("qd-*") for path in holding(folder, secret)]
    slurm.command("scancel", short.id)
    assert slurm.wait(short.id)["JobState"] == "CANCELLED"
    assert not short.left()
    until = long.step() + 20
    long.until(lambda: long.step() > until)
    assert len(long.events("generation")) == 1, "the end of the other job disturbed this one"
    slurm.command("scancel", long.id)
    assert slurm.wait(long.id)["JobState"] == "CANCELLED"
