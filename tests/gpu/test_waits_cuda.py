"""Time in collectives on a GPU: what the stream stands still for within the brackets, read without a wait."""

import time

import pytest
import torch

from qlora_dist.shard.waits import Waits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
CYCLES = 100_000_000  # tens of milliseconds


def sleep_ms() -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    torch.cuda._sleep(CYCLES)
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def test_stalls_are_told_from_computation() -> None:
    """Two sleeps of this stream are computation; three of another one, which starts at once, are waited for."""
    device = torch.device("cuda")
    sleep_ms()
    one = sleep_ms() / 1000
    waits, side = Waits(device, every_s=0.0), torch.cuda.Stream()
    torch.cuda.synchronize()
    began = time.perf_counter()
    waits.begin_step()
    torch.cuda._sleep(CYCLES)
    with torch.cuda.stream(side):
        torch.cuda._sleep(3 * CYCLES)
    with waits:
        torch.cuda.current_stream().wait_stream(side)
    torch.cuda._sleep(CYCLES)
    waits.end_step(7)
    assert time.perf_counter() - began < one, "the host has waited"
    assert waits.busy.steps == 0
    torch.cuda.synchronize()
    waits.begin_step()
    torch.cuda._sleep(CYCLES)
    waits.end_step(1)
    assert (waits.busy.steps, waits.busy.positions) == (1, 7)
    assert waits.busy.seconds == pytest.approx(2 * one, rel=0.2)


def test_a_step_is_measured_now_and_then() -> None:
    waits = Waits(torch.device("cuda"), every_s=1000.0)
    for _ in range(3):
        waits.begin_step()
        with waits:
            pass
        waits.end_step(1)
        torch.cuda.synchronize()
    assert waits.busy.steps <= 1
