"""Folders in, a folder out: against stock PEFT, and in bounded memory."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_dist.aggregate.merge import aggregate
from qlora_dist.aggregate.methods import recipe
from qlora_dist.aggregate.sparse import generator_of
from qlora_dist.cli import main
from qlora_dist.config.errors import UserError
from tests.adapters import LAYERS, make_adapter
from tests.single import small_config, train_here

IDS = torch.arange(3, 83).reshape(2, 40)
WEIGHTS = [0.5, 0.2, 0.3]
# The first has no rsLoRA: PEFT's new adapter takes that over from it, and is then too large by sqrt(r).
MIXED: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj", "embed_tokens"], "use_rslora": True},
    {
        "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "embed_tokens"],
        "rank_pattern": {r"layers\.1\.mlp\..*": 6}, "alpha_pattern": {"q_proj": 1},
    },
]  # fmt: skip
EQUAL_RANKS: list[dict[str, Any]] = [{**one, "r": 4, "rank_pattern": {}} for one in MIXED]


def stock(folder: Path, *adapters: Path) -> Any:
    """The base with adapters named 0, 1, ..."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapters[0], adapter_name="0")
    for i, adapter in enumerate(adapters[1:], start=1):
        model.load_adapter(adapter, adapter_name=str(i))
    return model.eval()


def trained(base: Path, folder: Path, settings: list[dict[str, Any]]) -> list[Path]:
    """Adapters with random weights, saved by PEFT."""
    for i, setting in enumerate(settings):
        torch.manual_seed(i)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **setting))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / str(i))
    return [folder / str(i) for i in range(len(settings))]


@pytest.fixture(scope="module")
def mixed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return trained(tiny_model, tmp_path_factory.mktemp("mixed"), MIXED)


