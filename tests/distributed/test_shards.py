"""What a rank of fsdp and hybrid holds, and what it sees after each gather."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_dist.config.schema import AdapterConfig, ModelConfig, RunConfig, TrainConfig
from qlora_dist.model.adapter import attach_adapter
from qlora_dist.model.base import linear4bit_layers, load_base
from qlora_dist.optim.optimizers import build_optimizer
from qlora_dist.shard import frozen, fsdp
from qlora_dist.shard.fsdp import FullyShard
from qlora_dist.shard.none import Unsharded
from qlora_dist.shard.strategy import make_strategy
from tests.distributed.gloo import in_group
from tests.tiny import make_tiny_model

CPU = torch.device("cpu")
EVERY_BYTE = torch.arange(256, dtype=torch.uint8)


def make_model(base: Path, device: torch.device = CPU) -> Any:
    model = load_base(ModelConfig(name=str(base), compute_dtype="fp32"), base, device)
    return attach_adapter(model, AdapterConfig(r=32, lora_alpha=32), seed=0)


def fill_with_every_byte(model: nn.Module) -> None:
    """Weights and constants of all 4-bit layers become random bytes: every value, and as floats every kind of NaN."""
    generator = torch.Generator().manual_seed(0)
    for layer in linear4bit_layers(model):
        state = layer.weight.quant_state
        for tensor in (layer.weight.data, state.absmax, state.offset, state.state2.absmax):
            raw = tensor.view(-1).view(torch.uint8)
            raw.copy_(torch.randint(256, raw.shape, dtype=torch.uint8, generator=generator))
        layer.weight.data.view(-1)[:256] = EVERY_BYTE.to(layer.weight.device)
        every_byte = EVERY_BYTE[: state.absmax.numel()].to(layer.weight.device)
        state.absmax.view(-1)[: len(every_byte)] = every_byte
    # The patterns that copies of floats are known to change: signalling NaNs of fp32, bf16 and fp16.
    layer.weight.quant_state.offset.view(-1).view(torch.uint8).copy_(torch.tensor([1, 0, 160, 127], dtype=torch.uint8))


def parts_of(weight: Any) -> dict[str, Tensor]:
    return {name: part.reshape(-1).view(torch.uint8).clone() for name, part in frozen._parts(weight)}


def compare_after_every_gather(
    rank: int, base: Path, shards: int, options: dict[str, Any], device_type: str = "cpu"
) -> dict[str, int]:
    """Two steps with gradient accumulation; how often a frozen tensor was looked at, in the forward and after it."""
    device = torch.device(device_type, rank) if device_type == "cuda" else CPU
    if device_type == "cuda":
        torch.cuda.set_device(device)
    model = make_model(base, device)
    fill_with_every_byte(model)
    expected = {
        (name, attribute): parts_of(parameter)
        for name, module in model.named_modules()
        for attribute, parameter in module._parameters.items()
        if parameter is not None and not parameter.requires_grad
    }
    names = {module: name for name, module in model.named_modules()}
    seen = {"forward": 0, "backward": 0}
    phase = "forward"

    def check(tensor: frozen.FrozenTensor, weight: Tensor) -> None:
        for owner, attribute in tensor.owners:
            parts = parts_of(weight)
            assert parts.keys() == expected[names[owner], attribute].keys()
            for part, value in parts.items():
                assert torch.equal(value, expected[names[owner], attribute][part]), (names[owner], attribute, part)
        seen[phase] += 1

    current, set_views = frozen.FrozenUnit.current, frozen.FrozenUnit.set_views

    def checked_current(unit: frozen.FrozenUnit, tensor: frozen.FrozenTensor) -> Tensor:
        weight = current(unit, tensor)
        check(tensor, weight)
        return weight

    def checked_views(unit: frozen.FrozenUnit) -> None:
        set_views(unit)
        for tensor in unit.tensors:
            check(tensor, tensor.owners[0][0].__dict__[tensor.owners[0][1]])

    frozen.FrozenUnit.current, frozen.FrozenUnit.set_views = checked_current, checked_views  # type: ignore[method-assign]
    strategy = FullyShard(shards, **options)
    model = strategy.apply(model, lambda named: build_optimizer(named, TrainConfig(optim="adamw_8bit")))
    model.train()
    for micro_batch in range(4):
        phase = "forward"
        logits = model(input_ids=torch.arange(20, device=device)[None] + rank).logits
        phase = "backward"
        strategy.backward(logits.nansum(), last_micro_batch=micro_batch % 2 == 1)
        if micro_batch % 2:
            strategy.clip(1.0, 1.0)
            strategy.step(skip=False)
    return seen


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("wide"), hidden_size=256)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("world_size", "shards", "options"),
    [(2, 2, {}), (2, 2, {"offload_shards": True, "prefetch": 2}), (4, 2, {})],
)
def test_gathered_bytes_are_the_unsharded_ones(base: Path, world_size: int, shards: int, options: dict) -> None:
    for seen in in_group(world_size, compare_after_every_gather, base, shards, options):
        # 14 4-bit weights and a head in the forward; the input gradient needs all of them again, but the first layer's
        # q, k and v: nothing that trains comes before them.
        assert seen["forward"] >= 4 * 15
        assert seen["backward"] >= 4 * 12


def compare_with_canonical_nans(rank: int, base: Path) -> None:
    """As a copy that takes the bytes for fp32 numbers may leave them."""
    pack = frozen.FrozenUnit.pack

    def as_numbers(unit: frozen.FrozenUnit, *args: Any) -> Tensor:
        floats = pack(unit, *args).view(torch.float32)
        return floats.masked_fill(floats.isnan(), torch.nan).view(torch.uint8)

    frozen.FrozenUnit.pack = as_numbers  # type: ignore[method-assign]
    compare_after_every_gather(rank, base, 2, {})


def test_the_comparison_sees_nans_made_alike(base: Path) -> None:
    with pytest.raises(AssertionError, match="'weight', 'data'"):
        in_group(2, compare_with_canonical_nans, base)


def live_bytes() -> dict[int, int]:
    """Bytes of every tensor storage that this process can reach, by address of the storage object."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.device.type == "cpu" and type(thing).__name__ != "DTensor":
            storage = thing.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found


