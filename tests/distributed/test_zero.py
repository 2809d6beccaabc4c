"""What is particular to ZeRO-2 and ZeRO-3, beside what test_strategies.py asks of every strategy.

The base is NF4 with double quantisation, ranks hold unequal numbers of loss-bearing tokens, and the adapter's weights
are no multiples of bitsandbytes' block, some with 8-bit state and some with fp32. For 1e-4 see test_strategies.py.
"""

import gc
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file

from qlora_dist.config.deepspeed import deepspeed_settings
from qlora_dist.config.schema import RunConfig, TrainConfig
from qlora_dist.model.adapter import trainable_parameters
from qlora_dist.optim.optimizers import CONSTANT_KEYS, build_optimizer
from qlora_dist.shard.frozen import BYTES, FrozenUnit
from qlora_dist.shard.none import Unsharded
from qlora_dist.shard.strategy import FullState
from qlora_dist.shard.units import find_units
from qlora_dist.shard.zero import Zero2, Zero3, ZeroUnit
from tests.distributed.gloo import in_group
from tests.distributed.group import Sabotage, series, train_in_group
from tests.distributed.strategies import (
    make_first_adapter,
    make_odd_model,
    matrix_config,
    worst_difference,
    write_rows,
)
from tests.distributed.test_same_training import nf4_base
from tests.distributed.test_shards import bytes_of_lookup_tables
from tests.single import train_here
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.timeout(300)
METRICS = ("loss", "grad_norm")
# Beside the plain runs: what else must not change the training. Whole sections of the configuration.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "checkpointing": {"train": {"gradient_checkpointing": True}},
    "offload": {"shard": {"offload": ["optimizer"]}},
    "offload all": {"shard": {"offload": ["optimizer", "shards"]}},
    "evaluation": {"data": {"eval_split": 3}, "eval": {"eval_steps": 4, "sample_prompts": 3}},
}
ZERO = {"zero2": Zero2, "zero3": Zero3}


