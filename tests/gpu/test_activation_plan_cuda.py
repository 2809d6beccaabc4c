"""Plans made from a real GPU's memory, an out-of-memory error of its allocator, and documents by their borders."""

import contextlib
import gc
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from qlora_dist.kernels.documents import documents_attention
from qlora_dist.train.loop import Loop
from tests.distributed.group import series
from tests.gpu.test_cuda import train_on_gpu
from tests.single import small_config
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
SECTIONS: dict[str, Any] = {
    "model": {"compute_dtype": "bf16"},
    "adapter": {"lora_dropout": 0.0},
    "data": {"packing": True, "max_length": 512},
    "train": {"optim": "adamw_8bit", "global_batch_size": 8, "per_device_train_batch_size": 8, "max_steps": 4},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that what a layer keeps is megabytes."""
    return make_tiny_model(tmp_path_factory.mktemp("base"), hidden_size=512, num_layers=12)


def told(run_dir: Path, kind: str) -> list[str]:
    events = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [event["message"] for event in events if event["kind"] == kind]


def run(folder: Path, base: Path, **train: Any) -> tuple[Path, int]:
    """A run's folder, and the most bytes allocated in its steps."""
    config = small_config(folder, base, **SECTIONS | {"train": SECTIONS["train"] | train})
    steps = Loop.train

    def watched(loop: Loop) -> None:
        torch.cuda.reset_peak_memory_stats()
        steps(loop)
        peaks.append(torch.cuda.max_memory_allocated())

    peaks: list[int] = []
    gc.collect()
    with mock.patch.object(Loop, "train", watched):
        assert train_on_gpu(config)["state"] == "finished"
    return config.run_dir, peaks[0]


def test_auto_keeps_what_fits_and_trains_the_same(base: Path, tmp_path: Path) -> None:
    """The GPU is far larger than the model, so everything is kept; the cap of the third run lets some of it be kept."""
    lean, lean_peak = run(tmp_path / "lean", base, activations="recompute")
    auto, auto_peak = run(tmp_path / "auto", base)
    (line,) = told(auto, "memory")
    assert "gate and up of all 12 layers, attention of all 12 layers, dequantised weights of all 12 layers" in line
    assert auto_peak > lean_peak
    for metric in ("loss", "grad_norm"):
        assert series(auto, metric) == pytest.approx(series(lean, metric), rel=1e-2)


def test_a_budget_is_kept_to(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_dist.train import activation_plan

    _, lean_peak = run(tmp_path / "lean", base, activations="recompute")
    _, keep_peak = run(tmp_path / "keep", base, activations="keep")
    limit = int(lean_peak + 0.6 * (keep_peak - lean_peak)) + activation_plan.MARGIN_BYTES
    monkeypatch.setattr(activation_plan, "memory_limit", lambda device: int(limit / (1 - activation_plan.MARGIN_SHARE)))
    some, peak = run(tmp_path / "some", base)
    (line,) = told(some, "memory")
    assert "of 12 layers" in line
    assert lean_peak < peak <= limit


def test_a_real_out_of_memory_error_costs_layers_and_no_step(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else fills the GPU after the plan was made, so that the plan fits no longer."""
    from qlora_dist.train import loop

    plain, _ = run(tmp_path / "plain", base, activations="keep")
    hoard: list[torch.Tensor] = []
    accumulate, steps = loop.accumulate_gradients, iter(range(100))

    def crowded(*arguments: Any) -> torch.Tensor:
        """Before the third step all memory is taken but for 60 % of what the second one took, in one piece."""
        step = next(steps)
        if step == 1:
            torch.cuda.reset_peak_memory_stats()
        if step == 2:
            wanted = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            torch.cuda.empty_cache()
            room = torch.empty(int(0.6 * wanted), dtype=torch.uint8, device="cuda")
            for size in (2**30, 2**26, 2**22, 2**20, 2**16):
                with contextlib.suppress(torch.OutOfMemoryError):
                    while True:
                        hoard.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            del room
        return accumulate(*arguments)

    monkeypatch.setattr(loop, "accumulate_gradients", crowded)
    crowd, _ = run(tmp_path / "crowd", base)
    hoard.clear()
    assert any("out of memory at step 3" in message for message in told(crowd, "notice"))
    for metric in ("loss", "grad_norm"):
        assert series(crowd, metric) == pytest.approx(series(plain, metric), rel=1e-2)


@pytest.mark.parametrize("window", [None, 100])
def test_documents_attend_by_their_borders(window: int | None) -> None:
    """bf16 against float64 with a mask: as far off as a rounding and what FlashAttention rounds within."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 512, 64, generator=generator, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)
    )
    borders = torch.tensor([0, 37, 300, 512, 513, 800, 1024], dtype=torch.int32, device="cuda")
    grad = torch.randn(2, 8, 512, 64, generator=generator, device="cuda", dtype=torch.bfloat16)
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = documents_attention(*inputs, borders, 512, 0.125, window)
        found.append([out, *torch.autograd.grad(out, inputs, grad.to(dtype))])
    for ours, wanted in zip(*found, strict=True):
        assert ((ours.double() - wanted).norm() / wanted.norm()).item() < 1e-2
