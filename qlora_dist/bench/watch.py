"""A command in processes of its own, watched from outside: time, the GPUs' used memory, the host's."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

import qlora_dist

LOOK_S = 0.5
# For a trainer to write its checkpoint and leave after SIGTERM.
PATIENCE_S = 15.0


@dataclass(frozen=True)
class Watched:
    """How a command ended.

    Attributes:
        code: its exit code; negative for a signal.
        seconds: from its start to its end.
        over_limit: whether it was ended for taking too long.
        gpu_peak_gib: the fullest GPU's used memory as nvidia-smi shows it, with what CUDA's context and libraries
            take and whatever else runs there; None without a GPU.
        host_peak_gib: anonymous and shared memory of all its processes, without page cache.
    """

    code: int
    seconds: float
    over_limit: bool
    gpu_peak_gib: float | None
    host_peak_gib: float


def watched(
    command: Sequence[str],
    log: Path,
    limit_s: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Watched:
    """Run `command` to its end or for `limit_s` seconds, its output in `log`; nothing of it is left running."""
    inherited = os.environ | dict(environment or {})
    # What is not installed but run from its folder is found from any other folder too.
    paths = [str(Path(qlora_dist.__file__).parents[1]), *filter(None, [inherited.get("PYTHONPATH")])]
    started = time.monotonic()
    gpu_peak, host_peak, over_limit = gpu_used_gib(), 0.0, False
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=inherited | {"PYTHONPATH": os.pathsep.join(paths)},
            cwd=folder, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                over_limit = time.monotonic() - started > limit_s
                if over_limit:
                    break
                if gpu_peak is not None:
                    gpu_peak = max(gpu_peak, gpu_used_gib() or 0.0)
                host_peak = max(host_peak, host_used_gib(process.pid))
                time.sleep(LOOK_S)
        finally:
            end_session(process)
    return Watched(process.returncode, time.monotonic() - started, over_limit, gpu_peak, host_peak)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End `process` and whatever it started and left behind."""
    for number, patience_s in ((signal.SIGTERM, PATIENCE_S), (signal.SIGKILL, None)):
        if process.poll() is None:
            _signal_session(process.pid, number)
            try:
                process.wait(patience_s)
            except subprocess.TimeoutExpired:
                continue
    _signal_session(process.pid, signal.SIGKILL)


def _signal_session(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return  # all of them have ended by themselves


def gpu_used_gib() -> float | None:
    """The fullest GPU's used memory as nvidia-smi shows it; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    shown = subprocess.run(command, capture_output=True, text=True)
    used = [float(line) / 1024 for line in shown.stdout.split() if line.replace(".", "").isdigit()]
    return max(used, default=None)


def host_used_gib(pid: int) -> float:
    """Private and shared bytes of a process and its children, without page cache."""
    try:
        family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0.0
    return sum(anonymous_bytes(member) for member in family) / 2**30


def anonymous_bytes(pid: int) -> int:
    """A process's memory without page cache: its anonymous pages, private and shared."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(
        int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(("Anonymous:", "Pss_Shmem:"))
    )
