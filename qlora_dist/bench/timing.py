"""Times on a GPU, by its own clock, and the rates that it reaches at what it does best: copies and GEMMs."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The GPU stands still for so many of its cycles (about 5 ms) while the host queues the launches that are timed.
HEAD_START_CYCLES = 8_000_000
LAUNCHES = 10
ROUNDS = 7
# 2 GiB: forty times the L2 cache of an H100.
COPY_BYTES = 2**31


def device_ms(run: Callable[[], Any], launches: int = LAUNCHES, rounds: int = ROUNDS) -> float:
    """Milliseconds of one `run` on the current CUDA device: the median of `rounds`, each of `launches` in a row.

    The host's time is none of it as long as it queues them faster than `HEAD_START_CYCLES`. What `run` touches should
    exceed the L2 cache, since one run follows the other.
    """
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        for _ in range(launches):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / launches)
    return statistics.median(times)


def host_us(run: Callable[[], Any], launches: int = 50) -> float:
    """Microseconds that the host takes to queue one `run`."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(launches):
        run()
    spent = (time.perf_counter() - started) / launches * 1e6
    torch.cuda.synchronize()
    return spent


def copy_gb_s() -> float:
    """GB/s of a large device copy, read and write counted: the faster of the driver's copy and a kernel's."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda").zero_()
    target = torch.empty_like(source)
    ms = min(
        device_ms(lambda: target.copy_(source), launches=4),
        device_ms(lambda: torch.add(source, 1.0, out=target), launches=4),
    )
    return 2 * COPY_BYTES / ms / 1e6


def gemm_ms(m: int, k: int, n: int) -> tuple[float, float]:
    """Milliseconds of x [m, k] @ w [n, k]' and of y [m, n] @ w [n, k], in bf16: a linear layer's forward and dx."""
    x, w, y = random(m, k), random(n, k), torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    forward = device_ms(lambda: torch.mm(x, w.t(), out=y), launches=5)
    y.normal_()
    return forward, device_ms(lambda: torch.mm(y, w, out=x), launches=5)


def tflop_s(flop: float, ms: float) -> float:
    """TFLOP/s of so many FLOP in so many milliseconds."""
    return flop / ms / 1e9


def random(*shape: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Normal values: zeros would let a GPU clock higher than it does in training."""
    return torch.empty(shape, dtype=dtype, device=device).normal_(0, scale)
