"""`qlora-dist submit slurm`, and the scripts themselves: no Slurm is started but for one short job."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_dist.cluster.slurm_job import exit_code, state, stop
from qlora_dist.cluster.slurm_submit import Allocation, allocation, render, submit
from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig
from qlora_dist.coordinate.report import read_status
from qlora_dist.coordinate.rundir import open_run
from qlora_dist.coordinate.state import Coordinator
from tests.cluster.faults import REPOSITORY
from tests.single import small_config
from tests.slurm.cluster import Slurm

SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sh"))


def small(**launch: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"name": "m"}, "data": {"train": "d"}, "launch": launch})


@pytest.mark.parametrize(
    ("launch", "given", "expected"),
    [
        ({"num_workers": 1}, (None, None), Allocation(1, 1, True)),
        ({"num_workers": 16}, (None, None), Allocation(2, 8, True)),
        ({"num_workers": 16}, (4, None), Allocation(4, 4, True)),
        ({"num_workers": 16}, (None, 4), Allocation(4, 4, True)),
        ({"num_workers": 16}, (3, 2), Allocation(3, 2, True)),
        ({"num_workers": [4, 12]}, (None, None), Allocation(2, 8, True)),
        ({"num_workers": 4, "device": "cpu"}, (2, None), Allocation(2, 2, False)),
    ],
)
def test_nodes_and_workers_follow_from_the_configuration(
    launch: dict[str, Any], given: tuple[int | None, int | None], expected: Allocation
) -> None:
    assert allocation(small(**launch), *given) == expected


def test_workers_that_cannot_be_spread_are_refused() -> None:
    with pytest.raises(UserError, match=r"launch.num_workers=16 is not 3 node\(s\)"):
        allocation(small(num_workers=16), nodes=3)


def options(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE))


def test_a_rendered_script(tmp_path: Path) -> None:
    config = small(num_workers=[8, 16], backend="torchrun", cpus_per_worker=2)
    overrides = ["name=a name with 'quotes'", "train.max_steps=5"]
    script = render(tmp_path / "c.yaml", config, overrides, allocation(config), "2:00:00")
    told = options(script)
    assert (told["nodes"], told["gpus-per-node"], told["cpus-per-task"]) == ("2", "8", "16")
    assert told["time"] == "2:00:00"
    assert told["signal"] == "B:USR1@120"
    assert "requeue" in told
    assert not told.keys() & {"partition", "account", "qos"}, "these are the person's own"
    assert "launch.num_workers=[8,16]" in script
    assert "LAUNCHER:-torchrun" in script
    run = f"run_train() {{ printf '%s\\n' \"$@\"; }}\n{script.splitlines()[-1]}"
    words = subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words == [str(tmp_path / "c.yaml"), "launch.num_workers=[8,16]", *overrides]
    assert "--time" not in render(tmp_path / "c.yaml", config, [], allocation(config))
    assert "gpus" not in render(tmp_path / "c.yaml", config, [], Allocation(1, 1, gpus=False))


def test_no_secret_is_rendered(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"override of data\.train holds a secret"):
        render(tmp_path / "c.yaml", small(), ["data.train=s3://me:secret@bucket/key"], Allocation(1, 1, gpus=True))


def test_no_sbatch_on_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no sbatch on this host"):
        submit("#!/bin/bash\n")


def test_the_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes, GPUs and time of the configuration, and no secret of the environment."""
    secrets = {"HF_TOKEN": "canary-hub", "WANDB_API_KEY": "canary-wandb", "RAY_AUTH_TOKEN": "canary-ray"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "m"}, "data": {"train": "d"}, "launch": {"num_workers": 8}}))
    done = cli("submit", "slurm", str(path), "--print", "--gpus-per-node", "4", "--time", "5", "--", "name=other")
    assert done.returncode == 0, done.stderr
    told = options(done.stdout)
    assert (told["nodes"], told["gpus-per-node"], told["time"], told["job-name"]) == ("2", "4", "5", "other")
    assert "canary" not in done.stdout + done.stderr


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qlora_dist.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_is_clean(tmp_path: Path) -> None:
    """Every script of the project, and one that is rendered, which names the project's folder."""
    folders = (REPOSITORY / "slurm", REPOSITORY / "launchers")
    listed = subprocess.run(["git", "ls-files", "*.sh"], capture_output=True, text=True, cwd=REPOSITORY).stdout
    assert {(REPOSITORY / name).parent for name in listed.split()} <= set(folders), "a script that is not looked at"
    rendered = tmp_path / "rendered.sh"
    config = small(num_workers=16)
    rendered.write_text(render(tmp_path / "c.yaml", config, ["name=two words"], allocation(config)))
    scripts = [*(path for folder in folders for path in sorted(folder.glob("*.sh"))), rendered]
    # 1090, 1091: what it sources is looked at by itself. 2034: its variables are for what it sources.
    done = subprocess.run(
        ["shellcheck", "-x", "--exclude=SC1090,SC1091,SC2034", *map(str, scripts)],
        capture_output=True, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    done = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_the_scripts_name_no_cluster(script: Path) -> None:
    text = script.read_text()
    assert not options(text).keys() & {"partition", "account", "qos", "constraint", "mail-user"}
    assert "ray stop" not in text
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def started(run_dir: Path, ranks: int = 1) -> Coordinator:
    open_run(run_dir, "x: 1\n")
    coordinator = Coordinator(run_dir)
    coordinator.start_job()
    for rank in range(ranks):
        coordinator.join("a", rank, ranks, "host", os.getpid())
    return coordinator


def test_stop_waits_for_workers_and_for_the_end(tmp_path: Path) -> None:
    """It asks a run whose workers have just come, and returns when that has finished."""
    since = time.time()
    assert not stop(tmp_path, since, 0.6, "never there")
    coordinator = started(tmp_path)
    assert not stop(tmp_path, since, 0.6, "notice")
    assert coordinator.heartbeat(1, 0, 3, "compute")["stop"]
    coordinator.finish(1, 3, {})
    assert stop(tmp_path, since, 5.0, "notice")
    assert state(tmp_path, since) == "stopped"


def test_an_earlier_jobs_end_is_not_this_ones(tmp_path: Path) -> None:
    coordinator = started(tmp_path)
    coordinator.fail(1, 0, "user", "the disk is full; make room", 3)
    assert (state(tmp_path, 0.0), exit_code(tmp_path, 0.0)) == ("failed", 2)
    now = time.time() + 1
    assert (state(tmp_path, now), exit_code(tmp_path, now)) == ("new", 1)


def test_a_stop_after_the_last_step_is_a_finished_run(tmp_path: Path) -> None:
    coordinator = started(tmp_path)
    coordinator.heartbeat(1, 0, 7, "checkpoint", max_steps=7)
    coordinator.request_stop("notice")
    coordinator.finish(1, 7, {})
    assert state(tmp_path, 0.0) == "finished"


def test_a_rendered_script_on_a_real_slurm(slurm: Slurm, tmp_path: Path) -> None:
    """As far as a mistake in the configuration, which costs no node's time: exit code 2."""
    path = tmp_path / "config.yaml"
    values: dict[str, Sequence[str] | dict[str, Any]] = {"model": {"name": "m"}, "data": {"train": "d"}}
    path.write_text(yaml.safe_dump(values | {"launch": {"device": "cpu", "num_workers": 2}}))
    done = cli("submit", "slurm", str(path), "--print", "--nodes", "2", "train.max_steps=5")
    script = tmp_path / "job.sh"
    script.write_text(done.stdout)
    path.write_text(path.read_text() + "trian: {}\n")
    job = slurm.submit(f"--output={tmp_path}/out.txt", str(script), QLORA_DIST_LOGS=str(tmp_path / "logs"))
    found = slurm.wait(job, 60)
    output = (tmp_path / "out.txt").read_text()
    assert (found["JobState"], found["ExitCode"], found["NumNodes"]) == ("FAILED", "2:0", "2"), output
    assert "trian" in output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_array_of_configurations(slurm: Slurm, tiny_model: Path, tmp_path: Path) -> None:
    """Two tasks, which may run at the same time on one node, each with its own configuration, and one too many."""
    paths = []
    for name in "ab":
        config = small_config(tmp_path / name, tiny_model, train={"max_steps": 3}, launch={"device": "cpu"})
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    job = slurm.submit(
        "--array=0-2", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/out-%a.txt", "slurm/array.sh",
        *map(str, paths), "--", "seed=7", LAUNCHER="torchrun", QLORA_DIST_LOGS=str(tmp_path / "logs"),
        QLORA_DIST_SCRATCH=str(slurm.folder),
    )  # fmt: skip
    codes = [slurm.wait(f"{job}_{task}")["ExitCode"] for task in range(3)]
    assert codes == ["0:0", "0:0", "2:0"], [path.read_text() for path in tmp_path.glob("out-*.txt")]
    for name in "ab":
        assert read_status(tmp_path / name)["state"] == "finished"
        resolved = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert (resolved["seed"], resolved["track"]["wandb_group"]) == (7, f"array-{job}")
    assert "give --array=0-1" in (tmp_path / "out-2.txt").read_text()
