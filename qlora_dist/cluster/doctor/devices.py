"""What torch says of a machine's GPUs, what they do under load, and how fast the ranks of a group exchange data."""

import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore

from qlora_dist.cluster.doctor.machine import clocks_now, throttle_reasons
from qlora_dist.cluster.doctor.meeting import Meeting

Facts = dict[str, Any]
LOAD_S = 1.5
MATRIX = 8192
# Bytes of one all-reduce, of which there are so many after one that is not counted.
MESSAGES = {"gloo": (16 << 20, 3), "nccl": (256 << 20, 5)}


def device_facts(wanted: str, local_rank: int) -> Facts:
    """What torch sees from this rank.

    Args:
        wanted: `launch.device`.

    Returns:
        device: "cuda:N" of this rank, None where it computes on the CPU; with it name, capability, free and total
            bytes. error: why CUDA does not work here.
    """
    facts: Facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": None, "count": 0}
    if wanted == "cpu":
        return facts
    facts["count"] = torch.cuda.device_count()
    if not torch.cuda.is_available():
        if torch.version.cuda is not None:
            facts["error"] = _why_not()
        return facts
    if local_rank >= facts["count"]:
        return facts | {"error": f"local rank {local_rank} sees {facts['count']} GPU(s)"}
    properties = torch.cuda.get_device_properties(local_rank)
    torch.cuda.set_device(local_rank)
    free, total = torch.cuda.mem_get_info()
    return facts | {
        "device": f"cuda:{local_rank}", "name": properties.name, "free": free, "total": total,
        "capability": [properties.major, properties.minor],
    }  # fmt: skip


def _why_not() -> str:
    try:
        torch.cuda.init()
    except Exception as error:  # torch has several kinds; its words are the finding
        return str(error).splitlines()[0]
    return "torch.cuda.is_available() is False"


def used_bytes(device: str) -> int:
    """What all processes have on a GPU."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def load(device: str, watches: bool) -> Facts:
    """Multiply matrices for a second and a half.

    Args:
        watches: ask nvidia-smi meanwhile.

    Returns:
        tflops: 2 N^3 FLOP a product of N x N matrices. reasons, clocks: of all GPUs of this machine under load, as
            nvidia-smi tells them. error: a product was wrong, or bitsandbytes does not work here.
    """
    dtype = torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    ones = torch.ones(MATRIX, MATRIX, dtype=dtype, device=device)
    product = ones @ ones
    torch.cuda.synchronize(device)
    watched: Facts = {}

    def watch() -> None:
        time.sleep(LOAD_S / 3)
        watched["reasons"], watched["clocks"] = throttle_reasons(), clocks_now()

    watcher = threading.Thread(target=watch, daemon=True)
    if watches:
        watcher.start()
    count, begun = 0, time.perf_counter()
    # nvidia-smi takes a second where the driver does not stay loaded: the load lasts until it has looked.
    while time.perf_counter() - begun < LOAD_S or (watcher.is_alive() and time.perf_counter() - begun < 4 * LOAD_S):
        for _ in range(10):
            torch.mm(ones, ones, out=product)
        torch.cuda.synchronize(device)
        count += 10
    elapsed = time.perf_counter() - begun
    # A power of two is exact in both types.
    if not bool((product == MATRIX).all()):
        return {"error": f"a product of matrices is wrong on {device}"}
    _quantise(device)
    return {"tflops": 2 * MATRIX**3 * count / elapsed / 1e12, **watched}


def _quantise(device: str) -> None:
    """A round through NF4.

    Raises:
        RuntimeError: bitsandbytes gives back something else.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values = torch.linspace(-1, 1, 4096, device=device)
    packed, state = quantize_4bit(values, quant_type="nf4")
    # The widest gap between two values of NF4 is 0.304.
    if (dequantize_4bit(packed, state) - values).abs().max() > 0.16:
        raise RuntimeError("bitsandbytes quantises wrongly on this GPU")


def bandwidth(backend: str, meeting: Meeting, device: str) -> Facts:
    """All-reduce among the members.

    Returns:
        gb_s: bus bandwidth in 1e9 bytes a second, 2 (n - 1) / n times the message over its time, as nccl-tests count
            it, of the fastest all-reduce. ms: its time.

    Raises:
        RuntimeError: a rank did not come, or the sum is wrong.
    """
    size, rounds = MESSAGES[backend]
    ranks = len(meeting.members)
    dist.init_process_group(
        backend, store=PrefixStore(backend, meeting.store), rank=meeting.members.index(meeting.rank),
        world_size=ranks, timeout=timedelta(seconds=meeting.limit_s),
    )  # fmt: skip
    try:
        values, times = torch.empty(size // 4, device=device), []
        for _ in range(1 + rounds):
            values.fill_(1)
            _synchronize(device)
            begun = time.perf_counter()
            dist.all_reduce(values)
            _synchronize(device)
            times.append(time.perf_counter() - begun)
        if not bool((values == ranks).all()):
            raise RuntimeError(f"the sum over {ranks} ranks is wrong")
    finally:
        dist.destroy_process_group()
    best = min(times[1:])
    return {"gb_s": 2 * (ranks - 1) / ranks * size / best / 1e9, "ms": 1e3 * best, "ranks": ranks}


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
