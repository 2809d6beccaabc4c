"""Two network namespaces with a slow cable between them: a rate by `tc ... tbf`, a delay by a relay in userspace.

Needs root, iproute2 and /dev/net/tun. Kernels without netem cannot delay packets, so processes talk over a TUN device
in either namespace: a relay sends its packets as UDP over the veth pair, whose ends `tbf` holds to the rate, and hands
each to the other TUN device once it has been under way for the delay.

    python -m benchmarks.slow_link --mbit 100 --delay-ms 50        what the cable is worth: Mbit/s and round trip

The rate counts the relay's own headers, 28 of 8,972 bytes. The delay is that of one direction.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from tests.cluster.faults import REPOSITORY
from tests.cluster.two_nodes import Cable

VETH_MTU = 9000
# Room for the relay's IPv4 and UDP headers.
TUN_MTU = VETH_MTU - 28
TUN = "slow0"
RELAY_PORT = 7171
TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x0001, 0x1000, 0x40000000
# What the probe sends to measure the rate: 4 s at 100 Mbit/s, TCP's slow start included.
PROBE_BYTES = 50_000_000


class SlowCable(Cable):
    """The two namespaces of `tests.cluster.two_nodes`; `addresses` are those at the ends of the slow cable."""

    def __init__(self, mbit: float, delay_ms: float) -> None:
        super().__init__()
        self.relay: subprocess.Popen[bytes] | None = None
        try:
            for name, end in zip(self.names, self.ends, strict=True):
                ip("-n", name, "link", "set", end, "mtu", str(VETH_MTU))
                subprocess.run(
                    ["tc", "-n", name, "qdisc", "add", "dev", end, "root", "tbf", "rate", f"{mbit}mbit",
                     "burst", "64kb", "latency", "200ms"],
                    check=True,
                )  # fmt: skip
            far = [address.replace("10.213.", "10.214.") for address in self.addresses]
            self.relay = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.slow_link", "--relay", *self.names, "--ends", *self.addresses,
                 "--delay-ms", str(delay_ms)],
                cwd=REPOSITORY, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert self.relay.stdout is not None
            assert self.relay.stdout.readline() == b"ready\n"
            for name, address in zip(self.names, far, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", TUN)
                ip("-n", name, "link", "set", TUN, "mtu", str(TUN_MTU), "txqueuelen", "200", "up")
            self.addresses = far
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave nothing."""
        if self.relay is not None:
            self.relay.kill()
            self.relay.wait()
        super().close()

    def bytes_sent(self, node: int) -> int:
        """What a node has sent into the slow cable so far: IP packets, headers included."""
        with_statistics = ip("-n", self.names[node], "-s", "-j", "link", "show", TUN)
        return int(json.loads(with_statistics)[0]["stats64"]["tx"]["bytes"])

    def probe(self) -> dict[str, float]:
        """Mbit/s of one TCP connection from node 0 to node 1, and the round trip of a small message, in ms."""
        words = [sys.executable, "-m", "benchmarks.slow_link"]
        address = self.addresses[1]
        with subprocess.Popen(
            self.command(1, *words, "--listen", address), cwd=REPOSITORY, stdout=subprocess.PIPE
        ) as listener:
            assert listener.stdout is not None
            assert listener.stdout.readline() == b"ready\n"
            done = subprocess.run(
                self.command(0, *words, "--probe", address),
                cwd=REPOSITORY,
                check=True,
                capture_output=True,
                timeout=120,
            )
        return dict(json.loads(done.stdout))


def ip(*words: str) -> str:
    """Run `ip`; what it printed."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def slow_cable(mbit: float, delay_ms: float) -> Iterator[SlowCable]:
    """A cable for a while; what still runs in its namespaces is killed at the end."""
    cable = SlowCable(mbit, delay_ms)
    try:
        yield cable
    finally:
        cable.close()


def enter_namespace(descriptor: int) -> None:
    """Move this thread into a network namespace; devices and sockets that it opens are there."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


def relay(names: Sequence[str], ends: Sequence[str], delay_s: float) -> None:
    """Pass packets between the two namespaces' TUN devices, each `delay_s` seconds after it came over the veth pair.

    A sender waits while its socket's buffer is full, so that what is too much queues in the TUN device, and what is
    too much for that is dropped there, as in a modem.
    """
    # A cable is not slower where the machine is busy.
    os.nice(-10)
    devices, sockets, home = [], [], os.open("/proc/self/ns/net", os.O_RDONLY)
    for name, own, other in zip(names, ends, reversed(ends), strict=True):
        enter_namespace(os.open(f"/run/netns/{name}", os.O_RDONLY))
        device = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", TUN.encode(), IFF_TUN | IFF_NO_PI))
        devices.append(device)
        link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        link.bind((own, RELAY_PORT))
        link.connect((other, RELAY_PORT))
        sockets.append(link)
    # What is in a namespace is killed with it.
    enter_namespace(home)

    def send(device: int, link: socket.socket) -> None:
        while True:
            packet = os.read(device, VETH_MTU)
            # The other end's socket may not be there yet.
            with contextlib.suppress(ConnectionRefusedError):
                link.send(packet)

    def receive(link: socket.socket, held: "queue.SimpleQueue[tuple[float, bytes]]") -> None:
        while True:
            packet = link.recv(VETH_MTU)
            held.put((time.monotonic() + delay_s, packet))

    def deliver(held: "queue.SimpleQueue[tuple[float, bytes]]", device: int) -> None:
        while True:
            due, packet = held.get()
            time.sleep(max(0.0, due - time.monotonic()))
            # Nobody takes what comes before the device is up.
            with contextlib.suppress(OSError):
                os.write(device, packet)

    for device, link in zip(devices, sockets, strict=True):
        held: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        for run, arguments in ((send, (device, link)), (receive, (link, held)), (deliver, (held, device))):
            threading.Thread(target=run, args=arguments, daemon=True).start()
    print("ready", flush=True)
    signal.pause()


def listen(address: str) -> None:
    """Serve one probe: echo a byte ten times, then take `PROBE_BYTES` and answer with one."""
    with socket.create_server((address, RELAY_PORT)) as server:
        print("ready", flush=True)
        with server.accept()[0] as connection:
            for _ in range(10):
                connection.sendall(connection.recv(1))
            left = PROBE_BYTES
            while left:
                left -= len(connection.recv(min(left, 1 << 20)))
            connection.sendall(b".")


def probe(address: str) -> dict[str, float]:
    """The other side of `listen`."""
    with socket.create_connection((address, RELAY_PORT)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(10):
            started = time.monotonic()
            connection.sendall(b".")
            connection.recv(1)
            trips.append(time.monotonic() - started)
        started = time.monotonic()
        connection.sendall(bytes(PROBE_BYTES))
        connection.recv(1)
        seconds = time.monotonic() - started
    return {"tcp_mbit_per_s": 8e-6 * PROBE_BYTES / seconds, "round_trip_ms": 1e3 * sorted(trips)[len(trips) // 2]}


def main() -> None:
    """Measure a cable; the other options are for the processes that the cable starts itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=100.0)
    parser.add_argument("--delay-ms", type=float, default=50.0)
    parser.add_argument("--relay", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--ends", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--listen", help=argparse.SUPPRESS)
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.relay:
        relay(arguments.relay, arguments.ends, arguments.delay_ms / 1000)
    elif arguments.listen:
        listen(arguments.listen)
    elif arguments.probe:
        print(json.dumps(probe(arguments.probe)))
    else:
        with slow_cable(arguments.mbit, arguments.delay_ms) as cable:
            print(json.dumps(cable.probe()))


if __name__ == "__main__":
    main()
