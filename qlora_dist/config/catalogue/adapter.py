"""Adapters: their settings, their folders, and what becomes of them on the model."""

from qlora_dist.config.catalogue.entry import Mendable

# `field` is the setting, of the run's config or of the adapter folder's adapter_config.json.
ADAPTER: dict[str, Mendable] = {
    "adapter-refused": Mendable("{field}: PEFT refuses these settings ({reason})", "correct them"),
    "adapter-targets-empty": Mendable("{field} is empty", "name modules, or set it to all-linear"),
    "adapter-target-not-linear": Mendable(
        "{field}: {name} is no linear layer", "take it out of adapter.target_modules"
    ),
    "target-not-a-pattern": Mendable(
        "{field} '{pattern}' is no valid pattern ({reason})", "mend it, or list the modules' names"
    ),
    "target-without-match": Mendable(
        "{field} '{pattern}' matches no module in full", "write one that does: nearest are {nearest}"
    ),
    "adapter-module-unknown": Mendable(
        "{field} names {name!r}, which the base lacks", "use a name that it has: nearest are {nearest}"
    ),
    "adapter-key-not-a-pattern": Mendable(
        "{field} names '{pattern}', no valid pattern ({reason})", "mend it, or give the name of a module"
    ),
    "adapter-key-without-match": Mendable(
        "{field} names '{pattern}', which matches no module", "write one that does: nearest are {nearest}"
    ),
    "adapter-layer-unknown": Mendable(
        "{field} names layer {layer}, but the base has {layers}, counted from 0", "give numbers up to {last}"
    ),
    "stored-vocabulary-trained": Mendable(
        "{field} names {name}, whose weights {setting}={kind} keeps frozen",
        "set {setting}=bf16, or name the other modules only",
    ),
    "saved-module-quantised": Mendable(
        "{field} names {name}, which is quantised and cannot be trained in full",
        "put it in adapter.target_modules or set model.quantization=none",
    ),
    "orthogonal-odd-rank": Mendable(
        "{field}: init_lora_weights=orthogonal needs an even rank, not {rank}", "change it"
    ),
    "init-of-quantised-base": Mendable(
        "adapter.init_lora_weights: {init} needs the original weights, and {folder} is already quantised",
        "set model.name to the unquantised base",
    ),
    "init-without-weight": Mendable(
        "adapter.init_lora_weights: {init} needs {weight}, which {folder} stores in another form",
        "use adapter.init_lora_weights=true",
    ),
    "init-not-linear": Mendable(
        "adapter.init_lora_weights: {init} is for linear layers, and {module} is none",
        "take it out of adapter.target_modules",
    ),
    "adapter-start-of-another": Mendable(
        "model.cache_quantized: {file} is not the start of this adapter",
        "delete the folder {folder}, it will be made again",
    ),
    "adapter-missing": Mendable("adapter.path: there is no folder {folder}", "give a PEFT adapter folder"),
    "adapter-is-a-file": Mendable("adapter.path: {folder} is a file", "give a PEFT adapter folder"),
    "adapter-is-a-model": Mendable("adapter.path: {folder} is a model", "put it in model.name"),
    "adapter-pickled": Mendable(
        "adapter.path: {folder} has its weights in {file} only, a format that can run code when it is read",
        'convert it: python -c "import torch, safetensors.torch as s; '
        "s.save_file(torch.load('{folder}/{file}', weights_only=True), '{folder}/adapter_model.safetensors')\"",
    ),
    "adapter-file-missing": Mendable(
        "adapter.path: {folder} has no {name}", "give a PEFT adapter folder with safetensors weights"
    ),
    "adapter-file-damaged": Mendable("adapter.path: {file} is damaged ({reason})", "fetch it again"),
    "adapter-config-not-an-object": Mendable("adapter.path: {file} is no adapter's configuration", "fetch it again"),
    "adapter-setting-no-number": Mendable("adapter.path: {file}: its {key} is no number", "fetch it again"),
    "adapter-not-lora": Mendable(
        "adapter.path: {folder} is of type {type}", "give a LoRA adapter, or leave it out to train a new one"
    ),
    "adapter-with-bias": Mendable(
        "adapter.path: {folder} was trained with bias {bias}",
        "give a LoRA adapter of bias none, or leave it out to train a new one",
    ),
    "adapter-beyond-lora": Mendable(
        "adapter.path: {folder} uses {setting}",
        "give a LoRA adapter without it, or leave it out to train a new one",
    ),
    "adapter-changed-its-base": Mendable(
        "adapter.path: {folder} was made by {init}, which changes the base weights too",
        "convert it to plain LoRA first (PEFT: save_pretrained(path_initial_model_for_weight_conversion=...))",
    ),
    "adapter-weight-unknown": Mendable(
        "{source} has a weight {name}, which this model's adapter lacks",
        "use the same base model and adapter settings",
    ),
    "adapter-weight-shape": Mendable(
        "{source} has {name} of shape {found} where this model needs {wanted}",
        "use the base model it was trained on and the same adapter settings (r, target_modules)",
    ),
    "adapter-rank-differs": Mendable(
        "{source}: its adapter_config.json and its weights do not belong together ({name} has rank {found}, not "
        "{wanted})",
        "fetch both again",
    ),
    "adapter-weights-missing": Mendable("{source} lacks {weights} ({missing} of {count} weights)", "fetch it again"),
    "adapter-inactive": Mendable(
        "adapter: none is active on the model (none attached, disabled or merged), so the run would train nothing",
        "check adapter.target_modules",
    ),
    "adapter-trains-base": Mendable(
        "adapter: the base weight {name} would be trained",
        "name its module in adapter.modules_to_save or leave it frozen",
    ),
    "adapter-trains-nothing": Mendable(
        "adapter: no weight of it requires a gradient, so the run would train nothing",
        "check adapter.target_modules and adapter.path",
    ),
}
