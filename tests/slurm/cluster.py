"""A Slurm of the test suite's own on this host: munged, slurmctld and two slurmd, each on a port of its own.

A system's Slurm is left alone: configuration, key, sockets, ports and spool are all in one folder that goes with it.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.faults import REPOSITORY, wait_until

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "squeue", "srun", "scancel")
GPUS_PER_NODE = 8
SECOND_S = 1.5
AGENT_RETRY_S = 65.0
NODE_VARIABLE = "QLORA_DIST_TEST_NODE"
CONFIGURATION = """
ClusterName=qlora-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,requeue_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=300
FirstJobId={first_job}
OverTimeLimit=0
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=8 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=8 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")


def slurm_works() -> bool:
    """Whether Slurm and munge are installed and this is root, whom their daemons want."""
    return os.geteuid() == 0 and all(shutil.which(name, path=_path()) for name in PROGRAMS)


class Slurm:
    """Two nodes, n1 and n2, of 8 CPUs and 8 plain files that pass for GPUs each.

    Args:
        folder: short, since sockets lie in it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "RAY_"))},
            "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path(), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
        }  # fmt: skip
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._held_since: dict[tuple[str, str], float] = {}
        for name in ("state", "spool-n1", "spool-n2", "gpus"):
            (folder / name).mkdir()
        for number in range(GPUS_PER_NODE):
            (folder / "gpus" / str(number)).touch()
        host = socket.gethostname().partition(".")[0]
        ports = dict(zip(("ctld", "first", "second"), _free_ports(3), strict=True))
        # A job's ports follow from its number: two suites at once are not to clash.
        first_job = 1 + secrets.randbelow(20000)
        conf = CONFIGURATION.format(folder=folder, host=host, gpus=GPUS_PER_NODE, first_job=first_job, **ports)
        (folder / "slurm.conf").write_text(conf)
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpus/[0-{GPUS_PER_NODE - 1}]\n")
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o400)

    def start(self) -> None:
        """Start the daemons, and wait until both nodes are idle."""
        munge = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        files = [f"--{option}={self.folder / file}" for option, file in munge.items()]
        self._start("munged", "munged", "--foreground", "--force", f"--log-file={self.folder}/munge.log", *files)
        wait_until((self.folder / "munge.socket").exists, 20)
        self._start("slurmctld", "slurmctld", "-D")
        self.start_node("n1")
        self.start_node("n2")
        wait_until(lambda: self.command("sinfo", "-h", "-o", "%D %t", check=False) == "2 idle", 60)

    def start_node(self, name: str) -> None:
        """Start a node's slurmd."""
        self._start(name, "slurmd", "-D", "-N", name, **{NODE_VARIABLE: name})

    def kill_node(self, name: str, power: bool) -> None:
        """SIGKILL a node's slurmd and the tasks on the node; with `power`, also what would tell Slurm of the tasks."""
        _kill(lambda: [p for p in self._ours() if _on_node(p) == name and (power or not _tells_slurm(p))])
        self.daemons.pop(name).wait()

    def close(self) -> None:
        """End jobs and daemons; whatever is left of them is killed."""
        if "slurmctld" in self.daemons:
            self.command("scancel", "--full", "--state=RUNNING", check=False)
            self.command("scancel", "--state=PENDING", check=False)
        _kill(self._ours)
        for daemon in self.daemons.values():
            daemon.wait()

    def processes(self, job: str | None = None) -> list[psutil.Process]:
        """What runs of this Slurm's jobs, or of one."""
        wanted = [(process, _environment(process).get("SLURM_JOB_ID")) for process in self._ours()]
        return [process for process, found in wanted if found is not None and job in (None, found)]

    def _ours(self) -> list[psutil.Process]:
        """Daemons, steps and tasks: all have this configuration in their environment."""
        conf = self.environment["SLURM_CONF"]
        return [process for process in psutil.process_iter() if _environment(process).get("SLURM_CONF") == conf]

    def command(self, *words: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        """The stdout of one of Slurm's commands."""
        done = subprocess.run(
            words, env={**self.environment, **(env or {})}, cwd=REPOSITORY, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stderr}{done.stdout}"
        return done.stdout.strip()

    def submit(self, *words: str, **variables: str) -> str:
        """`sbatch WORDS` from the repository's root; the job's number."""
        return self.command("sbatch", "--parsable", *words, env=variables)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        shown = self.command("scontrol", "show", "job", "-o", job)
        return dict(pair.partition("=")[::2] for pair in shown.split(" ") if "=" in pair)

    def release(self, job: str) -> dict[str, str]:
        """`job`, which is let go where Slurm holds it back for two minutes after a requeue; a test need not wait.

        Not at once: slurmd refuses a job that starts in the very second in which it was ended ("Job credential
        revoked"), and Slurm then lets the job fail.
        """
        found = self.job(job)
        if found["JobState"] in ENDED:
            # On its way through a requeue a job looks ended for a moment.
            time.sleep(2)
            found = self.job(job)
        if found["JobState"] == "PENDING" and found["Reason"] == "BeginTime":
            since = self._held_since.setdefault((job, found["Restarts"]), time.monotonic())
            if time.monotonic() < since + SECOND_S:
                return found
            self.command("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        return found

    def wait(self, job: str, timeout_s: float = 180) -> dict[str, str]:
        """Wait for a job's end, through requeues; what Slurm says of it then."""
        deadline = time.monotonic() + timeout_s
        while (found := self.release(job))["JobState"] not in ENDED:
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job} is still {found['JobState']} ({found.get('Reason')})")
            time.sleep(0.3)
        return found

    def _start(self, key: str, *words: str, **variables: str) -> None:
        log = (self.folder / f"{key}.out").open("w")
        self.daemons[key] = subprocess.Popen(
            words,
            env={**self.environment, **variables},
            cwd=self.folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _environment(process: psutil.Process) -> dict[str, str]:
    """A process's environment; {} of one that is gone, or a zombie.

    Not psutil's: slurmstepd writes its title over the beginning, after which psutil finds nothing.
    """
    try:
        block = Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (part.decode(errors="replace").partition("=") for part in block.split(b"\0"))
    return {name: value for name, is_pair, value in pairs if is_pair}


def _kill(find: Callable[[], list[psutil.Process]]) -> None:
    """Until nothing is found: what is killed may have started something else meanwhile."""
    deadline = time.monotonic() + 20
    while (found := find()) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.05)


def _on_node(process: psutil.Process) -> str | None:
    variables = _environment(process)
    # Tasks have Slurm's own variable, slurmd and what it starts the tests'.
    return variables.get("SLURMD_NODENAME", variables.get(NODE_VARIABLE))


def _tells_slurm(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name() == "slurmstepd"
    return False


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    sockets: list[Any] = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
