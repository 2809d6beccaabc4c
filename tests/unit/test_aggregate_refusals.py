"""What `qlora-dist aggregate` refuses: code 2, one sentence, and nothing left behind."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist.aggregate.merge import aggregate
from qlora_dist.aggregate.methods import recipe
from qlora_dist.cli import main
from qlora_dist.config.errors import UserError
from tests.adapters import LAYERS, make_adapter


def spoil(folder: Path, name: str, value: float) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in weights if name in key)
    weights[key].view(-1)[5] = value
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


OTHER_SHAPE = {"model.layers.0.mlp.up_proj": (12, 9)}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another base": ({"base_model_name_or_path": "owner/other"}, r"a is over owner/base and .*b over owner/other; .*-"),
    "another revision": ({"revision": "v2"}, "b over owner/base@v2"),
    "another fingerprint": ({"notes": {"base": "f" * 64}}, r"\(fingerprint 0{12}\) .* \(f{12}\); combine"),
    "other shapes": ({"layers": LAYERS | OTHER_SHAPE}, "up_proj is 12 x 8 in .*a and 12 x 9 in .*b"),
    "dora": ({"use_dora": True}, "b uses use_dora, which is no product"),
    "bias": ({"bias": "lora_only"}, "b uses bias=lora_only"),
    "lora_bias": ({"lora_bias": True}, "b uses lora_bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "b uses modules_to_save"),
    "tokens": ({"trainable_token_indices": [1]}, "b uses trainable_token_indices"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "b was made by pissa_niter_4, which changes the base"),
    "not lora": ({"peft_type": "IA3"}, "b is an adapter of type IA3"),
    "no alpha": ({"lora_alpha": "much"}, "lora_alpha is much, no number"),
    "no pattern": ({"rank_pattern": {"(": 3}}, r"damaged \(rank_pattern: missing \)"),
    "no patterns": ({"alpha_pattern": 4}, r"damaged \(alpha_pattern: 'int' object is not iterable"),
    "another rank": ({"r": 5}, "has rank 3, not 5"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_combined_is_named(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, sentence = BAD[kind]
    notes = {"notes": {"base": "0" * 64}} if kind == "another fingerprint" else {}
    refused(
        tmp_path,
        capsys,
        monkeypatch,
        sentence,
        make_adapter(tmp_path / "a", **notes),
        make_adapter(tmp_path / "b", **settings),
    )


def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, sentence: str,
    *arguments: Path | str, method: str = "svd", output: Path | None = None,
) -> None:  # fmt: skip
    """The command ends with code 2 and one sentence, and leaves nothing."""
    output = output or tmp_path / "made" / "out"
    command = ["aggregate", *map(str, arguments), "--method", method, "-o", str(output)]
    monkeypatch.setattr(sys, "argv", ["qlora-dist", *command])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr().err
    assert end.value.code == 2, told
    assert len(told.strip().splitlines()) == 1, told
    assert re.search(sentence, told), told
    assert not list((tmp_path / "made").glob("**/*"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_named_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    parents = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b")
    spoil(parents[1], "up_proj.lora_B", value)
    for method in ("svd", "mean", "ties", "cat"):
        sentence = r"b: base_model.*up_proj.lora_B.weight has values that are NaN or infinite; leave this adapter out"
        refused(tmp_path, capsys, monkeypatch, sentence, *parents, method=method)


@pytest.mark.parametrize("method", ["mean", "task-arithmetic", "ties", "dare", "della", "cat", "ties --on factors"])
def test_a_result_beyond_fp32_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    parents = make_adapter(tmp_path / "a", lora_alpha=3e38), make_adapter(tmp_path / "b", lora_alpha=3e38)
    for parent in parents:
        spoil(parent, "up_proj.lora_B", 3e38)
        spoil(parent, "up_proj.lora_A", 3e38)
    name, *options = method.split()
    weights = [] if name in ("mean", "svd") else ["--weights", "1e9,1e9"]
    refused(tmp_path, capsys, monkeypatch, "beyond the range of fp32", *parents, *options, *weights, method=name)


def test_damaged_folders_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b")
    weights, config = bad / "adapter_model.safetensors", bad / "adapter_config.json"
    whole, settings = weights.read_bytes(), config.read_text()
    loaded = load_file(weights)
    a_name, b_name = (
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight",
    )

    def bad_weights(sentence: str, **changed: torch.Tensor | None) -> None:
        names = {"a": a_name, "b": b_name, "more": "base_model.model.lm_head.weight"}
        new = {**loaded, **{names[key]: value for key, value in changed.items()}}
        save_file({key: value for key, value in new.items() if value is not None}, weights)
        refused(tmp_path, capsys, monkeypatch, sentence, good, bad)

    bad_weights("has a weight .*up_proj.lora_A.weight that is no half of a LoRA pair", b=None)
    bad_weights("has a weight .*up_proj.lora_B.weight that is no half of a LoRA pair", a=None)
    bad_weights("has a weight base_model.model.lm_head.weight", more=torch.zeros(2, 2))
    bad_weights(r"A has rank 3, B 2", b=torch.zeros(12, 2))
    bad_weights(r"lora_B.weight is F32 of shape \[12, 3, 1\]", b=torch.zeros(12, 3, 1))
    bad_weights(r"lora_B.weight is I32 of shape", b=torch.zeros(12, 3, dtype=torch.int32))
    weights.write_bytes(whole[:-8])
    refused(tmp_path, capsys, monkeypatch, "has .* bytes where its header promises", good, bad)
    save_file({}, weights)
    refused(tmp_path, capsys, monkeypatch, "b holds no LoRA weights", good, bad)
    weights.write_bytes(whole)
    for text, sentence in (("{", "adapter_config.json is damaged"), ("[]", "is no JSON object")):
        config.write_text(text)
        refused(tmp_path, capsys, monkeypatch, sentence, good, bad)
    config.write_text(settings)
    weights.unlink()
    refused(
        tmp_path, capsys, monkeypatch, "b is no PEFT adapter folder: it has no adapter_model.safetensors", good, bad
    )
    refused(tmp_path, capsys, monkeypatch, "nowhere: there is no such folder", tmp_path / "nowhere")
    run = make_adapter(tmp_path / "run" / "adapter").parent
    refused(tmp_path, capsys, monkeypatch, r"run is a run folder; give its adapter, .*run/adapter", run)


def test_ranks_that_differ_are_refused_on_factors_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b", rank=5)
    sentence = r"mean on factors needs equal ranks, and .* has rank 3 in .*a and 5 in .*b; use svd or cat"
    refused(tmp_path, capsys, monkeypatch, sentence, *parents, method="mean")
    refused(tmp_path, capsys, monkeypatch, "; use --on updates", *parents, "--on", "factors", method="ties")
    for method in ("svd", "ties"):
        assert aggregate(parents, recipe(method, 2), tmp_path / method).rank == 5


def test_wrong_options_and_outputs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b")
    (tmp_path / "file").touch()
    refuse = (tmp_path, capsys, monkeypatch)
    refused(*refuse, "--weights much is not possible; give numbers", *parents, "--weights", "much")
    refused(*refuse, "--device abacus is not possible", *parents, "--device", "abacus")
    refused(*refuse, "--device meta is not possible", *parents, "--device", "meta")
    refused(*refuse, r"--weights 1e\+300,1 is not possible", *parents, "--weights", "1e300,1")
    refused(*refuse, "a exists already; name another folder", *parents, output=tmp_path / "a")
    refused(*refuse, "out cannot be written", *parents, output=tmp_path / "file" / "out")


def test_bases_of_several_names(tmp_path: Path, tiny_model: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_model.iterdir():
        (copy / file.name).symlink_to(file)
    one, two = (
        make_adapter(tmp_path / f"{i}", base_model_name_or_path=str(f)) for i, f in enumerate((tiny_model, copy))
    )
    aggregate([one, two], recipe("svd", 2), tmp_path / "folders of the same model")
    other = make_adapter(tmp_path / "other", base_model_name_or_path="owner/other")
    with pytest.raises(UserError, match="name it with --base"):
        aggregate([one, other], recipe("svd", 2), tmp_path / "no")
    aggregate([one, other], recipe("svd", 2), tmp_path / "named", base="owner/base")
    config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"
    # The same fingerprint under two names is the same base; two fingerprints are two, whatever a person says.
    noted = [
        make_adapter(tmp_path / n, notes={"base": n[0] * 64}, base_model_name_or_path=n) for n in ("a1", "a2", "b1")
    ]
    aggregate(noted[:2], recipe("svd", 2), tmp_path / "same fingerprint")
    with pytest.raises(UserError, match="fingerprint aaaaaaaaaaaa"):
        aggregate(noted[1:], recipe("svd", 2), tmp_path / "no", base="owner/base")
