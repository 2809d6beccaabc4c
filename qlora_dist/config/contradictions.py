"""What settings that are right one by one say against each other."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qlora_dist.config.errors import UserError
from qlora_dist.config.island_rules import island_contradictions
from qlora_dist.config.redact import holds_credentials, redact
from qlora_dist.config.shard_rules import shard_contradictions

if TYPE_CHECKING:
    from qlora_dist.config.schema import RunConfig


def contradictions(config: "RunConfig") -> Iterator[UserError]:
    """What is wrong with values that cannot hold together."""
    train, data, evaluation, launch, adapter = config.train, config.data, config.eval, config.launch, config.adapter
    workers = launch.max_workers
    if not config.model.name:
        yield UserError("model-name-empty")
    if config.model.compute == "fp8" and config.model.fused == "never":
        yield UserError("fp8-needs-fused", reason="model.fused is never")
    if train.max_steps is not None and train.num_train_epochs is not None:
        yield UserError("steps-and-epochs")
    if train.gradient_checkpointing and train.activations in ("keep", "offload"):
        yield UserError("checkpointing-and-activations", activations=train.activations)
    if train.warmup_steps and train.warmup_ratio:
        yield UserError("warmup-twice")
    if train.max_steps is not None and train.warmup_steps > train.max_steps:
        yield UserError("warmup-too-long", warmup_steps=train.warmup_steps, max_steps=train.max_steps)
    if train.global_batch_size is not None and train.gradient_accumulation_steps is not None:
        product = train.per_device_train_batch_size * train.gradient_accumulation_steps * workers
        if product != train.global_batch_size:
            yield UserError("global-batch-factors", global_batch_size=train.global_batch_size, product=product)
    if train.per_device_train_batch_size > config.global_batch_size:
        per_device, together = train.per_device_train_batch_size, config.global_batch_size
        yield UserError("micro-batch-over-global", per_device=per_device, global_batch_size=together)
    for field in ("train", "eval"):
        if (source := getattr(data, field)) is not None and holds_credentials(source):
            yield UserError("source-with-credentials", field=field, source=redact(source))
    if data.eval is not None and data.eval_split:
        yield UserError("eval-twice")
    if data.eval_split > 1 and data.eval_split != int(data.eval_split):
        yield UserError("eval-split-fraction", eval_split=data.eval_split)
    for unit in ("chars", "tokens"):
        low, high = getattr(data.filter, f"min_{unit}"), getattr(data.filter, f"max_{unit}")
        if low is not None and high is not None and low > high:
            yield UserError("filter-passes-nothing", unit=unit, low=low, high=high)
    if data.eval is None and not data.eval_split:
        for field in ("eval_steps", "early_stopping_patience", "load_best_model_at_end", "sample_prompts"):
            if getattr(evaluation, field):
                yield UserError("nothing-held-out", field=field)
    for field in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(evaluation, field) and evaluation.eval_steps is None:
            yield UserError("no-evaluations", field=field)
    if evaluation.load_best_model_at_end and config.checkpoint.keep_best == 0:
        yield UserError("best-not-kept")
    if adapter.path is not None:
        for name, info in type(adapter).model_fields.items():
            if name != "path" and getattr(adapter, name) != info.get_default(call_default_factory=True):
                yield UserError("adapter-shape-ignored", field=name)
    if adapter.loftq_config is not None and adapter.init_lora_weights != "loftq":
        yield UserError("loftq-not-chosen")
    if adapter.layers_to_transform is not None and isinstance(adapter.target_modules, str):
        yield UserError("layers-without-names", targets=adapter.target_modules)
    if adapter.layers_pattern is not None and adapter.layers_to_transform is None:
        yield UserError("layers-pattern-alone")
    if adapter.changes_base and (config.model.quantization == "none" or config.model.cache_quantized is None):
        yield UserError("changed-base-not-kept", init=adapter.init_lora_weights)
    if adapter.changes_base and adapter.use_dora:
        yield UserError("dora-with-changed-base", init=adapter.init_lora_weights)
    if config.output_dir is not None and re.match(r"[a-z][a-z0-9+.-]+:/", str(config.output_dir)):
        yield UserError("run-folder-is-url", output_dir=str(config.output_dir).replace(":/", "://", 1))
    if evaluation.sample_prompts and not data.assistant_only_loss:
        yield UserError("samples-without-answers")
    if launch.min_workers > launch.max_workers:
        yield UserError("worker-range-reversed", least=launch.min_workers, most=launch.max_workers)
    if workers > 1 and config.shard.strategy == "none":
        yield UserError("strategy-for-one-worker", workers=workers)
    yield from shard_contradictions(config)
    if workers > 1 and launch.backend == "none":
        yield UserError("backend-for-one-worker", workers=workers)
    if launch.address is not None and launch.backend != "ray":
        yield UserError("address-without-ray", backend=launch.backend)
    yield from island_contradictions(config)
