"""What safetensors files hold, read from their headers, and a fingerprint of a base model."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from qlora_dist.config.catalogue.facts import and_more
from qlora_dist.config.errors import UserError

SYNTHETIC_FILE = "SYNTHETIC.json"
SAMPLE_BYTES = 512
SAMPLES = 4
# Written by whoever saved the folder last; the same model saved twice differs in them.
VOLATILE_CONFIG_KEYS = {"transformers_version", "_name_or_path"}


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors of a safetensors file and the byte at which their data starts.

    Returns:
        tensor name -> {"dtype", "shape", "data_offsets" (begin, end; relative to the data)}, and the data's offset.

    Raises:
        UserError: the file is cut short or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + header_bytes > size:
            raise UserError("safetensors-cut", file=path)
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError as error:
            raise UserError("safetensors-header", file=path) from error
    if not isinstance(header, dict) or not all(map(_is_tensor, [v for k, v in header.items() if k != "__metadata__"])):
        raise UserError("safetensors-header", file=path)
    header.pop("__metadata__", None)
    end = 8 + header_bytes + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise UserError("safetensors-size", file=path, size=size, promised=end)
    return header, 8 + header_bytes


def _is_tensor(entry: Any) -> bool:
    match entry:
        case {"dtype": str(), "shape": [*shape], "data_offsets": [int(), int()]}:
            return all(isinstance(size, int) for size in shape)
    return False


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model in `folder`, in name order.

    Raises:
        UserError: there is none (only pickled weights, or nothing), or a file that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError("weights-index-damaged", file=index) from error
        files = [folder / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError("weight-files-missing", folder=folder, files=and_more(missing))
        return files
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if files:
        return files
    pickled = sorted(file for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        raise UserError("weights-pickled", folder=folder, file=pickled[0].name)
    raise UserError("weights-absent", folder=folder)


def is_synthetic(folder: Path) -> bool:
    """Whether `folder` is a base whose weights are made, not stored."""
    return (folder / SYNTHETIC_FILE).is_file()


def base_fingerprint(folder: Path) -> str:
    """Which base model lies in `folder`: 64 hex digits of SHA-256.

    Covers config.json (without what every save changes) and, for each tensor, name, dtype, shape and four samples of
    512 bytes spread over its data. The way tensors are spread over files does not count. An edit that misses
    all samples of a tensor is not seen; a fine-tuned, re-quantised or other model is. Of a synthetic base, whose
    weights follow from their names, it covers config.json and SYNTHETIC.json.

    Raises:
        UserError: a weight file is missing or damaged.
    """
    config = json.loads((folder / "config.json").read_text())
    digest = hashlib.sha256(
        json.dumps({k: v for k, v in config.items() if k not in VOLATILE_CONFIG_KEYS}, sort_keys=True).encode()
    )
    if is_synthetic(folder):
        digest.update((folder / SYNTHETIC_FILE).read_bytes())
        return digest.hexdigest()
    tensors: list[tuple[str, bytes]] = []
    for path in weight_files(folder):
        header, data_start = read_header(path)
        with path.open("rb") as file:
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                sampled = hashlib.sha256(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
                span = max(0, end - begin - SAMPLE_BYTES)
                for offset in sorted({span * i // (SAMPLES - 1) for i in range(SAMPLES)}):
                    file.seek(data_start + begin + offset)
                    sampled.update(file.read(min(SAMPLE_BYTES, end - begin)))
                tensors.append((name, sampled.digest()))
    for _, tensor_digest in sorted(tensors):
        digest.update(tensor_digest)
    return digest.hexdigest()
