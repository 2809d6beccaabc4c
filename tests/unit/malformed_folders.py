"""The table's half of models, adapters and checkpoints: what is wrong, and what the sentence must name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qlora_dist.coordinate.manifest import list_committed
from tests.tiny import make_tiny_model
from tests.unit.malformed_box import (
    GOOD_ROW,
    Box,
    Case,
    adapter_file,
    checkpoint_file,
    cut,
    edit_json,
    edit_tensors,
    flip,
    model_file,
    model_json,
    run_again,
    safetensors_header,
    setting,
    sign_again,
    steps,
)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Box], object]:
    return model_file("model.safetensors", lambda path: edit_tensors(path, change))


def pickled_model(box: Box) -> None:
    folder = box.model()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded_model(index: bytes) -> Callable[[Box], object]:
    def prepare(box: Box) -> None:
        folder = box.model()
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(index)

    return prepare


def no_tokenizer(box: Box) -> None:
    for file in box.model().glob("tokenizer*"):
        file.unlink()


def no_special_tokens(box: Box) -> None:
    folder = box.model()
    edit_json(folder / "tokenizer_config.json", pad_token=None, eos_token=None)
    edit_json(folder / "config.json", pad_token_id=None)


def larger_vocabulary(box: Box) -> None:
    folder = box.model()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = {"id": 900, "content": "three", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": False}  # fmt: skip
    tokenizer["added_tokens"].append(added | {"id": len(tokenizer["model"]["vocab"])})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    box.data("x.jsonl", GOOD_ROW * 30)


def gguf(content: Callable[[bytes], bytes]) -> Callable[[Box], object]:
    def prepare(box: Box) -> None:
        from tests.unit.test_model_gguf import write_gguf

        file = write_gguf(box.base, box.folder / "model.gguf", quantize=False)
        file.write_bytes(content(file.read_bytes()))
        box.values["model"]["name"] = str(file)

    return prepare


def quantised_cache(change: Callable[[Path], object]) -> Callable[[Box], object]:
    def prepare(box: Box) -> None:
        from qlora_dist.config.schema import ModelConfig
        from qlora_dist.model.base import load_base

        cache = box.folder / "cache"
        box.values["model"]["cache_quantized"] = str(cache)
        load_base(ModelConfig.model_validate(box.values["model"]), box.base, torch.device("cpu"))
        change(cache)

    return prepare


def cache_of_something_else(box: Box) -> None:
    (box.folder / "cache").mkdir()
    box.write("cache/notes.txt", b"hello")
    box.values["model"]["cache_quantized"] = str(box.folder / "cache")


def named(path: str, content: bytes | None = None) -> Callable[[Box], object]:
    def prepare(box: Box) -> None:
        if content is not None:
            box.write(path, content)
        box.values["model"]["name"] = str(box.folder / path)

    return prepare


def adapter_as_base(box: Box) -> None:
    box.values["model"]["name"] = str(box.trained / "adapter")


MODEL = [
    Case("model", "no such folder", r"model\.name: .*no folder .*/gone; give a folder", named("gone")),
    Case("model", "no such GGUF", r"model\.name: .*no file .*gone\.gguf", named("gone.gguf")),
    Case("model", "a text file", r"model\.name: .*notes\.txt is no GGUF", named("notes.txt", b"hello")),
    Case("model", "no such package", r"model\.name: .*no-such-thing.*pip install",
         setting("model", name="package:no-such-thing")),
    Case("model", "no such shape", r"model\.name: .*synthetic:llama-4-8b.*nearest",
         setting("model", name="synthetic:llama-4-8b")),
    Case("model", "empty name", r"model\.name is empty; give a folder", setting("model", name="")),
    Case("model", "an adapter", r"model\.name: .*is an adapter; put it in adapter\.path", adapter_as_base),
    Case("model", "no config.json", r"model\.name: .*no config\.json", model_file("config.json", Path.unlink)),
    Case("model", "damaged config.json", r"config\.json.*JSON.*fetch it again", model_file("config.json", cut)),
    Case("model", "a list as config.json", r"config\.json", model_file("config.json", lambda p: p.write_text("[]"))),
    Case("model", "no model_type", r"config\.json names no model_type.*fetch it again", model_json(model_type=None)),
    Case("model", "unknown model_type", r"model\.name: .*model_type 'odd'.*upgrade transformers",
         model_json(model_type="odd")),
    Case("model", "an encoder", r"model\.name: .*BertModel, not a causal",
         model_json(model_type="bert", architectures=["BertModel"])),
    Case("model", "code of its own", r"model\.name: .*trust_remote_code=true",
         model_json(model_type="odd", auto_map={"AutoModelForCausalLM": "odd.Odd"})),
    Case("model", "a text as hidden_size", r"config\.json is refused by .*[^.]\); undo your edit",
         model_json(hidden_size="wide")),
    Case("model", "other shape than its weights", r"/model.*(shape|size).*config\.json|config\.json.*(shape|size)",
         model_json(intermediate_size=96)),
    Case("model", "heads that do not divide",
         r"config\.json is refused by transformers \(The hidden size .*[^.]\); undo", model_json(num_attention_heads=5,
         head_dim=None)),
    Case("model", "another quantisation", r"model\.name: .*already quantised \(gptq\)",
         model_json(quantization_config={"quant_method": "gptq", "bits": 4})),
    Case("model", "no weights", r"/model has no \*\.safetensors", model_file("model.safetensors", Path.unlink)),
    Case("model", "pickled weights only", r"pytorch_model\.bin only.*convert", pickled_model),
    Case("model", "cut weights", r"model\.safetensors has \d+ bytes where .* \d+; fetch",
         model_file("model.safetensors", cut)),
    Case("model", "empty weights", r"model\.safetensors is cut short",
         model_file("model.safetensors", lambda p: p.write_bytes(b""))),
    Case("model", "damaged header", r"model\.safetensors has a damaged header",
         model_file("model.safetensors", lambda p: safetensors_header(p, b"{]"))),
    Case("model", "a header of no tensors", r"model\.safetensors has a damaged header",
         model_file("model.safetensors", lambda p: safetensors_header(p, {"lm_head.weight": 3}))),
    Case("model", "a list as a header", r"model\.safetensors has a damaged header",
         model_file("model.safetensors", lambda p: safetensors_header(p, [1]))),
    Case("model", "a tensor lacks", r"/model lacks model\.norm\.weight.*fetch the model again",
         weights(lambda tensors: tensors.pop("model.norm.weight"))),
    Case("model", "a shard lacks", r"lacks model-00002-of-00002\.safetensors.*finish the download",
         sharded_model(b'{"weight_map": {"a": "model-00001-of-00002.safetensors", '
                       b'"b": "model-00002-of-00002.safetensors"}}')),
    Case("model", "damaged index", r"model\.safetensors\.index\.json", sharded_model(b'{"weight_map": ')),
    Case("model", "index without its map", r"model\.safetensors\.index\.json", sharded_model(b"{}")),
    Case("model", "no tokenizer", r"/model has no tokenizer files; copy tokenizer\.json", no_tokenizer),
    Case("model", "damaged tokenizer", r"/model: its tokenizer files are damaged \(.*[^:]\); fetch them again",
         model_file("tokenizer.json", cut)),
    Case("model", "no pad and no eos token", r"tokenizer_config\.json names no pad", no_special_tokens),
    Case("model", "tokenizer of a larger model", r"tokenizer", larger_vocabulary),
    Case("model", "no chat template", r"has no chat template", model_file("chat_template.jinja", Path.unlink)),
    Case("model", "text named GGUF", r"model\.gguf is cut short or no GGUF file; fetch it",
         gguf(lambda content: b"hello" * 100)),
    Case("model", "cut GGUF", r"model\.gguf is cut short or no GGUF", gguf(lambda content: content[:-5000])),
    Case("model", "GGUF cut in its header", r"model\.gguf is cut short or no GGUF",
         gguf(lambda content: content[:900])),
    Case("model", "empty GGUF", r"model\.gguf is cut short or no GGUF", gguf(lambda content: b"")),
    Case("model", "cut quantised cache", r"model\.cache_quantized: .*model\.safetensors is missing or damaged; delete",
         quantised_cache(lambda cache: cut(cache / "model.safetensors"))),
    Case("model", "damaged stamp of a cache", r"model\.cache_quantized: .*quantized_cache\.json is damaged; delete",
         quantised_cache(lambda cache: cut(cache / "quantized_cache.json", 9))),
    Case("model", "cache of other settings", r"model\.cache_quantized: .*quant.*delete that folder",
         steps(quantised_cache(lambda cache: None), setting("model", quantization="fp4"))),
    Case("model", "cache folder of something else", r"model\.cache_quantized: .*something else",
         cache_of_something_else),
    Case("model", "cache that is a file", r"model\.cache_quantized",
         lambda box: setting("model", cache_quantized=str(box.write("cache", b"")))(box)),
    Case("model", "attention that needs a GPU", r"model\.attn_implementation: .*sdpa",
         setting("model", attn_implementation="flash_attention_2")),
]  # fmt: skip


def adapter_at(name: str, content: bytes | None = None) -> Callable[[Box], object]:
    def prepare(box: Box) -> None:
        if content is not None:
            box.write(name, content)
        box.values["adapter"] = {"path": str(box.folder / name)}

    return prepare


def adapter_json(**changes: Any) -> Callable[[Box], object]:
    return adapter_file("adapter_config.json", lambda path: edit_json(path, **changes))


def other_base(box: Box) -> None:
    box.adapter()
    box.values["model"]["name"] = str(make_tiny_model(box.folder / "wide", hidden_size=96))


def pickled_adapter(box: Box) -> None:
    folder = box.adapter()
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


ADAPTER = [
    Case("adapter", "no such folder", r"adapter\.path: there is no folder .*/gone", adapter_at("gone")),
    Case("adapter", "a file", r"adapter\.path: .*/notes\.txt is a file", adapter_at("notes.txt", b"hello")),
    Case("adapter", "a model folder", r"adapter\.path: .* is a model; put it in model\.name",
         lambda box: box.values.update(adapter={"path": str(box.base)})),
    Case("adapter", "no weights", r"adapter\.path: .*no adapter_model\.safetensors",
         adapter_file("adapter_model.safetensors", Path.unlink)),
    Case("adapter", "pickled weights only", r"adapter\.path: .*adapter_model\.bin only.*weights_only=True",
         pickled_adapter),
    Case("adapter", "cut weights", r"adapter\.path: .*damaged.*fetch it again",
         adapter_file("adapter_model.safetensors", cut)),
    Case("adapter", "damaged header", r"adapter\.path: .*damaged.*fetch it again",
         adapter_file("adapter_model.safetensors", lambda p: safetensors_header(p, b"{]"))),
    Case("adapter", "damaged settings", r"adapter\.path: .*damaged.*fetch it again",
         adapter_file("adapter_config.json", cut)),
    Case("adapter", "a list as settings", r"adapter\.path: .*/start",
         adapter_file("adapter_config.json", lambda p: p.write_text("[]"))),
    Case("adapter", "a text as r", r"adapter\.path: .*/start/adapter_config\.json: its r is no number",
         adapter_json(r="many")),
    Case("adapter", "IA3", r"adapter\.path: .*IA3.*LoRA", adapter_json(peft_type="IA3")),
    Case("adapter", "of another base", r"adapter\.path: .*of shape \[.*\] where this model needs \[.*base model",
         other_base),
    Case("adapter", "of another rank", r"adapter\.path: .*do not belong together \(.* has rank 4, not 8\)",
         adapter_json(r=8)),
    Case("adapter", "a weight lacks", r"adapter\.path: .*lacks .*lora_[AB]\.weight \(1 of 28 weights\); fetch",
         adapter_file("adapter_model.safetensors", lambda p: edit_tensors(p, lambda t: t.pop(sorted(t)[0])))),
    Case("adapter", "its modules lack in the base", r"adapter\.path: .*'q_prj'.*q_proj",
         adapter_json(target_modules=["q_prj"])),
    Case("adapter", "a shape beside a path", r"adapter\.path .*adapter\.r .*remove one",
         steps(Box.adapter, setting("adapter", r=8))),
    Case("adapter", "modules that match nothing", r"adapter\.target_modules names 'q_prj'.*nearest are q_proj",
         setting("adapter", target_modules=["q_prj"])),
    Case("adapter", "no modules at all", r"adapter\.target_modules is empty; name modules",
         setting("adapter", target_modules=[])),
    Case("adapter", "pattern that matches nothing", r"adapter\.target_modules '\.\*\\\.attn' matches no module",
         setting("adapter", target_modules=r".*\.attn")),
    Case("adapter", "no pattern", r"adapter\.target_modules '\('.*no valid pattern",
         setting("adapter", target_modules="(")),
    Case("adapter", "a module without weights", r"adapter\.target_modules: .*act_fn is no linear layer; take it out",
         setting("adapter", target_modules=["act_fn"])),
    Case("adapter", "a layer too far", r"adapter\.layers_to_transform names layer 7, but the base has 2",
         setting("adapter", layers_to_transform=[7], target_modules=["q_proj"])),
    Case("adapter", "layers without names", r"adapter\.layers_to_transform needs .*adapter\.target_modules",
         setting("adapter", layers_to_transform=[0])),
    Case("adapter", "a whole module that lacks", r"adapter\.modules_to_save names 'lm_hed'.*lm_head",
         setting("adapter", modules_to_save=["lm_hed"])),
    Case("adapter", "an odd rank for orthogonal", r"adapter\.r: .*even rank, not 3",
         setting("adapter", r=3, init_lora_weights="orthogonal")),
]  # fmt: skip


def resume_at(name: str, make: Callable[[Box], object] = lambda box: None) -> Callable[[Box], object]:
    def prepare(box: Box) -> None:
        make(box)
        box.values["resume"] = str(box.folder / name)

    return prepare


def strange_checkpoint(name: str, change: Callable[[Path], object]) -> Callable[[Box], object]:
    """A checkpoint that is not what we write though its manifest fits it."""

    def prepare(box: Box) -> None:
        checkpoint = box.checkpoint()
        change(checkpoint / name)
        sign_again(checkpoint)

    return prepare


def other_run_damaged(box: Box) -> None:
    other = Path(shutil.copytree(box.trained, box.folder / "other"))
    for checkpoint in list_committed(other):
        flip(checkpoint / "state.json")
    box.values["resume"] = str(other)


def own_run_damaged(box: Box) -> None:
    for checkpoint in list_committed(box.run()):
        flip(checkpoint / "state.json")


def as_file(name: str) -> Callable[[Box], object]:
    def prepare(box: Box) -> None:
        run = box.run()
        target = run / name
        if target.is_dir():
            shutil.move(target, box.folder / "aside")
        else:
            target.unlink(missing_ok=True)
        target.write_bytes(b"")

    return prepare


def as_folder(name: str) -> Callable[[Box], object]:
    def prepare(box: Box) -> None:
        target = box.run() / name
        target.unlink(missing_ok=True)
        target.mkdir()

    return prepare


def other_model(box: Box) -> None:
    box.run()
    edit_tensors(box.model() / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(2))


def copy_under_another_name(box: Box) -> None:
    shutil.copytree(list_committed(box.trained)[1], box.folder / "step-00000099-g0001")


def metrics_line(box: Box, line: bytes) -> None:
    path = box.run() / "metrics.jsonl"
    path.write_bytes(line + path.read_bytes())


CHECKPOINT = [
    Case("checkpoint", "resume path that is not there", r"resume: .*/gone does not exist", resume_at("gone")),
    Case("checkpoint", "resume path that is a file", r"resume: .*/note is not a folder",
         resume_at("note", lambda box: box.write("note", b""))),
    Case("checkpoint", "an adapter", r"resume: .*manifest\.json.*adapter\.path", resume_at("run/adapter", Box.run)),
    Case("checkpoint", "a run without a good one", r"resume: .*/other has no good checkpoint", other_run_damaged),
    Case("checkpoint", "no manifest", r"resume: .*step-00000006-g0001 is damaged \(manifest\.json is missing\)",
         checkpoint_file("manifest.json", Path.unlink)),
    Case("checkpoint", "damaged manifest", r"resume: .*is damaged \(manifest\.json",
         checkpoint_file("manifest.json", cut)),
    Case("checkpoint", "altered manifest", r"resume: .*is damaged \(manifest\.json has been altered",
         checkpoint_file("manifest.json", lambda p: edit_json(p, step=7))),
    Case("checkpoint", "wrong checksum", r"resume: .*is damaged \(adapter_model\.safetensors has been altered",
         checkpoint_file("adapter_model.safetensors", flip)),
    Case("checkpoint", "cut file", r"resume: .*is damaged \(optimizer\.safetensors has \d+ bytes instead of \d+",
         checkpoint_file("optimizer.safetensors", cut)),
    Case("checkpoint", "a file lacks", r"resume: .*is damaged \(state\.json is missing",
         checkpoint_file("state.json", Path.unlink)),
    Case("checkpoint", "copied under another name", r"resume: .*step-00000004-g0001",
         resume_at("step-00000099-g0001", copy_under_another_name)),
    Case("checkpoint", "strange state", r"step-00000006-g0001.*state\.json",
         strange_checkpoint("state.json", lambda p: p.write_text("{}"))),
    Case("checkpoint", "strange tensors", r"step-00000006-g0001.*adapter_model\.safetensors",
         strange_checkpoint("adapter_model.safetensors", lambda p: p.write_bytes(b"junk"))),
    Case("checkpoint", "strange optimizer", r"optimizer state of .*lora_.* is not whole; give another checkpoint",
         strange_checkpoint("optimizer.safetensors", lambda p: edit_tensors(p, lambda t: t.pop(sorted(t)[0])))),
    Case("checkpoint", "another optimizer", r"made with train\.optim=adamw_8bit and this run has adamw_torch",
         run_again("train.optim=adamw_torch")),
    Case("checkpoint", "another base", r"step-00000006-g0001 .*different model\.name", other_model),
    Case("checkpoint", "other data", r"different data\.train .*data\.max_rows.*put data\.train",
         run_again("data.max_rows=20")),
    Case("checkpoint", "another rank", r"different adapter\.r \(4 instead of 8\)", run_again("adapter.r=8")),
    Case("checkpoint", "another global batch", r"different train\.global_batch_size \(4 instead of 2\)",
         run_again("train.global_batch_size=2")),
    Case("checkpoint", "a used folder for a new run", r"resume: none, but output_dir .*00000006-g0001.*resume=auto",
         run_again("resume=none")),
    Case("checkpoint", "run folder is a file", r"output_dir .*/run: .*/run is a file where a folder is needed",
         lambda box: box.write("run", b"")),
    Case("checkpoint", "run folder below a file", r"output_dir .*: .*/x is a file where a folder",
         lambda box: box.values.update(output_dir=str(box.write("x", b"") / "run"))),
    Case("checkpoint", "run folder that cannot be written", r"output_dir /sys/qlora-dist-run cannot be written",
         lambda box: box.values.update(output_dir="/sys/qlora-dist-run")),
    Case("checkpoint", "a bucket as run folder", r"output_dir is s3://bucket/run, .*filesystem",
         lambda box: box.values.update(output_dir="s3://bucket/run")),
    Case("checkpoint", "damaged run.json", r"run\.json is damaged", lambda box: cut(box.run() / "run.json", 9)),
    Case("checkpoint", "run.json that is a folder", r"run\.json", as_folder("run.json")),
    Case("checkpoint", "event log that is a folder", r"events\.jsonl", as_folder("events.jsonl")),
    Case("checkpoint", "checkpoints that are a file", r"output_dir .*checkpoints is a file", as_file("checkpoints")),
    Case("checkpoint", "final adapter that is a file", r"output_dir .*/run/adapter is a file", as_file("adapter")),
    Case("checkpoint", "no good one of its own",
         r"/run: none of its checkpoints is whole \(step-00000006-g0001, .*\); restore",
         own_run_damaged),
    Case("checkpoint", "damaged metrics", r"metrics\.jsonl, line 1 is damaged; remove .*again",
         lambda box: metrics_line(box, b"{]\n")),
]  # fmt: skip
