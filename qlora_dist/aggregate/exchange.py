"""What travels between an island and the coordinator: one message of bytes, decoded without pickle.

A message is a safetensors file of one flat vector, all tensors one after another in the order of its layout, and a
header of compressed JSON. At 8 and 4 bits each tensor is padded with zeros to whole blocks and quantised by
bitsandbytes' blockwise quantiser (dynamic 8-bit codes; NF4), with one bf16 scale a block: 8.06 and 4.13 bits an
element. Decoding is one table look-up and one float32 product an element, so that every machine gets the same bits:
whoever applies the same messages to the same adapter holds the same adapter.
"""

import contextlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from qlora_dist.aggregate.changes import Contribution, Tensors

FORMAT = 1
Bits = Literal[4, 8, 16, 32]
# Elements that share a scale.
BLOCK = {8: 256, 4: 128}
# Elements that are quantised at once: whole blocks, 4 MiB in fp32.
PIECE = 1 << 20
PLAIN = {32: torch.float32, 16: torch.bfloat16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_HEADER_BYTES = 1 << 24
MOST_ELEMENTS = 1 << 40


@dataclass(frozen=True)
class Header:
    """Whose message it is.

    Attributes:
        kind: a `change` to add to an adapter, or a whole `adapter`.
        island: who sent it, or whom it is for.
        round: whose adapter the change starts from.
        lease: of the packs that were trained; 0 where there is none.
        tokens: loss-bearing tokens that were trained; 0 from the coordinator.
        base: fingerprint of the frozen base model.
    """

    kind: Literal["change", "adapter"]
    island: str
    round: int
    lease: int
    tokens: int
    base: str


class Sizes(NamedTuple):
    """Bytes of a message: elements, scales, and everything else; together its length."""

    values: int
    scales: int
    header: int


class Message(NamedTuple):
    """A decoded message. Tensors have the dtypes that were encoded; not finite where an element of their block was."""

    header: Header
    bits: Bits
    tensors: Tensors
    sizes: Sizes


def encode(tensors: Mapping[str, Tensor], header: Header, bits: Bits, device: torch.device | None = None) -> bytes:
    """Tensors of float32, bf16 or fp16 as a message of so many bits an element.

    Where an element is not finite its whole block is not, so that the receiver sees it (bitsandbytes' 8-bit kernel for
    CPUs would make a finite number of a NaN).

    Args:
        device: quantises tensors on the CPU there (bitsandbytes' 4-bit quantiser takes 0.1 us an element on one CPU
            core), a piece of `PIECE` elements after another, since a step may have left little of a GPU's memory.
            None quantises where the tensors are.
    """
    names = sorted(tensors)
    layout = [[name, list(tensors[name].shape), str(tensors[name].dtype).removeprefix("torch.")] for name in names]
    flat = [tensors[name].detach().reshape(-1) for name in names]
    parts: Tensors = {}
    if bits in PLAIN:
        parts["values"] = torch.cat([part.to(PLAIN[bits]) for part in flat]).cpu()
    else:
        with _own_stream(device):
            pieces = [_quantise(piece.to(device or piece.device), bits) for part in flat for piece in part.split(PIECE)]
        parts["values"] = torch.cat([codes for codes, _ in pieces])
        parts["scales"] = torch.cat([scales for _, scales in pieces])
    text = json.dumps({"format": FORMAT, **asdict(header), "bits": bits, "layout": layout}).encode()
    parts["header"] = torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)
    return safetensors.torch.save(parts)


def _own_stream(device: torch.device | None) -> contextlib.AbstractContextManager[Any]:
    # In the stream of training each piece would wait for all steps that are queued there.
    if device is None or device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


def _quantise(piece: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """One dimension's codes, uint8, and the scales of its blocks, bf16, both on the CPU."""
    if not len(piece):
        return torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.bfloat16)
    # Its import takes seconds and writes a line: not before somebody quantises.
    import bitsandbytes.functional as bnb

    padded = torch.nn.functional.pad(piece.float(), (0, -len(piece) % BLOCK[bits]))
    if bits == 8:
        codes, state = bnb.quantize_blockwise(padded, blocksize=BLOCK[8])
    else:
        codes, state = bnb.quantize_4bit(padded, blocksize=BLOCK[4], quant_type="nf4")
    finite = padded.view(-1, BLOCK[bits]).isfinite().all(1)
    return codes.reshape(-1).cpu(), torch.where(finite, state.absmax, torch.nan).to(torch.bfloat16).cpu()


