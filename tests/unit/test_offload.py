"""Offloaded activations and optimizer state change nothing but where they are. What a CPU can show of it."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import AdapterConfig, ModelConfig, TrainConfig
from qlora_dist.model.adapter import attach_adapter, trainable_parameters
from qlora_dist.model.base import load_base
from qlora_dist.model.host_store import HostStore, Kept, PinnedMemory, Stored, store_of
from qlora_dist.optim.optimizers import build_optimizer
from qlora_dist.shard.activations import offload_activations
from tests.distributed.group import series
from tests.single import small_config, train_here

CPU = torch.device("cpu")
IDS = torch.arange(3, 43)[None]


def adapted(base: Path) -> Any:
    model = load_base(ModelConfig(name=str(base), compute_dtype="fp32"), base, CPU)
    return attach_adapter(model, AdapterConfig(r=4, lora_dropout=0.1), seed=0).train()


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    loss = model(input_ids=IDS).logits.square().mean()
    loss.backward()
    return loss, {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_that_went_away_give_the_same_gradients(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    made: list[tuple[int, weakref.ref[Kept]]] = []
    monkeypatch.setattr(
        Kept,
        "__init__",
        lambda self, *a, init=Kept.__init__: (init(self, *a), made.append((self.size, weakref.ref(self))))[0],
    )
    models = adapted(tiny_model), adapted(tiny_model)
    for model in models:
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    offload_activations(models[1], min_bytes=IDS.numel() * 64)
    (loss, grads), (away_loss, away_grads) = map(loss_and_gradients, models)
    assert torch.equal(loss, away_loss)
    assert len(grads) == 28
    assert all(torch.equal(grads[name], grad) for name, grad in away_grads.items())
    hidden = [size for size, _ in made if size == IDS.numel() * 64 * 4]
    # Checkpointed layers save their inputs alone; a tensor that several operations save is copied once.
    assert len(hidden) >= 2 if not checkpointing else len(hidden) in (2, 3)
    assert all(kept() is None for _, kept in made), "what has been used is let go"


def test_parameters_their_views_and_small_tensors_stay(tiny_model: Path) -> None:
    away = HostStore(CPU)
    away.min_bytes = 16
    flat = nn.Parameter(torch.zeros(64))
    view = flat[8:40].view(4, 8)
    small, large = torch.zeros(2), torch.arange(8.0)
    assert [type(away.pack(t)).__name__ for t in (flat, view, small, large)] == [
        "Parameter",
        "Tensor",
        "Tensor",
        "Stored",
    ]
    first, again = away.pack(large), away.pack(large)
    assert isinstance(first, Stored)
    assert isinstance(again, Stored)
    assert first.kept is again.kept
    large += 1
    changed = away.pack(large)
    assert torch.equal(away.get(changed), torch.arange(1.0, 9.0))
    assert len({first.kept, again.kept, changed.kept}) == 2  # type: ignore[union-attr]
    part = torch.zeros(1000)[:10]
    assert away.pack(part) is part, "the rest of it would go along"


def test_memory_that_cannot_be_pinned_is_said_with_the_setting() -> None:
    """Without a GPU none can be."""
    with pytest.raises(UserError, match=r"2\.0 GiB of host memory cannot be pinned .* train\.host_memory_budget_gib"):
        Kept(PinnedMemory(pinned=True), torch.empty(2**31, dtype=torch.uint8).untyped_storage(), 0)


def test_a_new_tensor_at_the_address_of_a_dead_one_is_another(tiny_model: Path) -> None:
    away = HostStore(CPU)
    away.min_bytes = 0
    packed = []
    for value in range(50):
        packed.append(away.pack(torch.full((100,), float(value))))
    assert [float(away.get(kept)[0]) for kept in packed] == [float(value) for value in range(50)]


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch", "lion_8bit", "sgd"])
def test_stepping_parameter_by_parameter_is_stepping(optim: str) -> None:
    """On a CPU the state has nowhere to go; the notice says so, and the steps are the plain ones."""
    from qlora_dist.optim.on_host import keep_on_host

    def parameters() -> dict[str, nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        shapes = {"q.lora_A.weight": (64, 96), "q.lora_B.weight": (96, 64), "small": (10,)}
        return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}

    config = TrainConfig(optim=optim, learning_rate=1e-2, weight_decay=0.01, loraplus_lr_ratio=4.0)
    told: list[str] = []
    plain, ours = parameters(), parameters()
    first = build_optimizer(plain, config, told.append)
    assert not any("shard.offload" in sentence for sentence in told)
    second = build_optimizer(ours, config, told.append, on_host=True)
    assert len([sentence for sentence in told if "shard.offload" in sentence]) == 1
    keep_on_host(second)
    for step in range(3):
        for named, optimizer in ((plain, first), (ours, second)):
            generator = torch.Generator().manual_seed(step)
            for parameter in named.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step == 1:
                named["small"].grad = None
            optimizer.step()
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert [len(group["params"]) for group in second.param_groups] == [2, 1]


def test_a_run_on_a_cpu_says_that_nothing_moves(tiny_model: Path, tmp_path: Path) -> None:
    plain = small_config(tmp_path / "plain", tiny_model, train={"max_steps": 2})
    away = small_config(
        tmp_path / "away", tiny_model, train={"max_steps": 2}, shard={"offload": ["optimizer", "activations"]}
    )
    assert train_here(plain)["state"] == train_here(away)["state"] == "finished"
    events = [json.loads(line) for line in (away.run_dir / "events.jsonl").read_text().splitlines()]
    told = [e["message"] for e in events if e["kind"] == "notice" and "shard.offload" in e["message"]]
    assert sorted(sentence.split()[2] for sentence in told) == ["activations", "adapter"]
    assert series(away.run_dir, "loss") == series(plain.run_dir, "loss")


def test_a_dummy_of_another_device_begins_no_layer(tiny_model: Path) -> None:
    """PyTorch 2.11's checkpoint saves one that is empty, and on a CPU, before each layer's input."""
    model = adapted(tiny_model)
    base = model.get_base_model()
    offload_activations(model, min_bytes=IDS.numel() * 64)
    layers = base.model.layers

    def save_a_dummy(*_: Any) -> None:
        torch.empty(0, device="meta", requires_grad=True).exp()

    for layer in layers:
        layer.register_forward_pre_hook(save_a_dummy)
    store = store_of(CPU)
    before = store.group
    loss_and_gradients(model)
    assert store.group - before == len(layers)
