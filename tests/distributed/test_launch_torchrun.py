"""The launchers without Ray: torchrun started by us, torchrun started by the person, and one plain process."""

import os
import signal
import stat

from qlora_dist.cluster.launch import launch
from qlora_dist.coordinate.report import read_status
from tests.cluster.faults import all_gone, family, signal_at, start_toy, started, wait_until
from tests.cluster.toys import read_log, toy_config


def noted_steps(run_dir):
    return [int(words[1]) for words in read_log(run_dir) if words[0] == "step"]


def test_torchrun_replaces_killed_and_stopped_workers(tmp_path):
    signal_at(tmp_path, 5, 1, signal.SIGKILL)
    signal_at(tmp_path, 25, 0, signal.SIGSTOP)
    process = start_toy("count", tmp_path, "backend=torchrun", "collective_timeout_s=3")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert noted_steps(tmp_path) == list(range(1, 41))
    assert len(started(tmp_path)) == 6
    assert out.startswith("rank 0 counts from 0\n")
    assert "rank 1 counts" not in out
    assert "rank 1 counts from 0" in (tmp_path / "logs/attempt-1/rank-1.log").read_text()
    assert f"pid {started(tmp_path, rank=1)[0]}) died of SIGKILL; starting the workers again" in err
    # The token is the owner's alone.
    assert stat.S_IMODE((tmp_path / "coordinator.json").stat().st_mode) == 0o600


def test_what_a_person_must_mend_ends_torchrun_at_once(tmp_path):
    process = start_toy("mistake", tmp_path, "backend=torchrun")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "error: data.train is empty; add rows" in err.splitlines()
    assert len(started(tmp_path)) == 2


def test_a_killed_launcher_leaves_no_worker(tmp_path):
    process = start_toy("hang", tmp_path, "backend=torchrun")
    wait_until(lambda: len(started(tmp_path)) == 2)
    processes = family(process)
    process.kill()
    process.wait()
    wait_until(lambda: all_gone(processes), 10)


def test_an_interrupted_launcher_ends_its_workers(tmp_path):
    process = start_toy("hang", tmp_path, "backend=torchrun")
    wait_until(lambda: len(started(tmp_path)) == 2)
    processes = family(process)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    wait_until(lambda: all_gone(processes), 10)


def test_workers_that_the_person_started_find_each_other(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    process = start_toy("count", tmp_path, "backend=torchrun", before=torchrun)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert noted_steps(tmp_path) == list(range(1, 41))
    assert read_status(tmp_path)["state"] == "finished"


def test_torchrun_around_the_ray_launcher_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch(toy_config(), tmp_path) == 2
    assert "set launch.backend=torchrun" in capsys.readouterr().err


def test_one_plain_process(tmp_path):
    config = toy_config(backend="none", num_workers=1, steps=3)
    assert launch(config, tmp_path, "tests.cluster.toys:count") == 0
    assert started(tmp_path) == [os.getpid()]
    assert read_status(tmp_path)["state"] == "finished"


def test_a_plain_mistake(tmp_path, capsys):
    config = toy_config(backend="none", num_workers=1)
    assert launch(config, tmp_path, "tests.cluster.toys:mistake") == 2
    assert capsys.readouterr().err.strip() == "error: data.train is empty; add rows"
