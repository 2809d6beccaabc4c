"""What is in a checkpoint folder, and how it gets there and back. One format for all strategies and world sizes.

    adapter_config.json, adapter_model.safetensors   a PEFT adapter: the folder loads in stock PEFT
    optimizer.safetensors, optimizer.json            state tensors under "PARAMETER|KEY", and scalars
    extra.safetensors                                what else a trainer keeps; absent where there is nothing
    state.json                                       schedule, data position, counters, best metric
    config.yaml                                      the resolved configuration
    manifest.json                                    written by the coordinator, last

No byte of the frozen base; nothing is pickled.
"""

import enum
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from qlora_dist.coordinate.files import fsync_folder
from qlora_dist.coordinate.manifest import MANIFEST, read_manifest

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OPTIMIZER_TENSORS = "optimizer.safetensors"
OPTIMIZER_SCALARS = "optimizer.json"
EXTRA_TENSORS = "extra.safetensors"
STATE = "state.json"
CONFIG = "config.yaml"
Files = dict[str, dict[str, Any]]


class DamagedCheckpoint(Exception):
    """A checkpoint folder is not what its manifest says; the message names the file."""


@dataclass
class Snapshot:
    """The trainable state of a run after `step` optimizer steps.

    Attributes:
        step: optimizer steps done.
        adapter: PEFT state-dict names -> tensors of any shape.
        adapter_config: PEFT's configuration as JSON (sets and enums are taken too).
        optimizer: "PARAMETER|KEY" -> state tensor, whole (not a rank's shard).
        optimizer_scalars: what else the optimizer keeps, JSON.
        state: schedule, data position, counters, scaler, best metric; JSON. No generator state: draws derive from
            (seed, step, pack).
        config_yaml: the resolved configuration.
        extra: what else is kept, such as the remainder of a compressed exchange.
    """

    step: int
    adapter: dict[str, Tensor]
    adapter_config: dict[str, Any]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    optimizer_scalars: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    config_yaml: str = ""
    extra: dict[str, Tensor] = field(default_factory=dict)


def copy_to_host(snapshot: Snapshot) -> Snapshot:
    """A copy that later training does not change: its tensors are contiguous, on the CPU, and share no memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        # Paged optimizer state is host memory that a kernel may still be writing.
        torch.cuda.synchronize()
    return Snapshot(
        step=snapshot.step,
        adapter={name: _copy(tensor) for name, tensor in snapshot.adapter.items()},
        adapter_config=_jsonable(snapshot.adapter_config, "adapter_config", loose=True),
        optimizer={name: _copy(tensor) for name, tensor in snapshot.optimizer.items()},
        optimizer_scalars=_jsonable(snapshot.optimizer_scalars, "optimizer_scalars"),
        state=_jsonable(snapshot.state, "state"),
        config_yaml=snapshot.config_yaml,
        extra={name: _copy(tensor) for name, tensor in snapshot.extra.items()},
    )


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def _jsonable(value: Any, where: str, loose: bool = False) -> Any:
    """A copy of `value`, if it comes back from JSON as it went in (`loose`: enums and sets become values and lists).

    Raises:
        TypeError: it would come back as something else (a tuple, a tensor, a number as a key); names the place.
    """
    if loose and isinstance(value, enum.Enum):
        return value.value
    if loose and isinstance(value, set | tuple):
        return sorted(value) if isinstance(value, set) else list(value)
    if value is None or type(value) in (str, int, float, bool):
        return value
    if type(value) is list:
        return [_jsonable(item, f"{where}[{place}]", loose) for place, item in enumerate(value)]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _jsonable(item, f"{where}.{key}", loose) for key, item in value.items()}
    raise TypeError(f"{where} is a {type(value).__name__}, which JSON would not give back as it is")


def write_snapshot(snapshot: Snapshot, folder: Path) -> Files:
    """Write a snapshot of CPU tensors into an existing empty folder and wait until it is on the disk.

    Returns:
        File name -> {"bytes", "sha256"}: what the manifest needs.

    Raises:
        OSError: no space, no permission; the folder then holds a part.
    """
    files: Files = {}

    def write(name: str, content: bytes) -> None:
        with open(folder / name, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # Of what was meant to be written, not of what a disk gives back.
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    state = {"step": snapshot.step, "state": _jsonable(snapshot.state, "state")}
    write(ADAPTER_CONFIG, _to_json(_jsonable(snapshot.adapter_config, "adapter_config", loose=True)))
    write(ADAPTER_WEIGHTS, _packed(snapshot.adapter))
    write(OPTIMIZER_TENSORS, _packed(snapshot.optimizer))
    write(OPTIMIZER_SCALARS, _to_json(_jsonable(snapshot.optimizer_scalars, "optimizer_scalars")))
    if snapshot.extra:
        write(EXTRA_TENSORS, _packed(snapshot.extra))
    write(STATE, _to_json(state))
    write(CONFIG, snapshot.config_yaml.encode())
    fsync_folder(folder)
    return files


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(whole, metadata={"format": "pt"})


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def read_snapshot(folder: Path) -> Snapshot:
    """Read a committed checkpoint; every byte is checked against the manifest before it is used.

    Raises:
        DamagedCheckpoint: a file is missing, short or altered, or the manifest is, or a file is not what we write.
    """
    try:
        expected = read_manifest(folder)["files"]
    except ValueError as error:
        raise DamagedCheckpoint(f"{folder}: {error}") from error

    def read(name: str) -> bytes:
        if name not in expected:
            raise DamagedCheckpoint(f"{folder}: {MANIFEST} does not list {name}")
        try:
            data = (folder / name).read_bytes()
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{folder}: {name} is missing") from None
        if hashlib.sha256(data).hexdigest() != expected[name]["sha256"]:
            raise DamagedCheckpoint(f"{folder}: {name} has been altered: its checksum differs")
        return data

    def parse(name: str, parser: Callable[[bytes], Any]) -> dict[str, Any]:
        try:
            parsed = parser(read(name))
        except (ValueError, safetensors.SafetensorError) as error:
            raise DamagedCheckpoint(f"{folder}: {name} cannot be parsed: {error}") from error
        if not isinstance(parsed, dict):
            raise DamagedCheckpoint(f"{folder}: {name} is no JSON object")
        return parsed

    state = parse(STATE, json.loads)
    if not isinstance(state.get("step"), int) or not isinstance(state.get("state"), dict):
        raise DamagedCheckpoint(f"{folder}: {STATE} has no step or no state")
    return Snapshot(
        step=state["step"],
        adapter=parse(ADAPTER_WEIGHTS, safetensors.torch.load),
        adapter_config=parse(ADAPTER_CONFIG, json.loads),
        optimizer=parse(OPTIMIZER_TENSORS, safetensors.torch.load),
        optimizer_scalars=parse(OPTIMIZER_SCALARS, json.loads),
        state=state["state"],
        config_yaml=read(CONFIG).decode(),
        extra=parse(EXTRA_TENSORS, safetensors.torch.load) if EXTRA_TENSORS in expected else {},
    )
