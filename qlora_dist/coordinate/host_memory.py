"""The memory of this machine that a process may still take."""

import re
from collections.abc import Iterable
from pathlib import Path

import psutil

# A control group's limit, usage, and in its memory.stat the file cache that goes first; version 1 has no "max" but a
# limit beyond any memory.
CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def host_memory() -> dict[str, int]:
    """Host memory in bytes: in all, and what this process and its children may still take."""
    found = psutil.virtual_memory()
    free = [found.available, *free_in_cgroups()]
    return {"total": found.total, "free": min(free), "limited": int(min(free) < found.available)}


def free_in_cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterable[int]:
    """What each control group (of either version) that this process is in leaves, file cache counted as free."""
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, (limit, usage, cached) = root, CGROUP_V2
        elif "memory" in controllers.split(","):
            top, (limit, usage, cached) = root / "memory", CGROUP_V1
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == top.parent:
                break
            if not (folder / limit).is_file():
                continue
            most = (folder / limit).read_text().strip()
            if most != "max":
                used = int((folder / usage).read_text())
                cache = re.search(rf"^{cached} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                yield int(most) - used + (int(cache[1]) if cache else 0)