def bytes_held(rank: int, base: Path, make_strategy: Callable[[], Any]) -> int:
    """All bytes of tensors that a training step leaves on this rank, beyond what was there before there was a model.

    Without an optimizer's lookup tables, and without the gradients that `none` keeps for good.
    """
    tables = bytes_of_lookup_tables()
    before = live_bytes()
    model = make_model(base)
    strategy = make_strategy()
    model = strategy.apply(model, lambda named: build_optimizer(named, TrainConfig(optim="adamw_8bit")))
    loss = model(input_ids=torch.arange(20)[None] + rank).logits.square().mean()
    strategy.backward(loss, last_micro_batch=True)
    strategy.clip(1.0, 1.0)
    strategy.step(skip=False)
    del loss
    kept = strategy.flat.grad_N.nbytes if isinstance(strategy, Unsharded) else 0
    return sum(size for storage, size in live_bytes().items() if storage not in before) - kept - tables


def bytes_of_lookup_tables() -> int:
    """What an 8-bit optimizer holds however little it trains."""
    before = live_bytes()
    parameter = nn.Parameter(torch.ones(4096))
    parameter.grad = torch.ones(4096)
    optimizer = build_optimizer({"parameter": parameter}, TrainConfig(optim="adamw_8bit"))
    optimizer.step()
    after = sum(size for storage, size in live_bytes().items() if storage not in before)
    # fp32 values and gradients, two moments of a byte, and their scales.
    return after - 4096 * (4 + 4 + 2) - 2 * 4 * 4096 // 256


def four_shards() -> FullyShard:
    return FullyShard(4)


def test_a_rank_of_four_holds_a_quarter(base: Path) -> None:
    (whole,) = in_group(1, bytes_held, base, Unsharded)
    held = in_group(4, bytes_held, base, four_shards)
    assert whole > 2_000_000
    assert max(held) < 1.05 * whole / 4, held
    assert min(held) > 0.95 * whole / 4, held


def bytes_held_twice(rank: int, base: Path) -> tuple[int, int, int]:
    """Bytes of the base as it was loaded: after it has been spread, the most at once beside its bytes, of a unit."""
    model = make_model(base)
    originals = [
        (StorageWeakRef(part.untyped_storage()), part.untyped_storage().nbytes())
        for parameter in model.parameters()
        if not parameter.requires_grad
        for _, part in frozen._parts(parameter)
    ]
    packed: list[int] = []
    most = 0
    place = frozen.FrozenUnit.place

    def measured(unit: frozen.FrozenUnit, bytes_B: Tensor, *container: Any) -> None:
        nonlocal most
        place(unit, bytes_B, *container)
        packed.append(unit.num_bytes)
        most = max(most, sum(packed) + sum(size for storage, size in originals if not storage.expired()))

    frozen.FrozenUnit.place = measured  # type: ignore[method-assign]
    gc.collect()
    # On a GPU nobody waits for the collector either: what only it can free is still there in the first steps.
    gc.disable()
    FullyShard(2).apply(model, lambda named: build_optimizer(named, TrainConfig(optim="adamw_8bit")))
    left = sum(size for storage, size in originals if not storage.expired())
    return left, most - sum(size for _, size in originals), max(packed)


