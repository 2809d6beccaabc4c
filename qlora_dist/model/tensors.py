"""Tensors of a model folder, one at a time: named now, read when asked for, never mapped into memory."""

import math
from collections.abc import Callable
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch

from qlora_dist.config.errors import UserError
from qlora_dist.model.weights import read_header, weight_files

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class LazyTensor:
    """A tensor that exists while it is used: `lazy[...]` makes it, as transformers asks of a safetensors slice.

    Args:
        shape: its shape.
        dtype: safetensors' name of its dtype, such as BF16.
        make: gives the tensor; called each time it is asked for.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, make: Callable[[], torch.Tensor]):
        self._shape, self._dtype, self._make = shape, dtype, make

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._make()
        return tensor if index is Ellipsis else tensor[index]

    def get_shape(self) -> list[int]:
        """The shape, as safetensors' slices give it."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """The dtype by safetensors' name."""
        return self._dtype


def folder_tensors(folder: Path) -> dict[str, LazyTensor]:
    """All tensors of the safetensors files in `folder`, unread.

    Each is read with plain file reads: mapped pages would count as this process's memory wherever that is measured,
    and pressure on them stalls every rank of a node.

    Raises:
        UserError: a file is missing, damaged or cut short; also by a tensor whose file cannot be read then.
    """
    tensors: dict[str, LazyTensor] = {}
    for path in weight_files(folder):
        header, data_start = read_header(path)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if entry["dtype"] not in DTYPES:
                raise UserError("weights-dtype", file=path, name=name, dtype=entry["dtype"])
            if math.prod(shape) * DTYPES[entry["dtype"]].itemsize != end - begin:
                raise UserError("safetensors-header", file=path)
            tensors[name] = LazyTensor(
                shape, entry["dtype"], _reader(path, data_start + begin, end - begin, shape, DTYPES[entry["dtype"]])
            )
    return tensors


def _reader(
    path: Path, offset: int, size: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        raw = torch.empty(size, dtype=torch.uint8)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                _fill(raw.numpy().data, file)
        except OSError as error:
            raise UserError("weights-unreadable", file=path, reason=error.strerror or error) from error
        return raw.view(dtype).reshape(shape)

    return read


def _fill(view: memoryview, file: RawIOBase) -> None:
    done = 0
    # One read() returns at most 2 GiB on Linux.
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise OSError("it ended too early")
        done += count
