"""After warm-up a step holds no host synchronisation: neither PyTorch nor a profile of CUDA's own calls sees one.

Logging is no exception any more: what a step came to is waited for by its event, a step later.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from qlora_dist.train import loop as loop_module
from tests.gpu.test_cuda import train_on_gpu
from tests.single import small_config
from tests.tiny import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

WARM_UP, STEPS = 3, 8
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy", "cuStreamSynchronize", "cuCtxSynchronize"}
RANGE = "watched step"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for an adapter whose flat state is paged (100,000 elements and more)."""
    return make_tiny_model(tmp_path_factory.mktemp("wide"), hidden_size=256)


@pytest.mark.parametrize("strategy", ["none", "ddp"])
@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch", "sgd"])
def test_steps_after_warm_up_wait_for_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str, strategy: str
) -> None:
    take_step = loop_module.Loop.take_step
    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    paged: list[bool] = []

    def watched(loop: Any) -> None:
        step = loop.progress.step
        if step < WARM_UP:
            take_step(loop)
            return
        if step == WARM_UP:
            torch.cuda.synchronize()
            profiler.start()
            states = loop.strategy.optimizer.state.values()
            paged.append(any(getattr(s.get("state1"), "is_paged", False) for s in states))
        torch.cuda.set_sync_debug_mode("error")
        try:
            with record_function(RANGE):
                take_step(loop)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if loop.progress.step == STEPS:
            profiler.stop()

    monkeypatch.setattr(loop_module.Loop, "take_step", watched)
    config = small_config(
        tmp_path, base, model={"compute_dtype": "bf16", "fused": "always"},
        adapter={"r": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
        train={"optim": optim, "max_steps": STEPS, "max_grad_norm": 0.5}, checkpoint={"save_steps": 100},
        shard={"strategy": strategy},
    )  # fmt: skip
    assert train_on_gpu(config)["state"] == "finished"
    assert paged == [optim.startswith("paged")]
    events = profiler.events()
    assert events is not None
    steps = [event.time_range for event in events if event.name == RANGE and event.device_type.name == "CPU"]
    assert len(steps) == STEPS - WARM_UP
    waits = [
        event.name
        for event in events
        if event.name in WAITS and any(s.start <= event.time_range.start <= s.end for s in steps)
    ]
    assert not waits, waits
    launches = sum(event.name in ("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx") for event in events)
    assert launches > 100, "the profile is to see CUDA's calls"
