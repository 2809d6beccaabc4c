"""The end of a command and of all that it has started, whichever sessions those are in."""

import subprocess
from typing import Any

import psutil


def end_tree(process: subprocess.Popen[Any]) -> None:
    """SIGKILL to a process of ours and everything below it; waits for it to be gone."""
    try:
        parent = psutil.Process(process.pid)
        below = parent.children(recursive=True)
    except psutil.NoSuchProcess:
        below = []
    process.kill()
    for child in below:
        if child.is_running():
            child.kill()
    psutil.wait_procs(below, timeout=10)
    process.wait()
