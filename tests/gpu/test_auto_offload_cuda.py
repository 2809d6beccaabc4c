"""Copies to the host where they matter: beside the computation, in bounded memory, and with a host that never waits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_dist.model.host_store import HostStore, link_bytes_per_second, store_of
from qlora_dist.train import activation_plan
from qlora_dist.train.loop import Loop
from tests.distributed.group import series
from tests.gpu.test_activation_plan_cuda import run, told
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
LAYERS, NBYTES = 10, 2**26


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"), hidden_size=512, num_layers=12)


def test_copies_hide_and_memory_is_that_of_two_layers() -> None:
    """A forward and a backward of products that each take twice as long as a layer's copy: by the GPU's clock they are
    hardly slower with the copies than without, and what came back is what left."""
    device = torch.device("cuda", 0)
    store = HostStore(device)
    a, b, out = (torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) for _ in range(3))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.mm(a, b, out=out)
    begin.record()
    for _ in range(50):
        torch.mm(a, b, out=out)
    end.record()
    end.synchronize()
    rounds = int(2 * NBYTES / link_bytes_per_second(device) / (begin.elapsed_time(end) / 50 / 1e3)) + 1

    def step(moves: bool) -> tuple[float, int, torch.Tensor]:
        wrong = torch.zeros((), device=device, dtype=torch.int64)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, stored = torch.cuda.memory_allocated(), []
        torch.cuda.set_sync_debug_mode("error")
        begin.record()
        for number in range(LAYERS):
            if moves:
                store.begin_layer()
                tensor = torch.full((NBYTES // 4,), number, device=device, dtype=torch.int32)
                stored.append(store.put(tensor))
                del tensor
            for _ in range(rounds):
                torch.mm(a, b, out=out)
        for number in reversed(range(LAYERS)):
            if moves:
                tensor = store.get(stored.pop())
                wrong += (tensor[:: 2**12] != number).any()
                del tensor
            for _ in range(rounds):
                torch.mm(a, b, out=out)
        end.record()
        torch.cuda.set_sync_debug_mode("default")
        peak = torch.cuda.max_memory_allocated() - before
        end.synchronize()
        return begin.elapsed_time(end), peak, wrong

    try:
        found = [step(moves) for moves in (False, True, True, False)]
        taken = store.memory.taken
        found += [step(True), step(False)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert store.memory.taken == taken == -(-LAYERS * NBYTES // 2**28) * 2**28
    assert all(int(wrong) == 0 for _, _, wrong in found)
    # Two layers', the one that is made, and the comparison's.
    assert max(peak for _, peak, _ in found) <= 3.2 * NBYTES
    moved, still = min(found[n][0] for n in (2, 4)), min(found[n][0] for n in (0, 3, 5))
    assert moved < 1.1 * still, (moved, still)


def test_auto_takes_the_host_into_account(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In room for little more than recomputation; with the host forbidden, the same run without it."""
    lean, lean_peak = run(tmp_path / "lean", base, activations="recompute")
    _, keep_peak = run(tmp_path / "keep", base, activations="keep")
    limit = int(lean_peak + 0.25 * (keep_peak - lean_peak)) + activation_plan.MARGIN_BYTES
    monkeypatch.setattr(activation_plan, "memory_limit", lambda device: int(limit / (1 - activation_plan.MARGIN_SHARE)))
    forbidden, _ = run(tmp_path / "forbidden", base, host_memory_budget_gib=0)
    (line,) = told(forbidden, "memory")
    assert "in host memory" not in line
    assert "as predicted" in line
    # A model as small as this one is as fast without: what is measured here is the plan with.
    monkeypatch.setattr(activation_plan, "_faster", lambda placed, peak, *_: (placed, peak, ""))
    taken: list[int] = []
    step = Loop.take_step

    def watched(loop: Loop) -> None:
        taken.append(store_of(loop.device).memory.taken)
        step(loop)

    monkeypatch.setattr(Loop, "take_step", watched)
    auto, peak = run(tmp_path / "auto", base)
    (line,) = told(auto, "memory")
    assert "in host memory: attention" in line, line
    assert peak <= limit
    assert len(set(taken)) == 1, "the rehearsal has taken all the host memory there is to take"
    for folder in (forbidden, auto):
        for metric in ("loss", "grad_norm"):
            assert series(folder, metric) == pytest.approx(series(lean, metric), rel=1e-2)


def test_where_not_even_recomputation_fits_inputs_go_to_the_host(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lean, lean_peak = run(tmp_path / "lean", base, activations="recompute")
    input_bytes = 8 * 512 * 512 * 2
    limit = lean_peak - 4 * input_bytes
    monkeypatch.setattr(activation_plan, "memory_limit", lambda device: limit)
    monkeypatch.setattr(activation_plan, "MARGIN_BYTES", 0)
    auto, peak = run(tmp_path / "auto", base)
    (line,) = told(auto, "memory")
    assert "inputs of " in line
    assert peak <= limit
    for metric in ("loss", "grad_norm"):
        assert series(auto, metric) == pytest.approx(series(lean, metric), rel=1e-2)


@pytest.mark.parametrize("kind", ["offload", "auto"])
def test_a_step_synchronises_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """In forward and backward, after the first step, which makes kernels and takes the host's memory."""
    from qlora_dist.train import loop as loop_module

    accumulate, calls = loop_module.accumulate_gradients, iter(range(100))

    def strict(*arguments: Any) -> torch.Tensor:
        watches = next(calls) > 0
        torch.cuda.set_sync_debug_mode("error" if watches else "default")
        try:
            return accumulate(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    if kind == "auto":
        monkeypatch.setattr(activation_plan, "_faster", lambda placed, peak, *_: (placed, peak, ""))
        _, lean_peak = run(tmp_path / "lean", base, activations="recompute")
        limit = int(1.02 * lean_peak) + activation_plan.MARGIN_BYTES
        monkeypatch.setattr(
            activation_plan, "memory_limit", lambda device: int(limit / (1 - activation_plan.MARGIN_SHARE))
        )
    monkeypatch.setattr(loop_module, "accumulate_gradients", strict)
    folder, _ = run(tmp_path / "run", base, activations=kind)
    (line,) = told(folder, "memory")
    assert "in host memory" in line
