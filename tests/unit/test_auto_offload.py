"""A plan of `train.activations: auto` whose layers wait in host memory trains what one that keeps everything trains.

Nothing is rounded on the way, so in fp32 on a CPU losses, norms and the adapter are the same to the bit. The plan is
the real planner's, for a GPU and a link that are made up; on a CPU the host's memory is another piece of the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_dist.config.schema import AdapterConfig, ModelConfig
from qlora_dist.model.adapter import attach_adapter
from qlora_dist.model.base import load_base
from qlora_dist.model.block import RECOMPUTE_ALL, Block, Plan, run_block
from qlora_dist.model.fused import fuse
from qlora_dist.model.host_store import HostStore, store_of
from qlora_dist.plan.activations import Choice, LayerShape, gains
from qlora_dist.plan.offload import Link, place
from qlora_dist.train import activation_plan, leaner_plan
from tests.distributed.group import series
from tests.single import small_config, train_here
from tests.tiny import make_tiny_model
from tests.unit.test_leaner_plan import told

FUSED: dict[str, Any] = {"model": {"fused": "always", "compute_dtype": "fp32"}, "adapter": {"lora_dropout": 0.0}}
NUMBER_OF_LAYERS, LLAMA_8B = 6, LayerShape(hidden=4096, intermediate=14336, queries=4096, keys=1024)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More layers than can be under way."""
    return make_tiny_model(tmp_path_factory.mktemp("base"), num_layers=NUMBER_OF_LAYERS)


def for_a_small_gpu(blocks: Sequence[Block], leaner: int) -> list[Choice]:
    """An 8B model's layers in room for one gate and up, with a link that hides all copies."""
    costs = [gains(LLAMA_8B, 8192, 2048, 2)] * len(blocks)
    inputs = [8192 * LLAMA_8B.hidden * 2] * len(blocks)
    room = 2 * (costs[0]["attention"].size + inputs[0]) - len(blocks) * inputs[0] + costs[0]["gate_up"].size
    placed = place(costs, inputs, room, Link(1e12, 1.0, 1e12))
    assert placed.size <= room
    return placed.choices


@pytest.mark.parametrize("strategy", ["none", "ddp", "fsdp"])
def test_layers_on_the_host_train_the_same_to_the_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    sections = FUSED | {"shard": {"strategy": strategy}}
    keep = small_config(tmp_path / "keep", base, **sections | {"train": {"activations": "keep"}})
    assert train_here(keep)["state"] == "finished"
    auto = small_config(tmp_path / "auto", base, **sections)
    store = HostStore(torch.device("cpu"))
    store.min_bytes = 1
    for module in ("block", "attention"):
        monkeypatch.setattr(f"qlora_dist.model.{module}.store_of", lambda device: store)
    monkeypatch.setattr(activation_plan, "choices_on_cpu", for_a_small_gpu)
    forwards, begin = [], store.begin_layer
    monkeypatch.setattr(store, "begin_layer", lambda: (forwards.append(1), begin()))
    assert train_here(auto)["state"] == "finished"
    (line,) = told(auto.run_dir, "memory")
    assert "kept: gate and up of 1 of 6 layers; in host memory: attention of all 6 layers, inputs of all 6" in line
    assert store.moved > 0
    assert not store.leaving
    assert not store.coming
    for metric in ("loss", "grad_norm"):
        assert series(auto.run_dir, metric) == series(keep.run_dir, metric)
    ours, wanted = (load_file(config.run_dir / "adapter" / "adapter_model.safetensors") for config in (auto, keep))
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())
    # Evaluation moves nothing.
    assert len(forwards) == NUMBER_OF_LAYERS * 2 * auto.train.max_steps


def fused_model(base: Path, r: int = 4, **adapter: Any) -> tuple[Any, list[Block]]:
    loaded = load_base(ModelConfig(name=str(base), compute_dtype="fp32"), base, torch.device("cpu"))
    model = attach_adapter(loaded, AdapterConfig(r=r, **adapter), seed=0)
    return model, fuse(model)