class Runs:
    """Runs of one base, adapter and data set; those of several workers share their processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base = make_odd_model(folder / "base")
        self.adapter = make_first_adapter(self.base, folder / "adapter")
        self.data = write_rows(folder / "rows.jsonl")
        self.alone = cache(self._alone)
        self.zero = cache(self._zero)

    def config(self, name: str, strategy: str, workers: int, optim: str = "adamw_8bit", **sections: Any) -> RunConfig:
        adapter = self.folder / "full" if "full" in name else self.adapter
        sections = {"eval": {"sample_max_new_tokens": 4}} | sections
        folder = self.folder / name.replace(" ", "-") / f"{strategy}-{workers}-{optim}"
        return matrix_config(folder, self.base, adapter, self.data, strategy, workers, optim, **sections)

    def _alone(self, name: str, optim: str = "adamw_8bit") -> Path:
        sections = {key: value for key, value in VARIANTS.get(name, {}).items() if key != "shard"}
        config = self.config(name, "none", 1, optim, **sections)
        assert train_here(config)["state"] == "finished"
        return config.run_dir

    def _zero(self, sabotage: Sabotage | None = None) -> dict[tuple[str, str, str], Path]:
        """Run folders by strategy, variant and optimizer, all of them with two workers."""
        cases = [(strategy, "plain", "sgd") for strategy in ZERO]
        if sabotage is None:
            make_first_adapter(self.base, self.folder / "full", modules_to_save=["embed_tokens", "lm_head"])
            cases += [(strategy, "full", "adamw_8bit") for strategy in ZERO]
            cases += [("zero2", "offload", "adamw_8bit")]
            cases += [("zero3", variant, "adamw_8bit") for variant in VARIANTS]
        name = "" if sabotage is None else f"{sabotage.__name__} "
        configs = [self.config(name + v, s, 2, optim, **VARIANTS.get(v, {})) for s, v, optim in cases]
        outcomes = train_in_group(configs, 2, sabotage)
        assert all(outcome["state"] == "finished" for outcome in outcomes), outcomes
        return {case: config.run_dir for case, config in zip(cases, configs, strict=True)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("zero"))


def assert_same(run_dir: Path, reference: Path, steps: range = range(1, 11)) -> None:
    for metric in METRICS:
        ours, theirs = series(run_dir, metric), series(reference, metric)
        assert list(ours) == list(range(1, 11))
        assert worst_difference({s: ours[s] for s in steps}, {s: theirs[s] for s in steps}) < 1e-4, metric


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "variant"), [("zero2", "offload"), *(("zero3", name) for name in VARIANTS)])
def test_what_only_saves_memory_or_looks_changes_nothing(runs: Runs, strategy: str, variant: str) -> None:
    reference = runs.alone(variant if variant == "evaluation" else "plain")
    assert_same(runs.zero()[strategy, variant, "adamw_8bit"], reference)
    if variant == "evaluation":
        ours, theirs = (series(d, "eval_loss") for d in (runs.zero()[strategy, variant, "adamw_8bit"], reference))
        assert list(ours) == [0, 4, 8, 10]
        assert worst_difference(ours, theirs) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ZERO)
def test_embedding_and_head_train_in_full(runs: Runs, strategy: str) -> None:
    folder, reference = runs.zero()[strategy, "full", "adamw_8bit"], runs.alone("full")
    assert_same(folder, reference)
    folders = (folder / "adapter", reference / "adapter", runs.folder / "full")
    ours, theirs, first = (load_file(f / "adapter_model.safetensors") for f in folders)
    assert ours.keys() == theirs.keys() == first.keys()
    for name in ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"):
        moved = (theirs[name] - first[name]).norm()
        assert moved > 0
        assert (ours[name] - theirs[name]).norm() < 0.01 * moved


def average_instead_of_sum(rank: int) -> None:
    deepspeed_said = deepspeed_settings
    import qlora_dist.config.deepspeed as settings

    def averaged(config: RunConfig) -> dict[str, Any]:
        return deepspeed_said(config) | {"gradient_allreduce_op": "mean"}

    settings.deepspeed_settings = averaged
    Zero3.factor = property(lambda self: 1.0, lambda self, value: None)  # type: ignore[assignment]


def test_the_comparison_sees_an_average_in_place_of_the_sum(runs: Runs) -> None:
    folders = runs.zero(average_instead_of_sum)
    for strategy in ZERO:
        norms, expected = (
            series(folders[strategy, "plain", "sgd"], "grad_norm"),
            series(runs.alone("plain", "sgd"), "grad_norm"),
        )
        assert norms[1] == pytest.approx(expected[1] / 2, rel=1e-3)


def adapted(base: Path, adapter: Path, fill: bool = False) -> Any:
    """Stock transformers and PEFT; with `fill` every 4-bit weight and constant is overwritten with all byte values."""
    model = PeftModel.from_pretrained(nf4_base(base), adapter, is_trainable=True).train()
    for parameter in model.parameters() if fill else ():
        state = getattr(parameter, "quant_state", None)
        for tensor in () if state is None else (parameter.data, state.absmax, state.offset, state.state2.absmax):
            raw = tensor.view(-1).view(torch.uint8)
            raw.copy_(torch.arange(raw.numel()).to(torch.uint8))
    return model


def strategy_of(name: str) -> Zero2:
    config = RunConfig.model_validate(
        {"model": {"name": "m"}, "data": {"train": "bundled:home_commands"}, "shard": {"strategy": name}}
    )
    return ZERO[name](deepspeed_settings(config))


MAKE_OPTIMIZER = partial(build_optimizer, config=TrainConfig(optim="adamw_8bit", learning_rate=1e-2))


def state_after_three_steps(base: Path, adapter: Path) -> FullState:
    strategy = Unsharded()
    strategy.apply(adapted(base, adapter), MAKE_OPTIMIZER)
    torch.manual_seed(1)
    for _ in range(3):
        for parameter in trainable_parameters(strategy.model).values():
            parameter.grad.copy_(torch.randn_like(parameter))
        strategy.step(skip=False)
    return strategy.full_state()


def through_strategies(rank: int, base: Path, adapter: Path) -> list[str]:
    """What differs after a state has gone into a strategy and out again."""
    state, wrong = state_after_three_steps(base, adapter), []
    for name in ZERO:
        strategy = strategy_of(name)
        strategy.apply(adapted(base, adapter), MAKE_OPTIMIZER)
        strategy.load_full_state(state)
        out = strategy.full_state()
        for part in ("adapter", "optimizer", "optimizer_scalars"):
            before, after = getattr(state, part), getattr(out, part)
            wrong += [f"{name} {part} {key}" for key in before.keys() ^ after.keys()]
            wrong += [
                f"{name} {key}" for key in before.keys() & after.keys() if not _same_bits(before[key], after[key])
            ]
    return wrong


def _same_bits(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_state_is_cut_and_put_together_without_a_bit_of_change(runs: Runs) -> None:
    """By three ranks, to whom no weight divides."""
    state = state_after_three_steps(runs.base, runs.adapter)
    dtypes = {value.dtype for key, value in state.optimizer.items() if key.endswith("|state1")}
    assert dtypes == {torch.uint8, torch.float32}, "both kinds of state are to be there"
    assert in_group(3, through_strategies, runs.base, runs.adapter) == [[]] * 3


def gathered_bits(rank: int, base: Path, adapter: Path) -> tuple[int, list[str]]:
    """How often units were gathered in a forward and backward, and which of them had other bytes than the whole."""
    reference = {}
    model = adapted(base, adapter, fill=True)
    units = find_units(model)
    modules = {module for unit in units for module in unit.modules}
    for unit in units:
        frozen = FrozenUnit(unit, dist.get_world_size(), modules - set(unit.modules))
        if frozen.tensors:
            reference[unit.name] = frozen.pack()
    gathered, wrong = 0, []
    usual = ZeroUnit.set_views

    def checked(unit: ZeroUnit) -> None:
        nonlocal gathered
        if unit.frozen is not None:
            gathered += 1
            if not torch.equal(unit.frozen.bytes_now(), reference[unit.unit.name]):
                wrong.append(unit.unit.name)
        usual(unit)

    ZeroUnit.set_views = checked  # type: ignore[method-assign]
    strategy = strategy_of("zero3")
    called: Any = strategy.apply(adapted(base, adapter, fill=True), MAKE_OPTIMIZER)
    for _ in range(3):
        logits = called(input_ids=torch.arange(12)[None] + rank).logits
        strategy.backward(logits.float().square().mean(), last_micro_batch=True)
        strategy.clip(0.0, 1.0)
        strategy.step(skip=True)
    return gathered, wrong


def test_every_gathered_byte_is_the_unsharded_one(runs: Runs) -> None:
    for gathered, wrong in in_group(2, gathered_bits, runs.base, runs.adapter):
        assert not wrong
        # Embedding, two layers, head and root in three forwards; all but the embedding in three backwards.
        assert gathered == 3 * 5 + 3 * 4


def living_bytes() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held_bytes(rank: int, base: Path, adapter: Path, name: str) -> dict[str, int]:
    """What a rank holds after a step: the parts by the strategy's account, and all living tensors together."""
    tables = bytes_of_lookup_tables()
    before = living_bytes()
    strategy: Any = Unsharded() if name == "none" else strategy_of(name)
    called: Any = strategy.apply(adapted(base, adapter), MAKE_OPTIMIZER)
    logits = called(input_ids=torch.arange(12)[None] + rank).logits
    strategy.backward(logits.float().square().mean(), last_micro_batch=True)
    strategy.clip(1.0, 1.0)
    strategy.step(skip=False)
    del logits
    state = sum(
        value.nbytes
        for values in strategy.optimizer.state.values()
        for key, value in values.items()
        if isinstance(value, torch.Tensor) and key not in CONSTANT_KEYS
    )
    if name == "none":
        frozen = [p for p in called.parameters() if not p.requires_grad]
        quantised = [p.quant_state for p in frozen if hasattr(p, "quant_state")]
        constants = sum(s.absmax.nbytes + s.offset.nbytes + s.state2.absmax.nbytes for s in quantised)
        weights, trained = (
            sum(p.nbytes for p in frozen) + constants,
            sum(p.nbytes for p in strategy.flat.pieces.values()),
        )
        # Gradients that it keeps for good.
        tables += strategy.flat.grad_N.nbytes
    else:
        parameters = dict(called.named_parameters())
        weights = sum(p.ds_tensor.nbytes for key, p in parameters.items() if key.endswith(BYTES))
        trained = strategy.partition.nbytes
        assert all(p.numel() == 0 for p in parameters.values()), "everything is released"
    return {"base": weights, "adapter": trained, "state": state, "living": living_bytes() - before - tables}


