"""Each kernel's time beside its ceiling and its peers' times."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch

from qlora_dist.bench.bound import Shape
from qlora_dist.bench.document import Record
from qlora_dist.bench.kernel_cases import GROUPS, Case, Run
from qlora_dist.bench.timing import device_ms, gemm_ms, host_us, tflop_s

gemm_times = cache(gemm_ms)


def kernel_records(shape: Shape, tokens: int, copy_gb_s: float, only: Sequence[str] = ()) -> Iterator[Record]:
    """A record a kernel: name, shape, ms, host_us, gb_s or tflop_s, of_ceiling, and peers (name to ms, or why not).

    The ceiling is `copy_gb_s` for what moves bytes, and cuBLAS's own time for the GEMMs in it for what computes. A
    kernel that runs out of memory is a record that says so.

    Args:
        only: parts of the names of those to measure; all where empty.
    """
    for group in GROUPS:
        for case in group(shape, tokens, "cuda"):
            if not only or any(part in case.name for part in only):
                yield timed(case, copy_gb_s)
        torch.cuda.empty_cache()


def timed(case: Case, copy_gb_s: float) -> Record:
    """Time a case and its peers; see `kernel_records`."""
    record: Record = {"name": case.name, "shape": case.shape, "outcome": "ok"}
    ms = milliseconds(case.run, device_ms)
    if isinstance(ms, str):
        return record | {"outcome": "failed", "why": ms}
    record |= {"ms": ms, "host_us": host_us(case.run, 10), "peers": {}}
    if case.moved is not None:
        rate = case.moved / ms / 1e6
        record |= {"gb_s": rate, "of_ceiling": rate / copy_gb_s}
    if case.gemms:
        alone = sum(gemm_times(m, k, n)[0 if forward else 1] for m, k, n, forward in case.gemms)
        flop = sum(2.0 * m * k * n for m, k, n, _ in case.gemms)
        record |= {"tflop_s": tflop_s(flop, ms), "of_ceiling": alone / ms}
    for name, run in case.peers.items():
        record["peers"][name] = run if isinstance(run, str) else milliseconds(run, device_ms)
    return record


def milliseconds(run: Run, clock: Callable[[Run], float]) -> float | str:
    """The time of a run; of one that does not work here, why. A peer's version may take other arguments."""
    try:
        return clock(run)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def names(config: dict[str, Any]) -> list[str]:
    """The names of all cases, from ones that are small enough to be made on a CPU."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape = Shape.from_config(config | small | {"num_hidden_layers": 1, "vocab_size": 320, "head_dim": 16})
    return [case.name for group in GROUPS for case in group(shape, 64, "cpu")]