def test_a_layer_keeps_what_the_plan_takes_it_to_keep(base: Path) -> None:
    """At a rank that is no small part, by all storages that a layer's backward holds."""
    model, blocks = fused_model(base, r=64)
    ids = torch.arange(3, 43)[None]
    sizes = {kind: gain.size for kind, gain in gains(blocks[0].shape, ids.numel(), ids.numel(), 4).items()}
    held = {}
    for kind in ("nothing", "gate_up", "attention", "weights", "norms"):
        kept = {"gate_up", "attention", "norms"} if kind == "norms" else {kind}
        for block in blocks:
            block.set_plan(Plan(**{name: name in kept for name in sizes}))
        storages: dict[int, int] = {}

        def count(tensor: torch.Tensor | None, found: dict[int, int] = storages) -> Any:
            if tensor is not None and not isinstance(tensor, torch.nn.Parameter):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x_BTH = torch.rand(1, ids.numel(), 64, requires_grad=True)
        rope = model.get_base_model().model.rotary_emb(x_BTH, torch.arange(ids.numel())[None])
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            made: Any = run_block(blocks[0], x_BTH, *rope, None).grad_fn
        attended = [] if made.attended is None else [made.attended.xa_MR, made.attended.normed_MW]
        for tensor in (*attended, made.out_xa, *(made.gate_up or ()), *(p._kept for p in blocks[0].projections)):
            count(tensor)
        held[kind] = sum(storages.values())
    held["norms"] -= held["gate_up"] + held["attention"] - 2 * held["nothing"]
    # Beside it: 1 / rms of each token, and of each head the log of the softmax's sum.
    for kind, size in sizes.items():
        assert 0 <= held[kind] - held["nothing"] - size <= ids.numel() * (4 + 2) * 4, kind


def test_layers_before_the_first_adapter_send_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes back from there, so that nobody would ask for it."""
    model, blocks = fused_model(base, target_modules=["q_proj", "down_proj"], layers_to_transform=[3, 5])
    store = HostStore(torch.device("cpu"))
    store.min_bytes = 1
    for module in ("block", "attention"):
        monkeypatch.setattr(f"qlora_dist.model.{module}.store_of", lambda device: store)
    for block in blocks:
        block.set_plan(Plan(input_on_host=True, attention_on_host=True))
    ids = torch.arange(3, 43)[None]
    loss = model(input_ids=ids, use_cache=False).logits.square().mean()
    assert store.group == 3
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert [block.trains for block in blocks] == [False, False, False, True, True, True]
    loss.backward()
    assert store.group == 3
    assert not store.leaving


def test_what_is_on_the_host_is_given_up_last_and_inputs_stay(base: Path) -> None:
    _, blocks = fused_model(base)
    for number, block in enumerate(blocks):
        block.set_plan(Plan(gate_up=number >= 4, input_on_host=number < 4, attention_on_host=True))
    lines = []
    while (line := leaner_plan.lean_down(blocks)) is not None:
        lines.append(line)
    # Six layers by quarters: two at a time.
    assert lines == [
        "in host memory: attention of all 6 layers, inputs of 4 of 6 layers",
        "in host memory: attention of 4 of 6 layers, inputs of 4 of 6 layers",
        "in host memory: attention of 2 of 6 layers, inputs of 4 of 6 layers",
        "all of 6 layers recomputed; in host memory: inputs of 4 of 6 layers",
    ]
    assert [block.plan == RECOMPUTE_ALL for block in blocks] == [False] * 4 + [True] * 2


def test_a_graph_that_is_thrown_away_leaves_nothing_under_way() -> None:
    store = store_of(torch.device("cpu"))
    for _ in range(4):
        store.begin_layer()
        kept = [store.put(torch.rand(3)) for _ in range(2)]
    store.get(kept[0])
    assert store.leaving
    del kept
    from qlora_dist.model.host_store import settle_all

    settle_all()
    assert not store.leaving
    assert not store.coming
    store.begin_layer()
    assert not store.order


def test_a_persons_budget_of_host_memory_counts_and_half_of_what_is_free_else(base: Path, tmp_path: Path) -> None:
    asked = small_config(tmp_path, base, train={"host_memory_budget_gib": 3})
    assert activation_plan.bytes_of_host(asked, 8) == activation_plan.PACKED * 3 * 2**30
    plain = small_config(tmp_path, base)
    alone, shared = (activation_plan.bytes_of_host(plain, workers) for workers in (1, 4))
    assert alone / 4 == pytest.approx(shared, rel=0.2)
    assert 0 < alone <= 0.5 * activation_plan.host_memory()["total"]
