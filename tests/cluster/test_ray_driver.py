"""The Ray driver on one shared cluster: real Ray Train, real gloo, real signals."""

import os
import signal
import socket
import threading
import time

import psutil
import pytest
import ray

from qlora_dist.cluster.actor import start_coordinator
from qlora_dist.cluster.launch import launch
from qlora_dist.cluster.ray_address import probe_address
from qlora_dist.config.errors import UserError
from qlora_dist.config.load import to_yaml
from qlora_dist.coordinate.client import CoordinatorError
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.rundir import open_run
from tests.cluster.faults import reached, signal_at, started, wait_until
from tests.cluster.toys import read_log, toy_config


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    yield
    ray.shutdown()


def run(toy, run_dir, **fields):
    return launch(toy_config(**fields), run_dir, f"tests.cluster.toys:{toy}")


def noted_steps(run_dir):
    return [int(words[1]) for words in read_log(run_dir) if words[0] == "step"]


def test_killed_and_stopped_workers_are_named_and_replaced(tmp_path, capsys):
    signal_at(tmp_path, 5, 1, signal.SIGKILL)
    signal_at(tmp_path, 25, 0, signal.SIGSTOP)
    assert run("count", tmp_path, collective_timeout_s=5) == 0
    assert len(started(tmp_path)) == 6
    assert noted_steps(tmp_path) == list(range(1, 41))
    killed, stopped = started(tmp_path, rank=1)[0], started(tmp_path, rank=0)[1]
    out, err = capsys.readouterr()
    assert f"rank 1 (host {socket.gethostname()}, pid {killed}) died" in err
    assert f"rank 0 (host {socket.gethostname()}, pid {stopped}) stopped answering" in err
    # Rank 0's lines come as they are, of every attempt; Ray's own do not come at all.
    assert out.splitlines()[0] == "rank 0 counts from 0"
    assert sum(line.startswith("rank 0 counts from") for line in out.splitlines()) == 3
    assert "raylet" not in out + err
    assert "rank 1 counts from 0" in (tmp_path / "logs/attempt-1/rank-1.log").read_text()
    assert [restart["generation"] for restart in read_status(tmp_path)["restarts"]] == [1, 2]
    # It cannot wake up any more.
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, signal.SIGCONT)


@pytest.mark.parametrize(
    ("delay_s", "num_workers"),
    [pytest.param(0.0, 2, marks=pytest.mark.slow), pytest.param(0.3, 2, marks=pytest.mark.slow), (0.0, [1, 2])],
)
def test_a_worker_killed_while_the_group_after_a_failure_is_starting(tmp_path, delay_s, num_workers):
    """What the first failure left behind is no news then; the second group must give its CPUs back."""

    def workers():
        return [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in _title(p)]

    def act():
        wait_until(lambda: reached(tmp_path, 5))
        first = set(workers())
        os.kill(started(tmp_path, 1)[-1], signal.SIGKILL)
        wait_until(lambda: set(workers()) - first)
        time.sleep(delay_s)
        (set(workers()) - first).pop().kill()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    # Two workers of two CPUs are all that the cluster holds.
    assert run("count", tmp_path, num_workers=num_workers, cpus_per_worker=2, collective_timeout_s=5) == 0
    thread.join()
    assert len(read_status(tmp_path)["restarts"]) == 2
    assert noted_steps(tmp_path) == list(range(1, 41))


def _title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_what_a_person_must_mend_ends_the_run_at_once(tmp_path, capsys):
    assert run("mistake", tmp_path) == 2
    ended = time.time()
    assert capsys.readouterr().err.strip() == "error: data.train is empty; add rows"
    assert len(started(tmp_path)) == 2  # one group, never another
    assert ended - read_status(tmp_path)["time"] < 15


def test_the_same_failure_twice_ends_the_run(tmp_path, capsys):
    assert run("crash", tmp_path) == 1
    err = capsys.readouterr().err
    assert "the same failure happened twice at step 7: ArithmeticError" in err
    assert "raise ArithmeticError" in err  # the traceback of the rank that failed first, not of the others
    assert len(started(tmp_path)) == 4


def test_a_group_that_never_fits_is_refused_before_anything_starts(tmp_path, capsys):
    assert run("count", tmp_path, num_workers=3, cpus_per_worker=2) == 2
    err = capsys.readouterr().err
    assert "launch.num_workers=3 needs 6 CPUs, and the Ray cluster has 4 CPUs on 1 node(s), room for 2" in err
    assert run("count", tmp_path, device="cuda") == 2
    assert "2 GPUs, and the Ray cluster has 4 CPUs and 0 GPUs" in capsys.readouterr().err
    assert not started(tmp_path)


def test_a_group_that_waits_for_others_resources_ends_with_a_sentence(tmp_path, capsys):
    holder = ray.util.placement_group([{"CPU": 3}])
    ray.get(holder.ready())
    try:
        assert run("count", tmp_path, start_timeout_s=3) == 2
    finally:
        ray.util.remove_placement_group(holder)
    assert "did not get their CPUs and GPUs within launch.start_timeout_s" in capsys.readouterr().err


def test_the_coordinator_survives_its_actor(tmp_path):
    info = open_run(tmp_path, to_yaml(toy_config()))
    client = start_coordinator(toy_config(), tmp_path, info.run_id)
    client.call("start_job")
    joined = client.call("join", attempt="a", rank=0, world_size=1, host="h", pid=1)
    ray.kill(client.actor, no_restart=False)
    assert client.call("join", attempt="a", rank=0, world_size=1, host="h", pid=1) == joined
    with pytest.raises(CoordinatorError, match="no message 'nonsense'"):
        client.call("nonsense")
    ray.kill(client.actor)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at launch.address=127.0.0.1:1"),
        ("ray://head:10001", "not of the form HOST:PORT"),
        ("head", "not of the form HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address, sentence):
    with pytest.raises(UserError, match=sentence):
        probe_address(address, "launch.address")
