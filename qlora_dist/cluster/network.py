"""Which network interface the workers talk over: the one that the launcher's addresses belong to.

Left alone, gloo takes the interface that the host's name resolves to and NCCL the first that is up: on hosts with a
container bridge, a VPN or a second fabric that is often one that other nodes cannot reach.
"""

import os
import socket

import psutil


def interface_of(address: str) -> str | None:
    """The name of this host's interface that carries an IP address; None where none does (behind NAT)."""
    for name, addresses in psutil.net_if_addrs().items():
        # IPv6 link-local addresses come with `%interface`.
        if address in (entry.address.partition("%")[0] for entry in addresses):
            return name
    return None


def address_towards(host: str) -> str:
    """This host's own IP address on the route to `host`; nothing is sent.

    Raises:
        OSError: `host` cannot be resolved, or there is no route to it.
    """
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def interface_settings(address: str) -> dict[str, str]:
    """Environment variables that make gloo and NCCL use the interface of `address`; what a person has set stays."""
    name = interface_of(address)
    if name is None:
        return {}
    # NCCL takes a bare name for a prefix: eth1 would match eth10.
    chosen = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    return {variable: value for variable, value in chosen.items() if variable not in os.environ}
