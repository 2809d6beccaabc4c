"""One rank of a node reads the base, and each keeps its shard: the same bytes, the same training, less memory."""

import gc
import os
import re
import shutil
import sys
import threading
import time
from functools import cache as cache_calls
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig
from qlora_dist.model.adapter import attach_adapter
from qlora_dist.model.base import load_base
from qlora_dist.model.tensors import LazyTensor
from qlora_dist.model.weights import weight_files
from qlora_dist.optim.optimizers import build_optimizer
from qlora_dist.shard.frozen import FrozenUnit
from qlora_dist.shard.loading import make_placement, ranks_by_node
from qlora_dist.shard.strategy import make_strategy
from qlora_dist.shard.units import find_units
from tests.distributed.gloo import in_group
from tests.distributed.group import series, train_in_group
from tests.distributed.strategies import checkpoint_at, worst_difference
from tests.single import small_config, train_here
from tests.tiny import make_tiny_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(300)


def sharded_config(folder: Path, base: Path, **sections: dict[str, Any]) -> RunConfig:
    sections = {"shard": {"strategy": "fsdp"}, "launch": {"backend": "torchrun", "num_workers": 2}} | sections
    return small_config(folder, base, **sections)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that padding to shards is no visible part of it."""
    return make_tiny_model(tmp_path_factory.mktemp("base"), hidden_size=256, num_layers=3)


@pytest.fixture(scope="module")
def cache(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base in NF4, its packed weights and quantised constants overwritten with every byte value in turn."""
    folder = tmp_path_factory.mktemp("cache") / "nf4"
    config = small_config(folder.parent / "run", base, model={"cache_quantized": folder}).model
    load_base(config, base, CPU)
    for file in weight_files(folder):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith(".absmax") or (tensor.dtype == torch.uint8 and name.endswith(".weight")):
                assert tensor.dtype == torch.uint8
                assert tensor.numel() >= 256
                tensors[name] = torch.arange(tensor.numel()).to(torch.uint8).view(tensor.shape)
        save_file(tensors, file, {"format": "pt"})
    return folder


def without_weights(folder: Path, target: Path) -> Path:
    """A copy of a model folder in which there is nothing to read."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors")))


def bytes_of_living_tensors() -> int:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def load_shard(rank: int, nodes: int, configs: list[RunConfig], base: Path) -> tuple[dict[str, torch.Tensor], int]:
    """This rank's shards, and the bytes that stay of a load by its own one of `configs`."""
    local = len(configs) // nodes
    placement = make_placement(configs[rank], rank, len(configs), rank % local, local)
    before = bytes_of_living_tensors()
    with placement:
        model = load_base(configs[rank].model, Path(configs[rank].model.name), CPU, configs[rank].adapter, placement)
    held = bytes_of_living_tensors() - before
    assert len(list(model.parameters())) > 10
    return {name: shard for name, (_, shard) in placement.loaded.items()}, held


def unsharded_bytes(rank: int, config: RunConfig, num_shards: int) -> tuple[dict[str, torch.Tensor], int]:
    """The bytes of all units of a base that one process loaded whole, and the bytes that stay of loading it."""
    before = bytes_of_living_tensors()
    model = load_base(config.model, Path(config.model.name), CPU, config.adapter)
    held = bytes_of_living_tensors() - before
    units = find_units(model)
    modules = {module for unit in units for module in unit.modules}
    return {u.name: FrozenUnit(u, num_shards, modules - set(u.modules)).pack() for u in units}, held


@pytest.mark.parametrize(
    ("world_size", "nodes", "cached"),
    [
        (2, 1, False),
        (4, 2, True),
        pytest.param(2, 1, True, marks=pytest.mark.slow),
        pytest.param(4, 2, False, marks=pytest.mark.slow),
    ],
)
def test_one_rank_of_a_node_reads_and_each_keeps_its_shard(
    base: Path, cache: Path, tmp_path: Path, world_size: int, nodes: int, cached: bool
) -> None:
    """The others have nothing to read. Kept: 5 % for padding, and for lookup tables that all weights share."""

    def config(readable: bool, name: str) -> RunConfig:
        own_base = base if readable else without_weights(base, tmp_path / f"{name}-base")
        # A missing base has no fingerprint either: only a rank that reads compares the cache's with it.
        own_cache = cache if readable else without_weights(cache, tmp_path / f"{name}-cache")
        model = {"cache_quantized": own_cache} if cached else {}
        return sharded_config(
            tmp_path / name, own_base, model=model, launch={"backend": "torchrun", "num_workers": world_size}
        )

    per_node = world_size // nodes
    configs = [config(rank % per_node == 0, str(rank)) for rank in range(world_size)]
    found = in_group(world_size, load_shard, nodes, configs, base)
    ((whole, whole_held),) = in_group(1, unsharded_bytes, configs[0], world_size)
    assert set(found[0][0]) == set(whole)
    for name, expected in whole.items():
        gathered = torch.cat([shards[name] for shards, _ in found])
        assert torch.equal(gathered, expected), name
        if cached and ".layers." in name:
            assert len(gathered.unique()) == 256
    for _, held in found:
        assert held * world_size / whole_held == pytest.approx(1, abs=0.05)


