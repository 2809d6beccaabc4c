"""Which Ray cluster a command is to join, and whether anybody is there; imports no Ray, which takes seconds."""

import os
import socket

from qlora_dist.config.errors import UserError

PROBE_TIMEOUT_S = 5.0


def ray_address(configured: str | None) -> tuple[str | None, str]:
    """The address of the cluster to join, None for a local one, and the setting that says so.

    Args:
        configured: `launch.address`, before which RAY_ADDRESS does not count; `ray job submit` sets that.
    """
    if configured:
        return configured, "launch.address"
    return os.environ.get("RAY_ADDRESS") or None, "RAY_ADDRESS"


def probe_address(address: str, source: str) -> None:
    """Refuse in seconds what `ray.init` would try for minutes before it ends the process.

    Args:
        source: the setting that the address is from.

    Raises:
        UserError: nobody listens there, or it is an address of another kind.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UserError("ray-address-form", source=source, address=address)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise UserError("ray-not-there", source=source, address=address, error=error) from error


def not_joined(address: str, source: str, error: Exception) -> UserError:
    """What a person is told where `ray.init` could not join the cluster at `address`."""
    if "AuthToken" in str(error.__cause__):
        return UserError("ray-token", source=source, address=address)
    return UserError("ray-not-joined", source=source, address=address, error=error)
