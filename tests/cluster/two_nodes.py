"""Two nodes on one machine, a raylet on either: real processes that really die.

Where the machine allows it they are network namespaces with an address each, joined by a cable: a process in one
reaches the other only over the cable, so that what picks the wrong interface or address fails here as it would between
two hosts. Elsewhere they are two addresses of the loopback interface. They share the filesystem, as the nodes of a
cluster share their storage.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.faults import REPOSITORY, wait_until

BIN = Path(sys.executable).parent
GCS_PORT = 6390
START_S = 60


def namespaces_work() -> bool:
    """Whether this machine lets us make network namespaces (it takes root and iproute2)."""
    if os.environ.get("QLORA_DIST_TEST_LOOPBACK"):
        return False
    name = f"qd{secrets.token_hex(3)}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
        joined = made and subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"]).returncode == 0
        if made:
            subprocess.run(["ip", "netns", "del", name])
    except FileNotFoundError:
        return False
    return joined


class Nodes:
    """What runs on which of the two nodes, and the end of it."""

    addresses: list[str]

    def command(self, node: int, *words: str) -> list[str]:
        """The command line that runs `words` on a node (0 or 1)."""
        raise NotImplementedError

    def processes(self, node: int) -> list[psutil.Process]:
        """What runs on a node."""
        raise NotImplementedError

    def kill(self, node: int) -> None:
        """SIGKILL everything that runs on a node, all at once as a power cut would: nobody sees another go first."""
        processes = self.processes(node)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        wait_until(lambda: not self.processes(node), 20)

    def close(self) -> None:
        """Leave nothing."""
        for node in range(2):
            self.kill(node)


class Loopback(Nodes):
    """Two addresses of one interface; what runs on a node is known by a variable in its environment."""

    def __init__(self) -> None:
        self.tag = secrets.token_hex(4)
        self.addresses = ["127.0.0.1", "127.0.0.2"]

    def command(self, node: int, *words: str) -> list[str]:
        """See `Nodes`."""
        return ["env", f"QLORA_DIST_TEST_NODE={self.tag}-{node}", *words]

    def processes(self, node: int) -> list[psutil.Process]:
        """See `Nodes`."""
        return [process for process in psutil.process_iter() if self._is_on(process, node)]

    def _is_on(self, process: psutil.Process, node: int) -> bool:
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            return alive and process.environ().get("QLORA_DIST_TEST_NODE") == f"{self.tag}-{node}"
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False


class Cable(Nodes):
    """Two namespaces and the veth pair between them."""

    def __init__(self) -> None:
        self.tag = secrets.token_hex(2)
        net = secrets.randbelow(250) + 1
        self.names = [f"qd{self.tag}a", f"qd{self.tag}b"]
        self.addresses = [f"10.213.{net}.1", f"10.213.{net}.2"]
        self.ends = [f"qv{self.tag}a", f"qv{self.tag}b"]
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
        for name, end, address in zip(self.names, self.ends, self.addresses, strict=True):
            _ip("link", "set", end, "netns", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")

    def command(self, node: int, *words: str) -> list[str]:
        """See `Nodes`."""
        return ["ip", "netns", "exec", self.names[node], *words]

    def processes(self, node: int) -> list[psutil.Process]:
        """See `Nodes`."""
        pids = _ip("netns", "pids", self.names[node]).split()
        running = []
        for pid in pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                running.append(psutil.Process(int(pid)))
        return running

    def close(self) -> None:
        """Leave nothing."""
        super().close()
        for name in self.names:
            _ip("netns", "del", name)


def two_nodes() -> Nodes:
    """Namespaces where the machine allows them, else addresses of the loopback interface."""
    return Cable() if namespaces_work() else Loopback()


class RayNodes:
    """A Ray cluster of two raylets, one CPU each; node 0 is the head, where drivers run.

    Args:
        blocking: node 1 is a `ray start --block`, as in a pod, and may join a little later.
    """

    def __init__(self, folder: Path, cpus: Sequence[int] = (1, 1), blocking: bool = False) -> None:
        self.nodes, self.cpus = two_nodes(), cpus
        self.address = f"{self.nodes.addresses[0]}:{GCS_PORT}"
        # Sockets in it must stay below 108 characters.
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.start(0)
        if blocking:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self.blocking = self.popen(1, *self.words(1), "--block", **quiet)
        else:
            self.start(1)

    def words(self, node: int) -> list[str]:
        """The command that starts a node's raylet (and the head's other processes)."""
        role = ["--head", "--port", str(GCS_PORT), "--include-dashboard=false", f"--temp-dir={self.folder}"]
        joins = [f"--address={self.address}"]
        return [
            str(BIN / "ray"), "start", *(joins if node else role), f"--node-ip-address={self.nodes.addresses[node]}",
            f"--num-cpus={self.cpus[node]}", "--object-store-memory=80000000", "--disable-usage-stats",
        ]  # fmt: skip

    def start(self, node: int) -> None:
        """Start a node."""
        words = self.words(node)
        done = subprocess.run(
            self.nodes.command(node, *words), env=self.environment, capture_output=True, text=True, timeout=START_S
        )
        assert done.returncode == 0, done.stderr + done.stdout

    def kill(self, node: int) -> None:
        """Take a node away: its raylet and all workers on it."""
        self.nodes.kill(node)

    def popen(self, node: int, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start a process on a node, in a session of its own."""
        return subprocess.Popen(
            self.nodes.command(node, *words), env=self.environment, cwd=REPOSITORY, text=True, start_new_session=True,
            # A shell starts what it puts into the background with SIGINT ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
        )  # fmt: skip

    def close(self) -> None:
        """Leave nothing."""
        self.nodes.close()


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
