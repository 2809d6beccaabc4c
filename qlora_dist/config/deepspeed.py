"""What DeepSpeed is configured with: our settings, and of a person's DeepSpeed JSON what does not contradict them."""

import json
import math
from collections.abc import Iterator
from typing import Any

from qlora_dist.config.catalogue.facts import first_line
from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig

# Elements (fp32) of a bucket in which ZeRO-2 reduces gradients: 32 MiB.
BUCKET_ELEMENTS = 2**23
# What a person may set: how fast and how chatty DeepSpeed is, not what is trained or how it is laid out.
FREE = (
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
    "zero_optimization.overlap_comm", "zero_optimization.contiguous_gradients", "zero_optimization.reduce_scatter",
    "zero_optimization.reduce_bucket_size", "zero_optimization.allgather_bucket_size",
    "zero_optimization.allgather_partitions", "zero_optimization.use_multi_rank_bucket_allreduce",
    "zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance", "zero_optimization.stage3_allgather_sequential",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save", "zero_optimization.log_trace_cache_warnings",
    "zero_optimization.offload_optimizer.pin_memory", "zero_optimization.offload_param.pin_memory",
)  # fmt: skip


def deepspeed_settings(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for the strategies zero2 and zero3.

    Raises:
        UserError: `shard.deepspeed_config` cannot be read, or one of its keys contradicts ours or is none that it may
            set.
    """
    ours = _ours(config)
    said = _said_elsewhere(config)
    for key, value in _leaves(_theirs(config)):
        # The other settings of a precision that is off do nothing.
        if value == "auto" or (key.startswith(("fp16.", "bf16.", "amp.")) and not key.endswith(".enabled")):
            continue
        decided = said.get(key, _get(ours, key))
        if decided is not None and key not in FREE:
            if value != decided:
                raise UserError("deepspeed-contradicts", key=key, value=json.dumps(value), ours=json.dumps(decided))
        elif key.startswith(FREE):
            _set(ours, key, value)
        else:
            raise UserError("deepspeed-key", key=key)
    return ours


def _ours(config: RunConfig) -> dict[str, Any]:
    stage = 3 if config.strategy == "zero3" else 2
    offload = config.shard.offload
    if stage == 2 and "shards" in offload:
        raise UserError("zero2-shards-offloaded")
    zero: dict[str, Any] = {
        "stage": stage,
        # The weights are laid out flat and cut on the optimizers' blocks, in the order of the model.
        "round_robin_gradients": False,
        "parameter_alignment": False,
        "sub_group_size": 10**12,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "overlap_comm": True,
        "memory_efficient_linear": False,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
        "zero_hpz_partition_size": 1,
        "offload_optimizer": {"device": "cpu" if "optimizer" in offload else "none", "pin_memory": True},
        "offload_param": {"device": "cpu" if "shards" in offload else "none", "pin_memory": True},
    }
    if stage == 2:
        # Our loop takes the norm; DeepSpeed's offloaded optimizer cannot do without its own.
        zero |= {"contiguous_gradients": True, "compute_grad_norm": "optimizer" in offload}
        del zero["offload_param"]
    else:
        zero |= {
            "contiguous_gradients": False,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            # A unit has two parameters, and each is gathered in place.
            "stage3_allgather_sequential": True,
            "stage3_use_all_reduce_for_fetch_params": False,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # ZeRO-3 averages, and is corrected for it.
        "gradient_allreduce_op": "sum" if stage == 2 else "mean",
        "gradient_predivide_factor": 1.0,
        "prescale_gradients": False,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Its timer would wait for the GPU.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": zero,
    }


def _said_elsewhere(config: RunConfig) -> dict[str, Any]:
    """What our config says of keys that DeepSpeed itself is told something else of, because our loop does it.

    Where the number of workers is a range, accumulation is that of the most, as the global batch is.
    """
    train, together = config.train, config.global_batch_size
    steps = math.ceil(together / (train.per_device_train_batch_size * config.launch.max_workers))
    return {
        "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
        "gradient_accumulation_steps": steps,
        "train_batch_size": together,
        "gradient_clipping": train.max_grad_norm,
        "fp16.enabled": False,
        "bf16.enabled": False,
        "amp.enabled": False,
        "torch_autocast.enabled": False,
    }


def _theirs(config: RunConfig) -> dict[str, Any]:
    path = config.shard.deepspeed_config
    if path is None:
        return {}
    try:
        theirs = json.loads(path.expanduser().read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("deepspeed-unreadable", path=path, reason=first_line(error)) from error
    if not isinstance(theirs, dict):
        raise UserError("deepspeed-unreadable", path=path, reason="it is no JSON object")
    return theirs


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, below in value.items():
        if isinstance(below, dict) and below and f"{prefix}{name}" not in FREE:
            yield from _leaves(below, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", below


def _get(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    for name in above:
        tree = tree.setdefault(name, {})
    tree[last] = value
