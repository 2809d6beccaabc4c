"""What this machine is called."""

import os
import socket


def this_host() -> str:
    """The name by which people know this machine: Slurm's for the node in a Slurm job, else its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