def gather_after_apply(rank: int, config: RunConfig) -> dict[str, torch.Tensor]:
    """The bytes of each unit as FSDP gathers them from the shards that were loaded."""
    placement = make_placement(config, rank, dist.get_world_size(), rank, dist.get_world_size())
    model = load_base(config.model, Path(config.model.name), CPU, config.adapter, placement)
    adapted = attach_adapter(model, config.adapter, 0)
    strategy: Any = make_strategy(config, dist.get_world_size(), dist.get_world_size(), placement.loaded)
    strategy.apply(adapted, partial(build_optimizer, config=config.train, notice=print))
    assert not placement.loaded, "every shard has found its unit"
    gathered = {}
    for unit in strategy.units:
        unit.fsdp.unshard()
        gathered[unit.unit.name] = unit.frozen.bytes_now().detach().clone()
        unit.fsdp.reshard()
    return gathered


def test_what_is_gathered_are_the_bytes_of_the_unsharded_base(base: Path, cache: Path, tmp_path: Path) -> None:
    config = sharded_config(tmp_path, base, model={"cache_quantized": cache})
    ((whole, _),) = in_group(1, unsharded_bytes, config, 2)
    for gathered in in_group(2, gather_after_apply, config):
        assert gathered.keys() == whole.keys()
        for name, expected in whole.items():
            assert torch.equal(gathered[name], expected), name


def slow_and_failing(rank: int, config: RunConfig) -> tuple[list[str], str]:
    reader = make_placement(config, rank, 2, rank, 2).reader
    assert reader is not None

    def slow() -> str:
        # Longer than any rank may be silent.
        time.sleep(1.5 * config.launch.collective_timeout_s)
        return f"made by {rank}"

    def failing() -> None:
        raise UserError("source-missing", field="data.train", place=f"of rank {rank}", kinds="a file")

    def slow_read() -> torch.Tensor:
        slow()
        return torch.full((2,), 5.0 + rank)

    def damaged() -> torch.Tensor:
        raise UserError("source-missing", field="model.name", place="of a tensor", kinds="a file")

    made = [reader.once(slow), reader.once(lambda: f"again by {rank}")]
    with pytest.raises(UserError) as raised:
        reader.once(failing)
    sources = {"slow": slow_read, "quick": lambda: torch.tensor([1.0 + rank, 0.0]), "damaged": damaged}
    tensors = reader.share(lambda: {name: LazyTensor((2,), "F32", make) for name, make in sources.items()}, CPU)
    made += [str(tensors["slow"][...].tolist()), str(tensors["quick"][...].tolist())]
    with pytest.raises(UserError) as damage:
        tensors["damaged"][...]
    return made, raised.value.message + damage.value.message


@pytest.mark.slow
def test_what_one_rank_makes_or_reads_may_take_longer_than_a_collective(base: Path, tmp_path: Path) -> None:
    launch = {"backend": "torchrun", "num_workers": 2, "collective_timeout_s": 4}
    config = sharded_config(tmp_path, base, launch=launch)
    first, second = in_group(2, slow_and_failing, config, collective_timeout_s=4)
    assert first == second
    assert first[0] == ["made by 0", "again by 0", "[5.0, 5.0]", "[1.0, 0.0]"]
    assert "of rank 0" in first[1]
    assert "of a tensor" in first[1]


