"""The coordinator's files of the outer loop: what islands sent, and what each committed round left.

    contributions/NAME                   a message, on the disk before the event that names it
    rounds/VERSION-NONCE/                after VERSION rounds; 0 is what islands began with
        adapter/                         the adapter: a PEFT folder
        shared.safetensors               what islands hold of it, where exchange_bits is below 32
        outer.safetensors                the outer loop's state, and what rounding left out of the messages to islands
        change                           the message that brings an island here from the version before

A folder that no event names does not count, and goes when a coordinator starts.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

import safetensors.torch
from torch import Tensor

from qlora_dist.aggregate.changes import Tensors, apply_change, change_of
from qlora_dist.aggregate.exchange import Bits, Encoder, Header, encode
from qlora_dist.aggregate.outer import OuterState
from qlora_dist.coordinate.files import fsync_folder, write_atomically
from qlora_dist.coordinate.service import FILE_NAME

ROUNDS, CONTRIBUTIONS = "rounds", "contributions"
ADAPTER, SHARED, OUTER, CHANGE, WHOLE = "adapter", "shared.safetensors", "outer.safetensors", "change", "whole"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RESIDUAL = "residual."
COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Version:
    """The outer loop after `state.round` rounds.

    Attributes:
        exact: the adapter, PEFT's names, frozen factors included.
        shared: what islands hold of it; `exact` itself at 32 bits.
        residual: of the messages to islands (`exchange.Encoder`).
        folder: its name in rounds/.
        sha256: the adapter's digest.
    """

    exact: Tensors
    shared: Tensors
    state: OuterState
    residual: Tensors
    folder: str
    sha256: str


def write_version(
    run_dir: Path,
    before: Version | None,
    exact: Mapping[str, Tensor],
    state: OuterState,
    trained: Iterable[str],
    bits: Bits,
    base: str,
    adapter_config: bytes,
    notes: Mapping[str, str],
) -> Version:
    """Write the next version into a new folder and wait until it is on the disk; an event is still to name it.

    Args:
        before: the version before; None for what islands begin with.
        trained: the names that islands train and exchange.
        notes: for the weights file's metadata.
    """
    name = f"{state.round:06d}-{secrets.token_hex(4)}"
    folder = run_dir / ROUNDS / name
    (folder / ADAPTER).mkdir(parents=True)
    shared, residual = dict(exact), dict[str, Tensor]()
    header = Header("adapter", "", state.round, 0, 0, base)
    if before is not None:
        names = sorted(trained)
        if bits == 32:
            _write(folder / CHANGE, encode({n: exact[n] for n in names}, header, 32))
        else:
            encoder = Encoder(bits, before.residual)
            step = Header("change", "", before.state.round, 0, 0, base)
            data, decoded = encoder.encode(change_of({n: exact[n] for n in names}, before.exact), step)
            _write(folder / CHANGE, data)
            shared, residual = apply_change(before.shared, decoded), encoder.residual
            _write(folder / SHARED, safetensors.torch.save(shared))
    weights = safetensors.torch.save({n: t.contiguous() for n, t in exact.items()}, {"format": "pt", **notes})
    _write(folder / ADAPTER / WEIGHTS, weights)
    _write(folder / ADAPTER / CONFIG, adapter_config)
    outer = state.state_dict() | {RESIDUAL + n: tensor for n, tensor in residual.items()}
    _write(folder / OUTER, safetensors.torch.save(outer))
    for path in (folder / ADAPTER, folder, folder.parent, run_dir):
        fsync_folder(path)
    return Version(dict(exact), shared, state, residual, name, digest(exact))


def digest(adapter: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits that differ where a bit of an adapter does.

    A weights file's own checksum would not do: safetensors writes its metadata in any order.
    """
    return hashlib.sha256(safetensors.torch.save({n: t.contiguous() for n, t in adapter.items()})).hexdigest()


def read_version(run_dir: Path, name: str) -> Version:
    """A committed version.

    Raises:
        FileNotFoundError, SafetensorError: its folder is not whole.
    """
    folder = run_dir / ROUNDS / name
    exact = safetensors.torch.load((folder / ADAPTER / WEIGHTS).read_bytes())
    shared = safetensors.torch.load((folder / SHARED).read_bytes()) if (folder / SHARED).exists() else dict(exact)
    outer = safetensors.torch.load((folder / OUTER).read_bytes())
    residual = {n.removeprefix(RESIDUAL): tensor for n, tensor in outer.items() if n.startswith(RESIDUAL)}
    state = OuterState.load_state_dict({n: tensor for n, tensor in outer.items() if not n.startswith(RESIDUAL)})
    return Version(exact, shared, state, residual, name, digest(exact))


def whole_message(run_dir: Path, version: Version, base: str) -> Path:
    """The file of the message that brings whoever joins to `version`: all of it, 32 bits an element."""
    path = run_dir / ROUNDS / version.folder / WHOLE
    if not path.exists():
        header = Header("adapter", "", version.state.round, 0, 0, base)
        write_atomically(path, encode(version.shared, header, 32))
    return path


def contribution_path(run_dir: Path, name: str) -> Path:
    """Where `take_contribution` keeps a message.

    Raises:
        ValueError: the service takes no file of that name; it might lead out of the folder.
    """
    if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
        raise ValueError("that is no name of a file that was sent")
    return run_dir / CONTRIBUTIONS / name


def take_contribution(run_dir: Path, name: str, stream: BufferedIOBase, size: int) -> None:
    """Keep `size` bytes of a stream as contributions/NAME, on the disk when this returns.

    Raises:
        ConnectionError: the stream ends before.
        ValueError: see `contribution_path`.
    """
    target = contribution_path(run_dir, name)
    folder = target.parent
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        fsync_folder(run_dir)
    partial = folder / f".{name}.{secrets.token_hex(4)}"
    try:
        with partial.open("xb") as file:
            left = size
            while left:
                data = stream.read(min(left, COPY_BYTES))
                if not data:
                    raise ConnectionError(f"{name}: {left} of {size} bytes are missing")
                file.write(data)
                left -= len(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        fsync_folder(folder)
    finally:
        partial.unlink(missing_ok=True)


def sweep(run_dir: Path, versions: Iterable[str], contributions: Iterable[str]) -> None:
    """Remove what is in rounds/ and contributions/ beside these names."""
    for folder, kept in ((run_dir / ROUNDS, set(versions)), (run_dir / CONTRIBUTIONS, set(contributions))):
        for path in folder.glob("*") if folder.is_dir() else ():
            if path.name not in kept:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