def decode(data: bytes) -> Message:
    """Read a message that anybody may have sent.

    Raises:
        ValueError: it is no message, or not a whole one; says why.
    """
    try:
        parts = safetensors.torch.load(data)
        raw = json.loads(_inflated(parts["header"]))
        if raw.pop("format") != FORMAT:
            raise ValueError(f"another version wrote it; this one reads format {FORMAT}")
        bits, layout = (
            raw.pop("bits"),
            [(name, tuple(shape), DTYPES[dtype]) for name, shape, dtype in raw.pop("layout")],
        )
        header = Header(**raw)
        _check_header(header, bits, layout)
        sizes = [math.prod(shape) for _, shape, _ in layout]
        flat = _values(parts, bits, sizes)
    except (SafetensorError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise ValueError(f"this is no whole message of an exchange: {type(error).__name__}: {error}") from error
    block, start, tensors = BLOCK.get(bits, 1), 0, {}
    for (name, shape, dtype), size in zip(layout, sizes, strict=True):
        tensors[name] = flat[start : start + size].reshape(shape).to(dtype)
        start += size + -size % block
    values, scales = (parts[n].numel() * parts[n].element_size() if n in parts else 0 for n in ("values", "scales"))
    return Message(header, bits, tensors, Sizes(values, scales, len(data) - values - scales))


def as_contribution(message: Message, scale: float = 1.0) -> Contribution:
    """What an island's message adds to a round; `scale` as `coordinate.island_messages.discount` has it."""
    told = message.header
    return Contribution(told.island, message.tensors, told.tokens, told.base, told.round, scale, told.lease)


def _inflated(packed: Tensor) -> bytes:
    inflater = zlib.decompressobj()
    text = inflater.decompress(packed.numpy().tobytes(), MOST_HEADER_BYTES)
    if not inflater.eof:
        raise ValueError("its header is cut short, or too long")
    return text


def _check_header(header: Header, bits: Any, layout: list[tuple[Any, tuple[Any, ...], torch.dtype]]) -> None:
    numbers = (header.round, header.lease, header.tokens)
    if header.kind not in ("change", "adapter") or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("kind, round, lease or tokens are wrong")
    if not isinstance(header.island, str) or not isinstance(header.base, str) or bits not in (*PLAIN, *BLOCK):
        raise ValueError("island, base or bits are wrong")
    names = [name for name, _, _ in layout]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError("a tensor's name is wrong, or stands twice")
    for name, shape, _ in layout:
        if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) > MOST_ELEMENTS:
            raise ValueError(f"the shape of {name} is wrong")


def _values(parts: Tensors, bits: Bits, sizes: list[int]) -> Tensor:
    """All elements, float32, with the padding."""
    expected = {"header", "values"} | ({"scales"} if bits in BLOCK else set())
    if set(parts) != expected:
        raise ValueError(f"it holds {sorted(parts)}")
    values = parts["values"]
    if bits in PLAIN:
        _require(values, sum(sizes), PLAIN[bits])
        return values.float()
    block = BLOCK[bits]
    blocks = sum(math.ceil(size / block) for size in sizes)
    _require(values, blocks * block * bits // 8, torch.uint8)
    _require(parts["scales"], blocks, torch.bfloat16)
    elements = _table(bits).index_select(0, values.int())
    return elements.reshape(-1, block).mul_(parts["scales"].float()[:, None]).reshape(-1)


def _table(bits: Bits) -> Tensor:
    """What each byte stands for: float32 [256, elements a byte]."""
    import bitsandbytes.functional as bnb

    if bits == 8:
        return bnb.create_dynamic_map()[:, None]
    codes = bnb.get_4bit_type("nf4", device="cpu")
    # The first of two elements is in the high half of the byte.
    return torch.stack([codes.repeat_interleave(16), codes.repeat(16)], 1)


def _require(tensor: Tensor, size: int, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.shape != (size,):
        raise ValueError(f"it holds {tuple(tensor.shape)} of {tensor.dtype} where {size} of {dtype} belong")


@dataclass
class Encoder:
    """One sender's side of a compressed exchange: what rounding left out of a message is added to the next.

    Error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847): with e the residual, a message holds
    Q(change + e), and e becomes (change + e) - Q(change + e). So the sum of all messages differs from the sum of all
    changes by the last residual only. Nothing is taken back when a contribution is refused or too late: its packs
    are trained again by others, and the residual is rounding alone.

    Attributes:
        residual: float32 on the CPU; empty before the first message.
    """

    bits: Bits
    residual: Tensors

    def __init__(self, bits: Bits, residual: Mapping[str, Tensor] | None = None):
        self.bits = bits
        self.residual = dict(residual or {})

    def encode(
        self, change: Mapping[str, Tensor], header: Header, device: torch.device | None = None
    ) -> tuple[bytes, Tensors]:
        """The message, and what its receiver will decode (float32).

        A change that is not finite is sent as it is, and leaves no residual behind.

        Args:
            device: see `encode`.
        """
        whole = {
            name: tensor.detach().float() + (self.residual[name].to(tensor.device) if name in self.residual else 0.0)
            for name, tensor in change.items()
        }
        data = encode(whole, header, self.bits, device)
        decoded = decode(data).tensors
        if self.bits != 32 and all(bool(tensor.isfinite().all()) for tensor in whole.values()):
            self.residual = {name: whole[name].cpu() - decoded[name] for name in whole}
        return data, decoded

    def forget(self, names: list[str]) -> None:
        """Drop the residual of parameters whose coordinates have changed (`outer.Outcome.reset`)."""
        for name in names:
            self.residual.pop(name, None)

    def state_dict(self) -> Tensors:
        """As tensors that safetensors holds."""
        return dict(self.residual)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` gave."""
        self.residual = dict(tensors)