def slow_node(rank: int, config: RunConfig, fails: bool) -> str:
    """Two nodes of one rank each; the second is busy for longer than any rank may be silent."""
    try:
        with make_placement(config, rank, 2, 0, 1):
            if rank == 1:
                time.sleep(1.5 * config.launch.collective_timeout_s)
                if fails:
                    raise UserError("source-missing", field="model.name", place="of rank 1", kinds="a file")
        dist.barrier()
    except (UserError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


@pytest.mark.slow
def test_a_node_may_load_longer_than_a_collective(base: Path, tmp_path: Path) -> None:
    launch = {"backend": "torchrun", "num_workers": 2, "collective_timeout_s": 4}
    config = sharded_config(tmp_path, base, launch=launch)
    assert in_group(2, slow_node, config, False, collective_timeout_s=4) == ["loaded", "loaded"]
    first, second = in_group(2, slow_node, config, True, collective_timeout_s=4)
    assert first == "RuntimeError: gloo: another rank has failed while it loaded"
    assert "of rank 1" in second


def nodes_of(rank: int, local_ranks: list[int]) -> list[list[int]]:
    return ranks_by_node(len(local_ranks), local_ranks[rank])


def test_nodes_are_told_apart_by_local_ranks() -> None:
    assert in_group(4, nodes_of, [0, 1, 2, 3]) == [[[0, 1, 2, 3]]] * 4
    assert in_group(3, nodes_of, [0, 1, 0]) == [[[0, 1], [2]]] * 3


def load_with_a_fault(rank: int, config: RunConfig) -> str:
    placement = make_placement(config, rank, 2, rank, 2)
    with pytest.raises(UserError) as raised:
        load_base(config.model, Path(config.model.name), CPU, config.adapter, placement)
    return raised.value.message


def damage_header(folder: Path) -> None:
    file = weight_files(folder)[0]
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def lose_file(folder: Path) -> None:
    weight_files(folder)[0].unlink()


def lose_tensor(folder: Path) -> None:
    file = weight_files(folder)[0]
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [(damage_header, "cut short or no safetensors"), (lose_file, "no \\*.safetensors"), (lose_tensor, "1.mlp.up_proj")],
)
def test_a_fault_of_the_one_that_reads_is_told_by_all(tmp_path: Path, base: Path, fault, sentence: str) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    fault(folder)
    first, second = in_group(2, load_with_a_fault, sharded_config(tmp_path / "run", folder))
    assert first == second
    assert re.search(sentence, first)


def lose_the_file_in_mid_loading(rank: int) -> None:
    from qlora_dist.shard import loading

    pack = loading.NodePlacement._pack

    def pack_and_lose(self: Any, unit: Any) -> None:
        if rank == 0:
            folder = Path(os.environ["QLORA_DIST_TEST_FOLDER"])
            for file in folder.glob("*.safetensors"):
                file.unlink()
        pack(self, unit)

    loading.NodePlacement._pack = pack_and_lose  # type: ignore[method-assign]


def test_a_run_ends_with_the_readers_sentence(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    monkeypatch.setenv("QLORA_DIST_TEST_FOLDER", str(folder))
    began = time.monotonic()
    (outcome,) = train_in_group([sharded_config(tmp_path / "run", folder)], 2, lose_the_file_in_mid_loading)
    assert outcome["exit_code"] == 2
    assert "model.safetensors" in outcome["message"]
    assert time.monotonic() - began < 200, "the other rank did not wait for its collective to time out"


def log_opened_weights(rank: int) -> None:
    log = Path(os.environ["QLORA_DIST_TEST_OPENED"]) / str(rank)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        # Not those of adapters and checkpoints.
        if event == "open" and re.fullmatch(r"model.*\.safetensors", Path(str(arguments[0])).name):
            with open(log, "a") as file:
                file.write(f"{arguments[0]}\n")

    sys.addaudithook(audit)


STEPS, SAVED_AT = 10, 5
# What differs in the model or adapter, whatever the strategy.
BASES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "cached": {},
    "tied": {},
    "saved": {"adapter": {"modules_to_save": ["embed_tokens", "lm_head"]}},
    "adapted": {"adapter": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}},
    "synthetic": {"model": {"name": "synthetic:llama-tiny"}, "data": {"max_length": 128}},
}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{name: (name, 2, {"strategy": "fsdp"}) for name in BASES},
    "resumed": ("plain", 2, {"strategy": "fsdp"}),
    "replicated": ("plain", 2, {"strategy": "fsdp", "frozen": "replicate"}),
    "ddp": ("plain", 2, {"strategy": "ddp"}),
    "zero3": ("plain", 2, {"strategy": "zero3"}),
    "hybrid": ("plain", 4, {"strategy": "hybrid", "hybrid_shard_size": 2}),
}


