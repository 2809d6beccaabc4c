"""What must not change between a checkpoint and its resumption, and taking a checkpoint up."""

from pathlib import Path
from typing import Any

import yaml

from qlora_dist.checkpoint.format import STATE, DamagedCheckpoint, Snapshot, read_snapshot
from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import RunConfig
from qlora_dist.data.tokens import TokenTable
from qlora_dist.model.weights import base_fingerprint
from qlora_dist.shard.strategy import FullState, Strategy
from qlora_dist.train.progress import Progress

# What makes an adapter another adapter, by PEFT's names.
ADAPTER_IDENTITY = (
    "r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern",
    "layers_to_transform",
)  # fmt: skip
# What a checkpoint was made with that says nothing of it.
IDENTITY_BEFORE = {"model.compute": "bf16", "model.embedding": "bf16", "model.head": "bf16"}


def run_identity(
    config: RunConfig, base_folder: Path, table: TokenTable, adapter_settings: dict[str, Any]
) -> dict[str, Any]:
    """What must not change between a checkpoint and its resumption, by the name of the setting it comes from."""
    return {
        "model.name": base_fingerprint(base_folder),
        "model.quantization": f"{config.model.quantization}, double_quant {config.model.double_quant}",
        "model.compute": config.model.compute,
        # What is in host memory is the same weight.
        **{
            f"model.{name}": "bf16" if kind == "host" else kind
            for name, kind in (("embedding", config.model.embedding), ("head", config.model.head))
        },
        "data.packing": f"to {config.data.max_length} tokens" if config.data.packing else "off",
        "data.train": table.fingerprint,
        "data.shuffle": config.data.shuffle,
        "train.global_batch_size": config.global_batch_size,
        "seed": config.seed,
        **{f"adapter.{name}": _sorted(adapter_settings.get(name)) for name in ADAPTER_IDENTITY},
    }


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


def resume(checkpoint: Path, strategy: Strategy, identity: dict[str, Any], optim: str | None = None) -> Progress:
    """Load a checkpoint into the strategy.

    Args:
        optim: this run's `train.optim`; None leaves it to the state's format whether it fits.

    Raises:
        UserError: it was made with another base, other data, another optimizer or global order; or it is damaged.
    """
    try:
        snapshot: Snapshot = read_snapshot(checkpoint)
    except DamagedCheckpoint as error:
        raise UserError("checkpoint-damaged", path=checkpoint, problems=str(error).split(": ", 1)[1]) from error
    if not {"identity", "progress"} <= snapshot.state.keys():
        raise UserError("checkpoint-damaged", path=checkpoint, problems=f"{STATE} lacks identity or progress")
    saved = snapshot.state["identity"]
    for name, value in identity.items():
        if saved.get(name, IDENTITY_BEFORE.get(name)) != value:
            if name == "data.train":
                raise UserError("checkpoint-data-differs", checkpoint=checkpoint)
            if len(str(value)) > 40:  # a checksum, which says nothing to a person
                raise UserError("checkpoint-content-differs", checkpoint=checkpoint, setting=name)
            was = saved.get(name, IDENTITY_BEFORE.get(name))
            raise UserError("checkpoint-value-differs", checkpoint=checkpoint, setting=name, saved=was, value=value)
    match yaml.safe_load(snapshot.config_yaml):
        # Paged or not, the state is the same.
        case {"train": {"optim": str(made_with)}} if optim and _unpaged(made_with) != _unpaged(optim):
            raise UserError("optimizer-differs", checkpoint=checkpoint, saved=made_with, optim=optim)
    strategy.load_full_state(FullState(snapshot.adapter, snapshot.optimizer, snapshot.optimizer_scalars))
    return Progress.from_dict(snapshot.state["progress"])


def _unpaged(optim: str) -> str:
    return optim.removeprefix("paged_")
