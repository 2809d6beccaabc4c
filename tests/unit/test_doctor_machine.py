"""`qlora-dist doctor`: what a machine says of itself."""

import errno
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_dist.cluster.doctor import machine, start
from qlora_dist.cluster.doctor.wanted import Port, Wanted
from qlora_dist.coordinate.host_memory import free_in_cgroups


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


@pytest.mark.parametrize(
    ("refusal", "said"),
    [(errno.EACCES, "needs root"), (errno.EADDRNOTAVAIL, "cannot be listened on: Cannot assign requested address")],
)
def test_a_port_that_may_not_be_had_is_not_taken(monkeypatch: pytest.MonkeyPatch, refusal: int, said: str) -> None:
    """In place of the system, which may let everybody have port 80 in a container."""

    class Refused(socket.socket):
        def bind(self, address: Any) -> None:
            raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(socket, "socket", Refused)
    (found,) = machine.port_facts([Port(80, "test")])
    assert (found["taken_by"], found["refused"]) == (None, said)


def test_memory_that_a_control_group_of_either_version_leaves(tmp_path: Path) -> None:
    """Slurm limits the job and not the step: the nearest limit may be a parent's."""
    own = tmp_path / "own"
    step = tmp_path / "memory/slurm/uid_0/job_7/step_0"
    step.mkdir(parents=True)
    plain_files(step, "memory.limit_in_bytes 9223372036854771712", "memory.usage_in_bytes 100", "memory.stat rss 1")
    stat = "memory.stat inactive_file 1\ntotal_inactive_file 300\n"
    plain_files(step.parent, "memory.limit_in_bytes 5000", "memory.usage_in_bytes 1000", stat)
    own.write_text("11:cpuset:/slurm\n9:memory:/slurm/uid_0/job_7/step_0\n1:name=systemd:/slurm\n0::/user.slice\n")
    assert sorted(free_in_cgroups(root=tmp_path, own=own)) == [4300, 9223372036854771612]

    job = tmp_path / "system.slice/job_7"
    job.mkdir(parents=True)
    plain_files(job, "memory.max max")
    plain_files(job.parent, "memory.max 6000", "memory.current 2000", "memory.stat anon 1\ninactive_file 500\n")
    own.write_text("0::/system.slice/job_7\n")
    assert list(free_in_cgroups(root=tmp_path, own=own)) == [4500]


def plain_files(folder: Path, *files: str) -> None:
    for name, _, content in (file.partition(" ") for file in files):
        (folder / name).write_text(content)


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


def test_this_machine_s_facts_are_json_and_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    found = json.loads(
        json.dumps(machine.machine_facts(Wanted(str(tmp_path / "a" / "b"), paths={"data.train": "/no"})))
    )
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["missing"] == ["data.train=/no"]
    assert found["host"] == "n7"
    monkeypatch.setattr(start, "run_ranks", list)
    assert [rank["node"] for rank in start.examine_machine(Wanted("/r", device="cpu"), 5.0)] == ["n7", "n7"]
    places = {place["what"]: place for place in found["space"]}
    assert places["run folder"]["path"] == str(tmp_path)
    assert 0 < found["memory"]["free"] <= found["memory"]["total"]
    assert "torch>=2.11" in found["requires"]
    assert not [text for text in found["requires"] if text.startswith("pytest")]
