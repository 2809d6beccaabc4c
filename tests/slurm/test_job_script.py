"""Parts of slurm/job.sh, with commands in place of Slurm's and of Python: who ends first, what is said and asked."""

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.faults import REPOSITORY

WAITER = 'echo $$ > "$WAITER_PID"\n'
STAYS = "exec sleep 100\n"
SCRIPT = 'source "$QLORA_DIST_HOME/slurm/common.sh"; prepare; start_ray || exit 3; echo joined'


def start_ray(folder: Path, step: str, waiter: str) -> tuple[int, str, float]:
    """The exit code, what was said, and the seconds it took.

    Args:
        step, waiter: what `srun` and `wait-ray` do.
    """
    return run(folder, SCRIPT, {"bin/srun": step, "bin/squeue": "", "venv/bin/python": WAITER + waiter})


def run(folder: Path, script: str, commands: dict[str, str]) -> tuple[int, str, float]:
    """The same for any script; `commands`: path -> what it does."""
    for name, body in commands.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"#!/bin/bash\n{body}")
        (folder / name).chmod(0o755)
    variables = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "LAUNCHER": "ray",
        "QLORA_DIST_HOME": str(REPOSITORY), "QLORA_DIST_VENV": str(folder / "venv"),
        "QLORA_DIST_LOGS": str(folder / "logs"), "QLORA_DIST_SCRATCH": str(folder),
        "QLORA_DIST_HEAD_ADDRESS": "127.0.0.1", "WAITER_PID": str(folder / "waiter"), "JOIN_S": "300",
        "SLURM_SUBMIT_DIR": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", script], env=variables, cwd=folder, text=True, timeout=60,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout, time.monotonic() - began


def test_nodes_that_join(tmp_path: Path) -> None:
    """A signal in between is none of the two's end."""
    code, out, _ = start_ray(tmp_path, STAYS, "kill -USR1 $PPID; sleep 0.3; kill -USR1 $PPID; sleep 0.3; exit 0")
    assert (code, out.splitlines()[1:]) == (0, ["joined"])


def test_nodes_that_do_not_join(tmp_path: Path) -> None:
    code, out, _ = start_ray(tmp_path, STAYS, "exit 1")
    assert code == 3
    assert "the nodes did not join a Ray cluster within 300 s; see " in out


@pytest.mark.parametrize("step", ["exit 1", "exit 0"])
def test_a_step_that_ends_at_once(tmp_path: Path, step: str) -> None:
    """Nobody waits on, and nothing is said of the time."""
    code, out, seconds = start_ray(tmp_path, f"until [[ -s $WAITER_PID ]]; do sleep 0.05; done; {step}", STAYS)
    assert (code, len(out.splitlines())) == (3, 2), out
    assert "the nodes' step ended before they had joined a Ray cluster; see " in out
    assert seconds < 10
    assert not psutil.pid_exists(int((tmp_path / "waiter").read_text()))


@pytest.mark.parametrize("code", [1, 2])
@pytest.mark.parametrize("lost", [True, False])
def test_a_lost_node_is_a_requeue_whatever_the_run_said_of_it(tmp_path: Path, lost: bool, code: int) -> None:
    """A Ray run that waits in vain for the workers of a lost node ends with code 2, as after a mistake of a person."""
    script = f'source "$QLORA_DIST_HOME/slurm/common.sh"; prepare; RUN_DIR=run; finish_up {code}'
    commands = {
        "bin/srun": f"exit {int(lost)}\n", "bin/squeue": "[[ $* != *%T* ]] || echo RUNNING\n",
        "bin/scontrol": 'echo "asked: $*"\n', "venv/bin/python": "echo failed\n",
    }  # fmt: skip
    ended, out, _ = run(tmp_path, script, commands)
    assert ended == (0 if lost else code), out
    assert ("asked: requeue 7" in out) == ("a node is lost: requeued" in out) == lost
