"""Nodes to examine, and what is wrong with them: real processes, real mounts, a clock that is really another."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.faults import REPOSITORY
from tests.distributed.group import free_port

TIMEOUT_S = 100
# Every clock of the wall is ahead, the monotonic ones are not: as on a machine whose clock is set wrongly.
SHIFT = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t which, struct timespec *at) {
    static int (*next)(clockid_t, struct timespec *);
    if (!next) next = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = next(which, at);
    if (which == CLOCK_REALTIME) at->tv_sec += SECONDS;
    return code;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


@dataclass
class Fault:
    """What is different about a node: words in front of its command, and variables of its environment."""

    before: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def mounted(script: str, *arguments: str) -> list[str]:
    """Words that run a command in a mount namespace of its own, after a shell script that may mount in it."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    words = ["unshare", "--mount", "--propagation", "private", *user]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs mount namespaces")
    count = len(arguments)
    return [*words, "sh", "-c", f'set -e; {script}; shift {count}; exec "$@"', "sh", *arguments]


def other_folder(path: Path) -> list[str]:
    """An empty filesystem of this node's own in the place of `path`."""
    return mounted('mount -t tmpfs none "$1"', str(path))


def full_folder(path: Path) -> list[str]:
    """A filesystem of 1 MiB in the place of `path`, filled to the last byte."""
    script = 'mount -t tmpfs -o size=1m none "$1"; dd if=/dev/zero of="$1/filling" bs=64k 2>/dev/null || true'
    return mounted(script, str(path))


def other_version(folder: Path, name: str, version: str) -> dict[str, str]:
    """An installed distribution of another version, which Python finds first."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return {"PYTHONPATH": f"{folder}:{REPOSITORY}"}


def other_clock(folder: Path, seconds: int) -> dict[str, str]:
    """A C library whose wall clock is ahead, in front of the real one."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = folder / "shift.c", folder / "shift.so"
    source.write_text(SHIFT)
    words = [compiler, "-shared", "-fPIC", f"-DSECONDS={seconds}", "-o", str(library), str(source), "-ldl"]
    subprocess.run(words, check=True)
    return {"LD_PRELOAD": str(library)}


def start(*words: str, before: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
    """Start `qlora-dist doctor ... --json` somewhere."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "SLURM_", "RAY_", "MASTER_", "HF_"))}
    return subprocess.Popen(
        [*before, sys.executable, "-m", "qlora_dist.cli", "doctor", *words, "--json"],
        cwd=REPOSITORY, env=clean | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def result(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any]]:
    """The exit code and what it printed."""
    try:
        out, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert out, errors
    return process.returncode, json.loads(out)


def start_nodes(faults: Mapping[int, Fault], *words: str, nodes: int = 2) -> list[subprocess.Popen[str]]:
    """Start a rank on each of several nodes, as torchrun's agents or srun would, without them."""
    port = str(free_port())
    return [
        start(
            *words, before=faults.get(rank, Fault()).before, RANK=str(rank), WORLD_SIZE=str(nodes), LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            **faults.get(rank, Fault()).environment,
        )
        for rank in range(nodes)
    ]  # fmt: skip


def bad(told: dict[str, Any]) -> dict[str, list[str]]:
    """The check -> what was found, of the lines that fail or warn."""
    lines: dict[str, list[str]] = {}
    for line in told["lines"]:
        if line["verdict"] in ("fail", "warn"):
            assert line["mend"]
            lines.setdefault(f"{line['verdict']} {line['check']}", []).append(line["found"])
    return lines
