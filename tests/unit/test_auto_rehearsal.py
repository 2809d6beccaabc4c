"""How `auto` goes from a rehearsal to a plan, on a made-up GPU whose peak is the sum of what layers keep.

The GPU itself is in tests/gpu; here its allocator, its clock and its link are numbers, and everything else is real.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.model.adapter import attach_adapter
from qlora_dist.model.base import load_base
from qlora_dist.model.block import Block, Plan
from qlora_dist.model.fused import fuse
from qlora_dist.plan.activations import LayerShape, gains
from qlora_dist.train import activation_plan
from qlora_dist.train.activation_plan import _set_on_gpu
from qlora_dist.train.largest import Largest
from tests.single import small_config
from tests.tiny import make_tiny_model

CPU, LARGEST = torch.device("cpu"), Largest(4, 2048)
LLAMA_8B, GIB = LayerShape(hidden=4096, intermediate=14336, queries=4096, keys=1024), 2**30
SIZES = {kind: gain.size for kind, gain in gains(LLAMA_8B, 8192, 2048, 2).items()}
INPUT, FIXED, NUMBER_OF_LAYERS = 8192 * 4096 * 2, 5 * GIB, 16
LEAN = FIXED + NUMBER_OF_LAYERS * INPUT


@dataclass
class MadeUpGpu:
    """A rehearsal; `beside`: bytes that the planner does not know of, where anything is kept."""

    blocks: Sequence[Block]
    limit: float
    beside: int = 0
    alone: bool = True
    slow_host: bool = False
    device: torch.device = CPU
    largest: Largest = LARGEST
    element_size: int = 2
    local_workers: int = 1
    peaks: list[float] = field(default_factory=list)
    strategy: Any = field(default_factory=lambda: SimpleNamespace(
        optimizer=SimpleNamespace(state={}, param_groups=[])))  # fmt: skip

    def peak(self) -> float:
        found, moved = float(FIXED), [0]
        for plan in (block.plan for block in self.blocks):
            here = [kind for kind in SIZES if getattr(plan, kind) and not getattr(plan, f"{kind}_on_host", False)]
            found += sum(SIZES[kind] for kind in here) + (0 if plan.input_on_host else INPUT)
            found += self.beside if plan != Plan(attention=False, gate_up=False) else 0
            moved.append(plan.input_on_host * INPUT + plan.attention_on_host * SIZES["attention"])
        self.peaks.append(found + 2 * max(moved))
        if self.peaks[-1] > self.limit:
            raise torch.OutOfMemoryError("full")
        return self.peaks[-1]

    def peak_or_more(self, blocks: Sequence[Block]) -> float:
        try:
            return self.peak()
        except torch.OutOfMemoryError:
            return float("inf")

    def seconds(self) -> float:
        hosted = any(block.plan.attention_on_host for block in self.blocks)
        return 0.6 if hosted != self.slow_host else 0.65


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = make_tiny_model(tmp_path_factory.mktemp("base"), num_layers=NUMBER_OF_LAYERS)
    loaded = load_base(ModelConfig(name=str(base), compute_dtype="fp32"), base, torch.device("cpu"))
    return attach_adapter(loaded, AdapterConfig(r=4), seed=0)


def plan(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: float, link: float = 55e9, host: float = 64,
    leaner: int = 0, **gpu: Any,
) -> tuple[str, MadeUpGpu]:  # fmt: skip
    monkeypatch.setattr(Block, "shape", LLAMA_8B)
    monkeypatch.setattr(activation_plan, "memory_limit", lambda device: int(limit))
    monkeypatch.setattr(activation_plan, "link_bytes_per_second", lambda device: link)
    monkeypatch.setattr(activation_plan, "median_seconds", lambda events: 6.1e-3)
    blocks = fuse(model)
    config = small_config(tmp_path, tmp_path, train={"host_memory_budget_gib": host})
    rehearsal = MadeUpGpu(blocks, limit, **gpu)
    line = _set_on_gpu(config, model, blocks, rehearsal, leaner)  # type: ignore[arg-type]
    return line, rehearsal


def test_what_the_rehearsal_leaves_is_kept_or_travels(model: Any, monkeypatch: Any, tmp_path: Path) -> None:
    line, gpu = plan(model, monkeypatch, tmp_path, LEAN + 0.7 * GIB)
    assert line.startswith("kept: gate and up of")
    assert "in host memory: attention of " in line
    assert all(block.plan.attention for block in gpu.blocks)
    assert sum(block.plan.attention_on_host for block in gpu.blocks) > 12
    assert "600 ms in rehearsal, 650 without the host" in line
    assert gpu.peaks[-1] <= gpu.limit
    forbidden, _ = plan(model, monkeypatch, tmp_path, LEAN + 0.7 * GIB, host=0)
    assert "host" not in forbidden
    saved = [int(told.split(" ms a micro-batch")[0].rsplit(" ", 1)[1]) for told in (line, forbidden)]
    assert saved[0] > saved[1] + 10


def test_the_host_is_left_out_where_it_is_measured_to_be_slower(model: Any, monkeypatch: Any, tmp_path: Path) -> None:
    line, gpu = plan(model, monkeypatch, tmp_path, LEAN + 3 * GIB, slow_host=True)
    assert "in host memory" not in line
    assert "650 ms in rehearsal, 600 without the host" in line
    assert not any(block.plan.attention_on_host or block.plan.input_on_host for block in gpu.blocks)
    everything, gpu = plan(model, monkeypatch, tmp_path, LEAN + 60 * GIB)
    assert everything.startswith("kept: gate and up of all 16 layers, attention of all 16 layers, dequantised weights")
    assert len(gpu.peaks) == 2, "nothing is compared where nothing travels"


@pytest.mark.parametrize("alone", [True, False])
def test_a_plan_that_takes_more_than_its_tensors_shrinks(
    model: Any, monkeypatch: Any, tmp_path: Path, alone: bool
) -> None:
    _, gpu = plan(model, monkeypatch, tmp_path, LEAN + 3 * GIB, beside=2**26, alone=alone)
    assert gpu.peaks[1] > gpu.limit, "the first plan was too large"
    kept = sum(block.plan.gate_up for block in gpu.blocks)
    assert kept
    assert gpu.peak() <= gpu.limit


def test_what_a_single_workers_rehearsal_leaves_is_filled(model: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """Less is taken than the planner thinks; several workers leave it at that."""
    found = []
    for alone in (True, False):
        _, gpu = plan(model, monkeypatch, tmp_path, LEAN + 3 * GIB, beside=-(2**26), alone=alone)
        found.append(sum(block.plan.gate_up for block in gpu.blocks))
        assert gpu.peak() <= gpu.limit
    assert found[0] > found[1]


def test_where_recomputation_does_not_fit_inputs_travel(model: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """The first rehearsal runs out of memory; as many inputs travel as it takes, with some waiting for a slow link."""
    line, gpu = plan(model, monkeypatch, tmp_path, LEAN - 0.1 * GIB, link=8e9)
    assert "in host memory: inputs of " in line
    assert "at 8 GB/s" in line
    assert "without the host" not in line, "there is nothing to compare it with"
    assert gpu.peaks[0] > gpu.limit
    assert gpu.peak() <= gpu.limit
    with pytest.raises(torch.OutOfMemoryError, match="host_memory_budget_gib"):
        plan(model, monkeypatch, tmp_path, LEAN - 0.1 * GIB, host=0)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        plan(model, monkeypatch, tmp_path, FIXED)


def test_a_leaner_plan_keeps_less_and_the_leanest_nothing(model: Any, monkeypatch: Any, tmp_path: Path) -> None:
    kept = []
    for leaner in range(5):
        _, gpu = plan(model, monkeypatch, tmp_path, LEAN + 4 * GIB, leaner=leaner, alone=False)
        kept.append(sum(2 * block.plan.gate_up + block.plan.attention for block in gpu.blocks))
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 0
    assert kept[0] > kept[1]
