"""The checkpoint format against stock safetensors and PEFT, and what it refuses."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from qlora_dist.checkpoint.format import DamagedCheckpoint, Snapshot, copy_to_host, read_snapshot, write_snapshot
from qlora_dist.coordinate.manifest import check_files, write_manifest

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def tensors_of_every_kind() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {f"w.{dtype}|exp_avg": (torch.randn(3, 5) * 4).to(dtype) for dtype in DTYPES}
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["strided"] = torch.arange(12.0).view(3, 4).T
    tensors["odd.bytes"] = torch.arange(7, dtype=torch.uint8)
    tensors["nan"] = torch.tensor([float("nan"), float("inf"), -0.0])
    return tensors


def snapshot(step: int = 3) -> Snapshot:
    return Snapshot(
        step=step,
        adapter={"base_model.model.q_proj.lora_A.weight": torch.randn(4, 8)},
        adapter_config={"peft_type": "LORA", "r": 4, "target_modules": {"v_proj", "q_proj"}},
        optimizer=tensors_of_every_kind(),
        optimizer_scalars={"groups": [{"lr": 1e-4 / 3, "betas": [0.9, 0.999]}]},
        state={"position": {"epoch": 1, "pack": 17}, "best": float("inf"), "seed": 2**63},
        config_yaml="name: prüfung\n",
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        # Bytes, so that NaN and -0 count.
        left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a[name], b[name]))
        assert torch.equal(left, right), name


def write(folder: Path, content: Snapshot) -> dict[str, dict]:
    folder.mkdir()
    files = write_snapshot(content, folder)
    write_manifest(folder, "run", 1, content.step, 0.0, files, {})
    return files


def test_what_was_written_comes_back_bit_for_bit(tmp_path: Path) -> None:
    content = snapshot()
    files = write(tmp_path / "step-00000003-g0001", content)
    assert check_files(tmp_path / "step-00000003-g0001", files, checksums=True) == []
    back = read_snapshot(tmp_path / "step-00000003-g0001")
    same(back.adapter, content.adapter)
    same(back.optimizer, content.optimizer)
    assert (back.step, back.config_yaml, back.state) == (3, content.config_yaml, content.state)
    assert back.optimizer_scalars == content.optimizer_scalars
    assert back.adapter_config["target_modules"] == ["q_proj", "v_proj"]


def test_stock_safetensors_reads_the_files(tmp_path: Path) -> None:
    content = snapshot()
    files = write(tmp_path / "c", content)
    same(safetensors.torch.load_file(tmp_path / "c" / "optimizer.safetensors"), content.optimizer)
    assert set(files) == {path.name for path in (tmp_path / "c").iterdir()} - {"manifest.json"}
    empty = Snapshot(step=0, adapter={}, adapter_config={})
    write(tmp_path / "empty", empty)
    assert safetensors.torch.load_file(tmp_path / "empty" / "adapter_model.safetensors") == {}
    assert read_snapshot(tmp_path / "empty").optimizer == {}


def test_stock_peft_loads_a_checkpoint_folder_as_an_adapter(tmp_path: Path, tiny_model: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    adapter = get_peft_model_state_dict(model)
    write(tmp_path / "c", Snapshot(step=1, adapter=adapter, adapter_config=config.to_dict()))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "c")
    tokens = torch.arange(20).view(1, 20)
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)


def test_a_copy_is_not_changed_by_later_training() -> None:
    content = snapshot()
    content.adapter["tied"] = next(iter(content.adapter.values()))
    copy = copy_to_host(content)
    before = {name: tensor.clone() for name, tensor in copy.adapter.items()}
    for tensor in content.adapter.values():
        tensor.add_(1)
    content.state["position"]["pack"] = 99
    same(copy.adapter, before)
    assert copy.state["position"]["pack"] == 17
    assert len({tensor.data_ptr() for tensor in copy.adapter.values()}) == 2


@pytest.mark.parametrize("value", [(1, 2), {1: "a"}, torch.zeros(1), {"a": {2}}, 1j])
def test_state_that_json_would_change_is_refused_by_name(value: object) -> None:
    content = snapshot()
    content.state["inner"] = [value]
    with pytest.raises(TypeError, match=r"state\.inner\[0\]"):
        copy_to_host(content)


def test_damage_is_named_before_anything_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write(folder, snapshot())
    good = (folder / "optimizer.safetensors").read_bytes()
    flipped = bytearray(good)
    flipped[-1] ^= 1
    for bad in (bytes(flipped), good[:-1], good + b"\0"):
        (folder / "optimizer.safetensors").write_bytes(bad)
        with pytest.raises(DamagedCheckpoint, match=r"optimizer\.safetensors has been altered"):
            read_snapshot(folder)
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"optimizer\.safetensors is missing"):
        read_snapshot(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["step"] = 4
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json has been altered"):
        read_snapshot(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json is missing"):
        read_snapshot(folder)
