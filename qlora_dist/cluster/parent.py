"""Ends with the process that has started it. Light to import: what comes before it may take seconds."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have Linux kill this process when the launcher dies: a killed launcher cannot end its workers itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    started_by = os.environ.pop("QLORA_DIST_PARENT", None)
    if started_by is not None and os.getppid() != int(started_by):
        # It died before.
        os._exit(128 + signal.SIGKILL)