@pytest.fixture(scope="module")
def equal_ranks(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return trained(tiny_model, tmp_path_factory.mktemp("equal"), EQUAL_RANKS)


def deltas(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    return {
        name: module.get_delta_weight(adapter).detach()
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter in (*module.lora_A, *module.lora_embedding_A)
    }


class Masks:
    """In the place of PEFT's random pruning: the masks that we draw, in the order in which PEFT asks for them."""

    def __init__(self, model: Any, on: str, seed: int, adapters: int):
        self.queue = [
            f"{seed}/base_model.model.{name}/{i}/{part}/0".split("/")
            for name, module in model.get_base_model().named_modules()
            if isinstance(module, LoraLayer)
            for part in (["update"] if on == "updates" else ["a", "b"])
            for i in range(adapters)
            if str(i) in (*module.lora_A, *module.lora_embedding_A)
        ]

    def __call__(self, tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        assert rescale
        # PEFT has the update of an embedding the other way round.
        names = self.queue.pop(0)
        turned = names[3] == "update" and "embed_tokens" in names[1]
        drawn = torch.rand(tensor.T.shape if turned else tensor.shape, generator=generator_of(*names))
        return tensor * ((drawn.T if turned else drawn) < density) / density


@pytest.mark.parametrize(
    ("peft_name", "method", "options"),
    [
        ("svd", "svd", {"rank": 5}),
        ("svd", "svd", {}),
        ("svd", "task-arithmetic", {"rank": 3}),
        ("cat", "cat", {}),
        ("ties_svd", "ties", {"density": 0.4, "rank": 6}),
        ("ties_svd", "ties", {"density": 0.4, "majority_sign": "frequency"}),
        ("magnitude_prune_svd", "ties", {"density": 0.4, "majority_sign": "none"}),
        ("dare_linear_svd", "dare", {"density": 0.4, "seed": 3}),
        ("dare_ties_svd", "dare", {"density": 0.4, "majority_sign": "total"}),
        ("linear", "task-arithmetic", {"on": "factors"}),
        ("ties", "ties", {"on": "factors", "density": 0.4}),
        ("magnitude_prune", "ties", {"on": "factors", "density": 0.4, "majority_sign": "none"}),
        ("dare_linear", "dare", {"on": "factors", "density": 0.4}),
        ("dare_ties", "dare", {"on": "factors", "density": 0.4, "majority_sign": "frequency"}),
    ],
)
def test_the_numbers_are_pefts(
    tiny_model: Path, mixed: list[Path], equal_ranks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    peft_name: str, method: str, options: dict[str, Any],
) -> None:  # fmt: skip
    on = options.get("on", "updates")
    parents = mixed if on == "updates" else equal_ranks
    weights = WEIGHTS if method == "svd" else [0.5, -0.4, 1.2]
    aggregate(parents, recipe(method, 3, weights, **options), tmp_path / "ours")
    model = stock(tiny_model, *parents, tmp_path / "ours")
    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", Masks(model, on, options.get("seed", 0), adapters=3))
    model.add_weighted_adapter(
        ["0", "1", "2"], weights, "theirs", peft_name, svd_rank=options.get("rank"), density=options.get("density"),
        majority_sign_method=options.get("majority_sign", "total").replace("none", "total"),
    )  # fmt: skip
    ours, theirs = deltas(model, "3"), deltas(model, "theirs")
    assert len(ours) == 9
    assert ours.keys() == theirs.keys()
    for name, delta in theirs.items():
        # fp32 throughout on both sides, values of order 1.
        torch.testing.assert_close(ours[name], delta, rtol=0, atol=3e-5, msg=lambda m, name=name: f"{name}: {m}")
    model.set_adapter("3")
    logits = model(IDS).logits
    model.set_adapter("theirs")
    torch.testing.assert_close(logits, model(IDS).logits, rtol=0, atol=2e-3)


def test_stock_peft_loads_it_and_gives_the_logits_of_the_base_with_the_dense_update(
    tiny_model: Path, mixed: list[Path], tmp_path: Path
) -> None:
    rank = 5
    aggregate(mixed, recipe("svd", 3, [5, 2, 3], rank=rank), tmp_path / "ours")
    with torch.no_grad():
        logits = stock(tiny_model, tmp_path / "ours")(IDS).logits
    dense: dict[str, torch.Tensor] = {}
    # From the files, in float64, by PEFT's documented scale.
    scales = {
        0: lambda module: 8 / 4,
        1: lambda module: 4 / math.sqrt(8),
        2: lambda module: (1 if "q_proj" in module else 6) / (6 if "layers.1.mlp" in module else 2),
    }
    for i, folder in enumerate(mixed):
        weights = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        for name, a in weights.items():
            module = name.split(".lora_")[0].removeprefix("base_model.model.")
            if "lora_A" in name or "lora_embedding_A" in name:
                b = weights[name.replace("_A", "_B")]
                dense[module] = dense.get(module, 0) + WEIGHTS[i] * scales[i](module) * b @ a
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    assert len(dense) == 9
    for module, delta in dense.items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        best = (u[:, :rank] * s[:rank] @ v[:rank]).float()
        base.get_submodule(module).weight.data += best.T if "embed_tokens" in module else best
    with torch.no_grad():
        torch.testing.assert_close(logits, base(IDS).logits, rtol=0, atol=2e-3)


@pytest.mark.parametrize("settings", [EQUAL_RANKS[:1] * 3, EQUAL_RANKS])
@pytest.mark.parametrize("method", ["mean", "della", "svd"])
def test_where_the_layers_are_the_same_the_names_of_the_modules_stay(
    tiny_model: Path, tmp_path: Path, settings: list[dict[str, Any]], method: str
) -> None:
    parents = trained(tiny_model, tmp_path, settings)
    same = settings[0] is settings[1]
    if method == "mean" and not same:
        with pytest.raises(UserError, match=r"mean needs the same layers .* use --method svd or cat"):
            aggregate(parents, recipe("mean", 3), tmp_path / "ours")
        return
    aggregate(parents, recipe(method, 3), tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert len(config["target_modules"]) == (3 if same else 9)
    model = stock(tiny_model, tmp_path / "ours")
    assert len(deltas(model, "0")) == (6 if same else 9)
    assert all(bool(torch.isfinite(delta).all() and delta.any()) for delta in deltas(model, "0").values())


def test_two_runs_of_ours_become_one_adapter_that_knows_its_parents_and_its_base(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        config = small_config(tmp_path / f"run{seed}", tiny_model, run={"seed": seed}, train={"max_steps": 2})
        assert train_here(config)["state"] == "finished"
    runs = [tmp_path / f"run{seed}" / "adapter" for seed in (1, 2)]
    command = ["aggregate", *map(str, runs), "--method", "svd", "--weights", "3,1", "-o", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["qlora-dist", *command])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    assert end.value.code == 0, told.err
    assert "svd on updates, 14 layers, rank 4" in told.out
    assert "the projection to rank 4 lost" in told.out
    assert all(f"{weight}  4     {run}" in told.out for weight, run in zip(("0.75  ", "0.25  "), runs, strict=True))
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        notes = file.metadata()
    made = json.loads(notes["aggregate"])
    assert made["method"] == "svd"
    digest = hashlib.sha256((runs[0] / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert {key: made["parents"][0][key] for key in ("folder", "weight", "sha256")} == {
        "folder": str(runs[0]), "weight": 0.75, "sha256": digest,
    }  # fmt: skip
    assert made["parents"][0]["notes"]["base"] == notes["base"]
    # And it can be a parent itself, and the start of a run.
    aggregate([tmp_path / "out", runs[0]], recipe("cat", 2), tmp_path / "again")
    config = small_config(
        tmp_path / "on", tiny_model, run={"adapter": {"path": tmp_path / "out"}}, train={"max_steps": 1}
    )
    assert train_here(config)["state"] == "finished"


def test_one_adapter_can_be_brought_to_a_smaller_rank(tmp_path: Path) -> None:
    summary = aggregate([make_adapter(tmp_path / "a", rank=4)], recipe("svd", 1, rank=2), tmp_path / "out")
    assert 0.1 < summary.lost < summary.worst[1] < 0.9
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    values = {
        m: torch.linalg.svdvals(1.5 * weights[f"base_model.model.{m}.lora_B.weight"].double()
                                @ weights[f"base_model.model.{m}.lora_A.weight"].double())
        for m in LAYERS
    }  # fmt: skip
    cut = sum(float(v[2:].square().sum()) for v in values.values())
    assert summary.lost == pytest.approx(math.sqrt(cut / sum(float(v.square().sum()) for v in values.values())))


def test_how_far_the_mean_of_factors_is_from_that_of_products(tmp_path: Path) -> None:
    parents = [make_adapter(tmp_path / f"{i}", seed=i) for i in range(2)]
    summary = aggregate(parents, recipe("mean", 2), tmp_path / "out")
    assert summary.lost == 0
    apart = total = 0.0
    loaded = [load_file(p / "adapter_model.safetensors") for p in parents]
    for module in LAYERS:
        a, b = ([w[f"base_model.model.{module}.lora_{x}.weight"].double() for w in loaded] for x in "AB")
        products = 2 * (b[0] @ a[0] + b[1] @ a[1]) / 2
        apart += float((2 * (b[0] + b[1]) @ (a[0] + a[1]) / 4 - products).square().sum())
        total += float(products.square().sum())
    assert summary.beside == pytest.approx(math.sqrt(apart / total), rel=1e-5)


MEMORY = """
import sys
from pathlib import Path
from qlora_dist.aggregate.merge import aggregate
from qlora_dist.aggregate.methods import recipe

def status(field):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))

folder = Path(sys.argv[1])
for method in ("cat", "svd"):
    aggregate([folder / "small"] * 6, recipe(method, 6), folder / f"small-{method}")
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to what is resident
    aggregate([folder / "large"] * 6, recipe(method, 6), folder / f"out-{method}")
    print(status("VmHWM") - before)
"""


def test_no_more_than_a_layer_of_all_adapters_is_in_memory(tmp_path: Path) -> None:
    layers = {f"model.layers.{i}.self_attn.q_proj": (1024, 1024) for i in range(96)}
    make_adapter(tmp_path / "small", rank=16, layers=dict([*layers.items()][:1]))
    large = make_adapter(tmp_path / "large", rank=16, layers=layers)
    size = (large / "adapter_model.safetensors").stat().st_size / 2**20
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    # All six are 72 MiB, and so is the result of cat; one layer of all is 0.75 MiB, ten times that while it is
    # factorised in float64.
    assert 6 * size > 72
    assert max(map(float, done.stdout.split())) < 1.5 * size, done.stdout
    assert (tmp_path / "out-cat" / "adapter_model.safetensors").stat().st_size / 2**20 > 72