def test_four_ranks_hold_a_quarter_each(tmp_path: Path) -> None:
    """Hidden size 512, so that padding (256 bytes for each tensor, blocks of 256 elements a rank) is no part of it."""
    base = make_tiny_model(tmp_path / "base", hidden_size=512)
    adapter = make_first_adapter(base, tmp_path / "adapter", r=16)
    (whole,) = in_group(1, held_bytes, base, adapter, "none")
    for part in in_group(4, held_bytes, base, adapter, "zero3"):
        for what in ("base", "adapter", "state"):
            assert part[what] == pytest.approx(whole[what] / 4, rel=0.05), what
        # The gradient's shard stays beside them, as large as the adapter's; nothing else of size may.
        assert part["living"] < 1.05 * (whole["living"] / 4 + part["adapter"])


QUIET_RUN = """
import sys
from pathlib import Path
from tests.single import small_config, train_here
folder, base = Path(sys.argv[1]), Path(sys.argv[2])
short = {"train": {"max_steps": 2}, "checkpoint": {"save_steps": 2}}
assert train_here(small_config(folder / "a", base, **short))["state"] == "finished"
assert "deepspeed" not in sys.modules, "DeepSpeed is imported where nobody asked for it"
print("begin", flush=True)
for name in ("zero2", "zero3"):
    config = small_config(folder / name, base, shard={"strategy": name}, **short)
    assert train_here(config)["state"] == "finished"
print("end", flush=True)
"""


def test_deepspeed_keeps_quiet_and_is_not_loaded_unasked(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", QUIET_RUN, str(tmp_path), str(tiny_model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.partition("begin\n")[2] == "end\n"
    assert not re.search("deepspeed|warn|/ld:", done.stderr, re.IGNORECASE), done.stderr