class Runs:
    """Runs of every case; those of one world size share their processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bases = {name: make_tiny_model(folder / f"base-{name}", num_layers=2) for name in ("plain", "tied")}
        config = AutoConfig.from_pretrained(self.bases["tied"])
        config.tie_word_embeddings = True
        with torch.random.fork_rng():
            AutoModelForCausalLM.from_config(config).save_pretrained(self.bases["tied"])
        assert "lm_head.weight" not in load_file(self.bases["tied"] / "model.safetensors")
        self.unsharded, self.sharded = cache_calls(self._unsharded), cache_calls(self._sharded)

    def config(self, name: str, kind: str, shard: dict[str, Any], workers: int, **run: Any) -> RunConfig:
        sections: dict[str, dict[str, Any]] = {
            "adapter": {"r": 8, "lora_dropout": 0.0}, "shard": shard, "checkpoint": {"save_steps": SAVED_AT},
            "train": {"max_steps": STEPS, "learning_rate": 1e-3}, "track": {"report": False, "tensorboard": False},
            "launch": {"backend": "torchrun" if workers > 1 else "none", "num_workers": workers}, "run": run,
        }  # fmt: skip
        if name == "cached":
            sections["model"] = {"cache_quantized": self.folder / "nf4"}
        for section, values in BASES[kind].items():
            sections[section] = sections.get(section, {}) | values
        return small_config(self.folder / name, self.bases["tied" if kind == "tied" else "plain"], **sections)

    def _unsharded(self, kind: str) -> dict[str, dict[int, float]]:
        kind = "plain" if kind == "cached" else kind
        config = self.config(f"none-{kind}", kind, {"strategy": "none"}, 1)
        assert train_here(config)["state"] == "finished"
        return {metric: series(config.run_dir, metric) for metric in ("loss", "grad_norm")}

    def _sharded(self, workers: int, resumed: bool) -> dict[str, dict[str, dict[int, float]]]:
        run = {"resume": str(checkpoint_at(self.folder / "plain", SAVED_AT))} if resumed else {}
        configs = [
            self.config(name, kind, shard, workers, **run)
            for name, (kind, needed, shard) in CASES.items()
            if needed == workers and resumed == (name == "resumed")
        ]
        opened = self.folder / f"opened-{workers}-{resumed}"
        opened.mkdir()
        os.environ["QLORA_DIST_TEST_OPENED"] = str(opened)
        outcomes = train_in_group(configs, workers, log_opened_weights)
        assert all(outcome["state"] == "finished" for outcome in outcomes), outcomes
        assert {path.name for path in opened.iterdir()} == {"0"}, "the first rank reads, and the others nothing"
        return {
            config.run_dir.name: {metric: series(config.run_dir, metric) for metric in ("loss", "grad_norm")}
            for config in configs
        }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_from_shards_is_the_unsharded_run(runs: Runs, case: str) -> None:
    """Within 1e-4, for sums in other orders over ten steps."""
    kind, workers, _ = CASES[case]
    runs.sharded(workers, False)
    expected, found = runs.unsharded(kind), runs.sharded(workers, case == "resumed")[case]
    for metric, values in expected.items():
        wanted = {step: value for step, value in values.items() if case != "resumed" or step > SAVED_AT}
        assert len(wanted) == (STEPS - SAVED_AT if case == "resumed" else STEPS)
        assert worst_difference(found[metric], wanted) < 1e-4, metric


def host_bytes() -> int:
    """Private and shared bytes without page cache: anonymous and shmem pages."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def peak_of_loading(rank: int, config: RunConfig, small: RunConfig) -> int:
    """The most host memory over its value before, sampled every 2 ms; what is imported late was imported before."""
    world_size = dist.get_world_size()
    placement = make_placement(small, rank, world_size, rank, world_size)
    load_base(small.model, Path(small.model.name), CPU, small.adapter, placement)
    placement = make_placement(config, rank, world_size, rank, world_size)
    gc.collect()
    start = peak = host_bytes()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, host_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    model = load_base(config.model, Path(config.model.name), CPU, config.adapter, placement)
    ended.set()
    thread.join()
    assert sum(shard.numel() for _, shard in placement.loaded.values()) > 1e6
    assert sum(p.numel() for p in model.parameters()) > 1e8
    return peak - start


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_host_memory_of_a_node(tmp_path: Path, tiny_model: Path) -> None:
    """Each of four ranks stays under its shard, one unit, what quantising one tensor takes, and 40 MB for messages.

    250M weights in 16 layers; the whole base is 150 MB in NF4 and embeddings.
    """
    workers, largest = 4, 1024 * 4096
    shape = LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    four_bit = sum(p.numel() for p in model.model.layers.parameters()) * (0.5 + 1 / 64 + 4 / 64 / 256)
    unit = 2 * model.lm_head.weight.numel()
    del model
    launch = {"backend": "torchrun", "num_workers": workers}
    small = sharded_config(tmp_path / "small", tiny_model, launch=launch)
    settings = {"compute_dtype": "bf16"}
    for name, changes, of_a_tensor in (
        ("quantised", {}, 12 * largest),
        # Whoever writes a cache holds all of it.
        ("cache written", {"cache_quantized": tmp_path / "nf4"}, None),
        ("cache read", {"cache_quantized": tmp_path / "nf4"}, 2 * 8192 * 1024),
    ):
        config = sharded_config(tmp_path / name, tmp_path / "base", model=settings | changes, launch=launch)
        peaks = in_group(workers, peak_of_loading, config, small, timeout_s=500)
        print(name, [round(peak / 1e6) for peak in peaks], "of", round((four_bit + 2 * unit) / 1e6), "MB")
        for peak in peaks if of_a_tensor is not None else peaks[1:]:
            assert peak < (four_bit + 2 * unit) / workers + unit + (of_a_tensor or unit) + 40e6, name