def test_no_more_than_a_unit_of_the_base_is_held_twice(base: Path) -> None:
    for left, most, unit in in_group(2, bytes_held_twice, base):
        assert left == 0
        # Beside the largest unit: padding.
        assert most < 1.05 * unit


def replicated(rank: int, base: Path, largest_whole: int) -> tuple[bool, int, float, float]:
    """Whether the frozen tensors are where they were loaded, units, and a step's loss and gradient norm."""
    fsdp.LARGEST_WHOLE = largest_whole
    model = make_model(base)
    places = {name: p.data_ptr() for name, p in model.named_parameters() if not p.requires_grad}
    strategy: Any = FullyShard(2, frozen="replicate")
    model = strategy.apply(model, lambda named: build_optimizer(named, TrainConfig(optim="adamw_8bit")))
    kept = {name: p.data_ptr() for name, p in model.named_parameters() if not p.requires_grad}
    loss = model(input_ids=torch.arange(20)[None]).logits.float().square().mean() / 2
    strategy.backward(loss, last_micro_batch=True)
    return kept == places, len(strategy.units), float(loss.detach()), float(strategy.clip(1.0, 1.0))


def test_a_replicated_base_stays_where_it_is_and_its_adapter_travels_whole_or_by_layer(base: Path) -> None:
    whole, by_layer = (in_group(2, replicated, base, largest)[0] for largest in (2**30, 0))
    assert whole[:2] == (True, 1)
    assert by_layer[0]
    assert by_layer[1] > 2
    # The order of sums is another.
    assert whole[2:] == pytest.approx(by_layer[2:], rel=1e-5)


def train_little(rank: int, base: Path) -> tuple[float, dict[str, Tensor]]:
    """One step of an adapter that has fewer blocks than there are ranks."""
    model = load_base(ModelConfig(name=str(base), compute_dtype="fp32"), base, CPU)
    tiny = AdapterConfig(r=1, lora_alpha=1, target_modules=["q_proj"], layers_to_transform=0)
    strategy: Any = FullyShard(4) if torch.distributed.get_world_size() == 4 else Unsharded()
    model = strategy.apply(
        attach_adapter(model, tiny, seed=0), lambda named: build_optimizer(named, TrainConfig(optim="adamw_8bit"))
    )
    # Every rank computes the same, and their gradients are summed.
    loss = model(input_ids=torch.arange(20)[None]).logits.square().mean() / torch.distributed.get_world_size()
    strategy.backward(loss, last_micro_batch=True)
    norm = strategy.clip(1.0, 1.0)
    strategy.step(skip=False)
    state = strategy.full_state()
    strategy.load_full_state(state)
    return float(norm), state.adapter | strategy.full_state().optimizer


def test_an_adapter_of_fewer_blocks_than_ranks(base: Path) -> None:
    ((norm, state),) = in_group(1, train_little, base)
    assert norm > 0
    for our_norm, ours in in_group(4, train_little, base):
        assert our_norm == pytest.approx(norm, rel=1e-5)
        assert ours.keys() == state.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-7)


def train_dora(rank: int, base: Path, name: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of two steps."""
    values = {"model": {"name": "m"}, "data": {"train": "rows.jsonl"}, "shard": {"strategy": name}}
    workers = torch.distributed.get_world_size()
    strategy: Any = make_strategy(RunConfig.model_validate(values), workers, workers)
    model = load_base(ModelConfig(name=str(base), compute_dtype="fp32"), base, CPU)
    model = strategy.apply(
        attach_adapter(model, AdapterConfig(use_dora=True, r=4, lora_dropout=0.0), seed=0),
        lambda named: build_optimizer(named, TrainConfig(optim="adamw_torch", learning_rate=1e-2)),
    )
    found = []
    for _ in range(2):
        loss = model(input_ids=torch.arange(20)[None]).logits.square().mean() / workers
        strategy.backward(loss, last_micro_batch=True)
        found.append((float(loss.detach()) * workers, float(strategy.clip(1.0, 1.0))))
        strategy.step(skip=False)
    return found


def test_dora_reads_the_weights_that_are_gathered(tiny_model: Path) -> None:
    (expected,) = in_group(1, train_dora, tiny_model, "none")
    assert expected[1][0] < expected[0][0]
    for name in ("fsdp", "zero3"):
        for ours in in_group(2, train_dora, tiny_model, name):
            for pair, expected_pair in zip(ours, expected, strict=True):
                assert pair == pytest.approx(expected_pair, rel=1e-4), name
