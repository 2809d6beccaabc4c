"""What the ranks of a sound cluster tell `qlora-dist doctor`, and what may be wrong with it."""

from collections.abc import Callable
from typing import Any

from qlora_dist.cluster.doctor.wanted import Wanted

GIB = 2**30
Facts = dict[str, Any]


def rank(number: int, node: str, local: int = 0, **changes: Any) -> Facts:
    """What a rank with a GPU tells, of a run where all is well."""
    facts: Facts = {
        "rank": number, "local_rank": local, "node": node,
        "torch": {
            "torch": "2.13.0+cu128", "cuda": "12.8", "device": f"cuda:{local}", "name": "H100", "count": 2,
            "free": 79 * GIB, "total": 80 * GIB, "capability": [9, 0],
        },
        "meeting": {"members": [0, 1, 2, 3]},
        "gloo": {"gb_s": 1.0, "ms": 30.0, "ranks": 4}, "nccl": {"gb_s": 40.0, "ms": 10.0, "ranks": 4},
        "load": {"tflops": 700.0},
    }  # fmt: skip
    if local == 0:
        row = {"name": "H100", "driver": "570.1", "mig": "Disabled", "ecc_errors": "0"}
        facts |= {
            "machine": {
                "host": node, "python": "3.11.7", "requires": ["torch>=2.11", "peft>=0.21"], "code": "abc",
                "versions": {"qlora-dist": "0.1.0", "torch": "2.13.0+cu128", "peft": "0.21.2"},
                "memory": {"total": 1000 * GIB, "free": 900 * GIB, "limited": 0},
                "space": [
                    {"what": what, "path": f"/{what}", "free": 100 * GIB, "total": 200 * GIB, "inodes": 10**6,
                     "device": device, "kind": "nfs4"}
                    for device, what in enumerate(("run folder", "scratch", "cache", "shared memory"))
                ],
                "gpus": {"gpus": [{"index": str(index), **row} for index in range(2)]}, "missing": [], "package": None,
            },
            "folder": {"nodes": 2, "won": number == 0, "turns": [number, number + 10], "write_ms": 3.0,
                       "clock_s": 0.0, "lag_s": 0.1 if number else None},
            "ports": [{"port": 29400, "why": "MASTER_PORT", "needed": True, "taken_by": None, "refused": None,
                       "ephemeral": False}],
            "wandb": {"wanted": "online", "mode": "online", "key": True, "host": "api.wandb.ai", "variable": None,
                      "answer": "accepted", "user": "me", "seconds": 0.3},
            "hub": {"model": "org/model", "host": "huggingface.co", "cached": False, "offline": False,
                    "answer": "there", "bytes": 16 * GIB, "seconds": 0.2},
        }  # fmt: skip
        facts["load"] |= {"reasons": [0x4, 0x1], "clocks": [["1755", "60", "690"], ["1740", "60", "690"]]}
    if number == 0:
        facts["clock"] = {"2": {"ahead_s": 0.002, "within_s": 0.0005}}
        # The first node has replaced the file and does not wait for it.
        del facts["folder"]["lag_s"]
    return facts | changes


def cluster() -> list[Facts]:
    """Two nodes of two GPUs."""
    return [rank(0, "a"), rank(1, "a", 1), rank(2, "b"), rank(3, "b", 1)]


WANTED = Wanted(
    "/shared/run", named=True, workers=4, backend="ray", wandb="online", hub="org/model", paths={"data.train": "/x"}
)


def change(path: str, value: Any, number: int = 2) -> Callable[[list[Facts]], None]:
    """Put a value somewhere into a rank's facts: the first of node b where not said."""

    def put(found: list[Facts]) -> None:
        *way, last = path.split("/")
        place: Any = found[number]
        for key in way:
            place = place[int(key)] if isinstance(place, list) else place[key]
        place[int(last) if isinstance(place, list) else last] = value

    return put


def instead(number: int, facts: Facts) -> Callable[[list[Facts]], None]:
    return lambda found: found.__setitem__(number, facts)


def stuck(found: list[Facts]) -> None:
    found[3].update(stuck="nccl", why="it was ended")


def without_cuda(found: list[Facts]) -> None:
    for facts in found[2:]:
        facts["torch"] = {"torch": "2.13.0+cpu", "cuda": None, "device": None}


def old_driver(found: list[Facts]) -> None:
    for facts in found[2:]:
        facts["torch"] |= {"device": None, "error": "driver too old"}


def other_driver(found: list[Facts]) -> None:
    for gpu in found[2]["machine"]["gpus"]["gpus"]:
        gpu["driver"] = "550.2"


def cached_only(found: list[Facts]) -> None:
    found[2]["hub"] |= {"cached": True, "error": "ConnectError: no route"}


