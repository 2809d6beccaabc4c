"""What a machine says of itself: versions, memory, space, ports, GPUs. Imports no torch, and waits for nothing long."""

import errno
import hashlib
import os
import platform
import socket
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement

import qlora_dist
from qlora_dist.cluster.doctor.wanted import Port, Wanted
from qlora_dist.config.folders import cache_root
from qlora_dist.coordinate.host import this_host
from qlora_dist.coordinate.host_memory import host_memory

Facts = dict[str, Any]
SMI_TIMEOUT_S = 20.0
# What others have on a GPU that is in use; a desktop or a CUDA context of ours takes less.
BUSY_BYTES = 2 << 30
SMI_FIELDS = {
    "index": "index", "name": "name", "driver": "driver_version", "total_mib": "memory.total",
    "used_mib": "memory.used", "sm_mhz": "clocks.sm", "max_sm_mhz": "clocks.max.sm", "celsius": "temperature.gpu",
    "watts": "power.draw", "limit_watts": "power.limit", "mig": "mig.mode.current",
    "ecc_errors": "ecc.errors.uncorrected.volatile.total",
}  # fmt: skip
# The second is its name before driver 535.
SMI_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")


def machine_facts(wanted: Wanted) -> Facts:
    """Everything that needs neither torch nor another node."""
    return {
        "host": this_host(),
        "python": platform.python_version(),
        "versions": versions(),
        "requires": requirements(),
        "code": code_digest(),
        "memory": host_memory(),
        "space": [space(what, path) for what, path in places(wanted).items()],
        "gpus": gpus(),
        "missing": [f"{setting}={path}" for setting, path in wanted.paths.items() if not _exists(path)],
        "package": None if wanted.package is None else _version(wanted.package),
    }


def requirements() -> list[str]:
    """What qlora-dist asks for, such as "torch>=2.11"; nothing where it runs without being installed."""
    try:
        found = metadata.requires("qlora-dist") or []
    except metadata.PackageNotFoundError:
        return []
    asked = [Requirement(text) for text in found]
    return [f"{r.name}{r.specifier}" for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]


def versions() -> dict[str, str | None]:
    """Versions as Python here finds them, first of PYTHONPATH and then of the environment; None where absent."""
    return {
        "qlora-dist": qlora_dist.__version__,
        **{name: _version(name) for name in (Requirement(text).name for text in requirements())},
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def code_digest() -> str:
    """Eight hexadecimal digits of qlora-dist's own source: two checkouts may have one version."""
    root, digest = Path(qlora_dist.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def places(wanted: Wanted) -> dict[str, Path]:
    """What needs space -> its folder, or that which it will be made in."""
    found = {
        "run folder": Path(wanted.run_dir),
        "scratch": Path(os.environ.get("QLORA_DIST_SCRATCH") or os.environ.get("TMPDIR") or "/tmp"),
        "cache": cache_root(),
        "shared memory": Path("/dev/shm"),
    }
    if wanted.hub is not None:
        from huggingface_hub.constants import HF_HUB_CACHE

        found["hub cache"] = Path(HF_HUB_CACHE)
    return {what: existing(path) for what, path in found.items()}


def existing(path: Path) -> Path:
    """The nearest part of a path that is there and that this user may see."""
    # Path.exists raises where a folder above may not be read.
    return next(part for part in (path, *path.parents) if os.path.exists(part))


def space(what: str, path: Path) -> Facts:
    """Space in bytes where a folder lies, for a person who is not root."""
    found = os.statvfs(path)
    block = found.f_frsize
    return {
        "what": what, "path": str(path), "free": found.f_bavail * block, "total": found.f_blocks * block,
        # Some filesystems (btrfs) have no fixed number of inodes and say 0 of 0.
        "inodes": found.f_favail if found.f_files else None, "device": os.stat(path).st_dev, "kind": _filesystem(path),
    }  # fmt: skip


def _filesystem(path: Path) -> str:
    """The kind of filesystem, such as nfs4."""
    device = f"{os.major(os.stat(path).st_dev)}:{os.minor(os.stat(path).st_dev)}"
    # Of mounts over one another the last is what one sees.
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == device:
            return rest.split()[0]
    return "unknown"


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


# Ports


def port_facts(ports: Sequence[Port]) -> list[Facts]:
    """Whether each port is free on this machine, who has it, and whether the system may hand it to anybody.

    Returns:
        Of each: port, why, needed, taken_by and refused (sentences, None where it is free), ephemeral.
    """
    low, high = (int(number) for number in EPHEMERAL.read_text().split())
    reserved = [part.partition("-") for part in RESERVED.read_text().strip().split(",") if part]
    kept = {number for a, _, b in reserved for number in range(int(a), int(b or a) + 1)}
    return [
        {
            "port": port.number, "why": port.why, "needed": port.needed, **_listened(port.number),
            "ephemeral": low <= port.number <= high and port.number not in kept,
        }
        for port in ports
    ]  # fmt: skip


def _listened(port: int) -> dict[str, str | None]:
    """Who listens on a port, or why nobody of this user's can; None and None where it is free."""
    with socket.socket() as probe:
        # As those do who will listen there: a connection that has ended just now is in nobody's way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
            return {"taken_by": None, "refused": None}
        except OSError as error:
            if error.errno == errno.EACCES:
                return {"taken_by": None, "refused": "needs root"}
            if error.errno != errno.EADDRINUSE:
                return {"taken_by": None, "refused": f"cannot be listened on: {error.strerror}"}
    return {"taken_by": _listener(port), "refused": None}


def _listener(port: int) -> str:
    for connection in psutil.net_connections("tcp"):
        if connection.laddr and connection.laddr.port == port and connection.pid and connection.status == "LISTEN":
            return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return "a process that this user may not see"


# GPUs


def gpus() -> Facts:
    """What nvidia-smi says: {"gpus": [...]} or {"error": why not}; no key "gpus" where there is no NVIDIA driver."""
    try:
        rows = _smi(list(SMI_FIELDS.values()))
    except FileNotFoundError:
        return {"error": "there is no nvidia-smi", "devices": len(device_files())}
    except (subprocess.SubprocessError, OSError) as error:
        output = getattr(error, "stdout", None) or getattr(error, "output", None) or str(error)
        return {"error": " ".join(str(output).split())[:200], "devices": len(device_files())}
    return {"gpus": [dict(zip(SMI_FIELDS, row, strict=False)) for row in rows]}


def throttle_reasons() -> list[int]:
    """Each GPU's reasons for its clock, as NVML's bits (nvmlClocksEventReasons); empty where nvidia-smi tells none."""
    for field in SMI_REASONS:
        try:
            return [int(row[0], 16) for row in _smi([field])]
        except (subprocess.SubprocessError, OSError, ValueError):
            continue
    return []


def clocks_now() -> list[list[str]]:
    """Each GPU's SM clock in MHz, its temperature in degrees Celsius and its power in watts."""
    try:
        return _smi(["clocks.sm", "temperature.gpu", "power.draw"])
    except (subprocess.SubprocessError, OSError):
        return []


def _smi(fields: Sequence[str]) -> list[list[str]]:
    words = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True)
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def device_files() -> list[Path]:
    """The driver's GPUs, whether it works or not."""
    return [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()]


def gpu_count() -> int:
    """How many GPUs a process started here sees, without asking CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name and name != "-1"])
    return len(gpus().get("gpus", ())) or len(device_files())
