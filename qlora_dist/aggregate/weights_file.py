"""A safetensors file written one tensor after another, so that no more than one of them is in memory."""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor


def write_weights(
    file: Path, shapes: Mapping[str, Sequence[int]], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write fp32 tensors to a new safetensors file.

    Args:
        file: its place.
        shapes: of all tensors, in the order in which they come.
        tensors: names and values; any floating-point dtype and device.
        metadata: of the file.

    Raises:
        ValueError: a tensor has another name or shape than its place in `shapes`, or one is missing.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for (name, shape), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            if given != name or list(tensor.shape) != list(shape):
                raise ValueError(f"{given} {list(tensor.shape)} came in the place of {name} {list(shape)}")
            out.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).data)