TROUBLES: dict[str, tuple[Callable[[list[Facts]], None], str, str, str]] = {
    "absent": (
        instead(3, {"rank": 3, "node": None, "absent": "it did not come"}),
        "fail",
        "nodes",
        "rank 3: it did not",
    ),
    "stuck": (stuck, "fail", "nodes", "rank 3 on b did not get through `nccl`"),
    "broken torch": (
        instead(3, {"rank": 3, "local_rank": 1, "node": "b", "torch": {"error": "ImportError: libcudart"}}),
        "fail",
        "nodes",
        "rank 3 on b, torch: ImportError: libcudart",
    ),
    "minor python": (change("machine/python", "3.12.1"), "fail", "versions", "python 3.11.7 on a, 3.12.1 on b"),
    "patch python": (change("machine/python", "3.11.9"), "warn", "versions", "python 3.11.7 on a, 3.11.9 on b"),
    "differs": (change("machine/versions/peft", "0.22.0"), "fail", "versions", "peft 0.21.2 on a, 0.22.0 on b"),
    "too old": (
        change("machine/versions/peft", "0.9.0"),
        "fail",
        "versions",
        "peft 0.9.0 on b; qlora-dist needs >=0.21",
    ),
    "missing": (
        change("machine/versions/peft", None),
        "fail",
        "versions",
        "peft missing on b; qlora-dist needs >=0.21",
    ),
    "code": (change("machine/code", "def"), "fail", "versions", "the source of qlora-dist differs: abc on a, def on b"),
    "no memory": (
        change("machine/memory/free", GIB),
        "fail",
        "memory",
        "1.0 GiB of 1,000 GiB free, 512 MiB a rank on b",
    ),
    "little memory": (change("machine/memory/free", 8 * GIB), "warn", "memory", "4.0 GiB a rank on b"),
    "data": (change("machine/missing", ["data.train=/x"]), "fail", "inputs", "data.train=/x is not there on b"),
    "full": (
        change("machine/space/0/free", 0),
        "fail",
        "space",
        "0 MiB of 200 GiB free in run folder (/run folder) on b",
    ),
    "small shm": (change("machine/space/3/free", 64 << 20), "warn", "space", "64 MiB of 200 GiB free in shared memory"),
    "inodes": (change("machine/space/1/inodes", 3), "fail", "space", "3 inodes free in scratch"),
    "not shared": (
        change("folder", {"error": "/shared is another folder here"}),
        "fail",
        "folder",
        "another folder here on b",
    ),
    "no locks": (change("folder/turns", [0, 1]), "fail", "folder", "two nodes held the event log's lock at one time"),
    "no O_EXCL": (change("folder/won", True), "fail", "folder", "several nodes have created one file"),
    "never seen": (change("folder/lag_s", None), "fail", "folder", "a replaced file is seen never on b"),
    "seen late": (change("folder/lag_s", 2.9), "warn", "folder", "a replaced file is seen only after 2.9 s on b"),
    "slow writes": (change("folder/write_ms", 800.0), "warn", "folder", "800 ms for a small durable write"),
    "clock": (change("clock/2", {"ahead_s": -90.0, "within_s": 0.1}, 0), "fail", "clock", "b is 90.0 s behind a"),
    "clock a little": (
        change("clock/2", {"ahead_s": 2.0, "within_s": 0.1}, 0),
        "warn",
        "clock",
        "b is 2.0 s ahead of a",
    ),
    "storage clock": (change("folder/clock_s", 30.0), "warn", "clock", "storage is 30.0 s ahead of that of b"),
    "port": (
        change("ports/0/taken_by", "python (pid 7)"),
        "fail",
        "ports",
        "29400 (MASTER_PORT) on b is taken by python",
    ),
    "low port": (change("ports/0/refused", "needs root"), "fail", "ports", "29400 (MASTER_PORT) on b needs root"),
    "usual port": (
        change("ports/0", {"port": 6379, "why": "ray", "needed": False, "taken_by": "x", "refused": None}),
        "warn",
        "ports",
        "6379 (ray) on b is taken by x",
    ),
    "ephemeral": (change("ports/0/ephemeral", True), "warn", "ports", "one that the system hands out"),
    "gloo": (change("gloo", {"error": "DistNetworkError: refused"}), "fail", "gloo", "rank 2 on b: DistNetworkError"),
    "slow nccl": (change("nccl/gb_s", 1.5), "warn", "nccl", "1.50 GB/s between nodes"),
    "no gpu": (change("torch/device", None, 3), "fail", "gpu", "3 GPU(s) that work, for launch.num_workers=4"),
    "smi": (
        change("machine/gpus", {"error": "couldn't communicate with the driver", "devices": 2}),
        "fail",
        "gpu",
        "nvidia-smi on b",
    ),
    "cpu torch": (without_cuda, "fail", "gpu", "torch 2.13.0+cpu on b is built without CUDA"),
    "old driver": (old_driver, "fail", "gpu", "rank 2 on b: driver too old"),
    "drivers": (other_driver, "warn", "gpu", "driver 570.1 on a, 550.2 on b"),
    "mig": (change("machine/gpus/gpus/1/mig", "Enabled"), "warn", "gpu", "GPU 1 on b is cut up by MIG"),
    "ecc": (change("machine/gpus/gpus/0/ecc_errors", "2"), "warn", "gpu", "GPU 0 on b had 2 uncorrected"),
    "in use": (
        change("torch/free", 40 * GIB),
        "warn",
        "gpu memory",
        "40 GiB of 80 GiB free on cuda:0 on b: others use it",
    ),
    "hot": (change("load/reasons", [0x1, 0x20 | 0x4]), "warn", "gpu load", "GPU 1 on b is held back: too hot"),
    "slow gpu": (change("load/tflops", 400.0), "warn", "gpu load", "cuda:0 on b: 400 TFLOP/s, the median is 700"),
    "wrong product": (
        change("load", {"error": "a product of matrices is wrong"}),
        "fail",
        "gpu load",
        "a product of matrices",
    ),
    "wandb away": (
        change("wandb/error", "ConnectionError: refused"),
        "fail",
        "wandb",
        "api.wandb.ai: ConnectionError: refused on b",
    ),
    "wandb key": (change("wandb/answer", "refused"), "fail", "wandb", "api.wandb.ai refuses the key on b"),
    "gated": (change("hub/answer", "gated"), "fail", "hub", "org/model: gated on b"),
    "hub away": (
        change("hub/error", "ConnectError: no route"),
        "fail",
        "hub",
        "org/model is not in the cache on b, and",
    ),
    "hub cached": (cached_only, "warn", "hub", "is in the cache on b"),
}
