"""Embedding and head in less GPU memory than the compute dtype takes: int8, NF4, or host memory.

    8bit  int8 with one fp32 scale a row, |row|max / 127; a value is int8 * scale, then rounded to the compute dtype
    nf4   bitsandbytes' NF4 in blocks of 64, double-quantised where the layers are
    host  the compute dtype in pinned host memory; a GPU reads it over the bus

The modules are transformers' own by name and place. What is looked up is turned back row by row, the head a slice of
the vocabulary at a time, so that the whole weight never exists in floating point.

V vocabulary, H hidden size, N tokens.
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qlora_dist.config.errors import UserError
from qlora_dist.config.schema import ModelConfig
from qlora_dist.kernels.linear_cross_entropy import Slices, product_into
from qlora_dist.kernels.nf4 import NestedAbsmax, dequantize_4bit_into
from qlora_dist.kernels.rows import dequantize_8bit_into, gather_rows, gather_rows_4bit, gather_rows_8bit
from qlora_dist.model.projection import current, scratch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of a slice in the compute dtype; less than the layers' scratch buffer, which it shares, from 7B models on.
SLICE_BYTES = 2**27
# Rows of a slice: GEMMs like multiples.
SLICE_ROWS = 128
# Rows that are quantised to int8 at a time, which takes four bytes a value beside them.
INT8_ROWS = 8192


class Stored(nn.Module):
    """What `StoredEmbedding` and `StoredHead` share: a weight [V, H] that becomes `kind` once it is filled.

    Attributes:
        dtype: of what it gives; None until it is stored.
        host: the weight of kind `host`, which is no parameter: it is neither on the device nor ever sharded.
        scale: fp32 [V] of kind `8bit`, no buffer either, as transformers empties those after it has filled a model;
            small enough to be whole on every rank.
    """

    weight: Any
    kind: str
    double_quant: bool
    dtype: torch.dtype | None = None
    host: Tensor | None = None
    scale: Tensor | None = None

    def plan(self, plain: Any, kind: str, double_quant: bool) -> None:
        """Stand in for `plain`, whose weight is to be filled yet."""
        self._parameters.update(plain._parameters)
        self.kind, self.double_quant = kind, double_quant
        self.train(plain.training)

    def is_filled(self) -> bool:
        """Whether the weight is there and not stored yet."""
        return self.dtype is None and self.weight.device.type != "meta"

    def store(self) -> None:
        """Give up the filled weight [V, H] for what `kind` makes of it."""
        weight: Tensor = self.weight.detach()
        self.dtype = weight.dtype
        # transformers' mark: what is there is not drawn anew.
        self._is_hf_initialized = True
        if self.kind == "host":
            pinned = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=weight.is_cuda)
            self.host = pinned.copy_(weight)
            self._parameters["weight"] = None
        elif self.kind == "8bit":
            rows, self.scale = quantize_8bit(weight)
            self._put(nn.Parameter(rows, requires_grad=False))
        else:
            self._put(_quantize_nf4(weight, self.double_quant))

    def share(self, other: "Stored") -> None:
        """Be tied to `other`, which is stored."""
        self.dtype, self.host, self.scale = other.dtype, other.host, other.scale
        self._parameters["weight"] = other.weight

    def _put(self, weight: nn.Parameter) -> None:
        # Marks that others left, such as that it needs no initialisation.
        weight.__dict__.update(self.weight.__dict__)
        self._parameters["weight"] = weight

    @property
    def shape(self) -> tuple[int, int]:
        """V and H."""
        raise NotImplementedError

    def rows(self, index_N: Tensor) -> Tensor:
        """Rows `index_N` of the weight, [N, H] on the index's device."""
        assert self.dtype is not None
        if self.host is not None:
            return gather_rows(self.host, index_N)
        weight = current(self, "weight")
        if self.scale is not None:
            return gather_rows_8bit(weight, self.scale, index_N, self.dtype)
        state = weight.quant_state
        nested = _nested(state, 0)
        return gather_rows_4bit(
            weight.data, state.absmax, state.code, state.blocksize, nested, index_N, self.shape[1], self.dtype
        )

    def slices(self, device: torch.device) -> Slices:
        """The weight as it stands, a slice of the vocabulary at a time, in the shared scratch buffer on `device`."""
        assert self.dtype is not None
        vocabulary, hidden = self.shape
        weight = self.host if self.host is not None else current(self, "weight")
        like = torch.empty(0, dtype=self.dtype, device=device)

        def make(first: int, last: int) -> Tensor:
            out_RH = scratch((last - first) * hidden, like).view(last - first, hidden)
            if self.host is not None:
                return out_RH.copy_(weight[first:last], non_blocking=True)
            if self.scale is not None:
                return dequantize_8bit_into(out_RH, weight[first:last], self.scale[first:last])
            return _dequantize_rows(out_RH, weight, first)

        return Slices(vocabulary, self.dtype, slice_rows(weight, vocabulary, hidden, self.dtype.itemsize), make)


class StoredEmbedding(Stored, nn.Embedding):
    """An embedding that looks tokens up in what is stored."""

    def __init__(self, plain: nn.Embedding, kind: str, double_quant: bool):
        super().__init__(
            plain.num_embeddings, plain.embedding_dim, plain.padding_idx, device="meta", dtype=plain.weight.dtype
        )
        self.plan(plain, kind, double_quant)

    @property
    def shape(self) -> tuple[int, int]:
        """See `Stored.shape`."""
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        """The rows of token ids of any shape, [..., H]."""
        return self.rows(input.reshape(-1)).view(*input.shape, self.embedding_dim)


class StoredHead(Stored, nn.Linear):
    """A head that makes its logits, and the gradient of its input, a slice of the vocabulary at a time."""

    def __init__(self, plain: nn.Linear, kind: str, double_quant: bool):
        bias = plain.bias is not None
        super().__init__(plain.in_features, plain.out_features, bias, device="meta", dtype=plain.weight.dtype)
        self.plan(plain, kind, double_quant)

    @property
    def shape(self) -> tuple[int, int]:
        """See `Stored.shape`."""
        return self.out_features, self.in_features

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + b, [..., V] of [..., H], in the compute dtype."""
        assert self.dtype is not None
        x_NH = input.reshape(-1, self.in_features).to(self.dtype)
        logits_NV: Tensor = _SlicedLinear.apply(x_NH, lambda: self.slices(x_NH.device))
        bias_V = current(self, "bias")
        logits_NV = logits_NV if bias_V is None else logits_NV + bias_V.to(self.dtype)
        return logits_NV.view(*input.shape[:-1], self.out_features)


class _SlicedLinear(torch.autograd.Function):
    """x W^T for a frozen W that is made in the forward and again in the backward, and saved in neither."""

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, weight: Callable[[], Slices]) -> Tensor:
        ctx.weight, ctx.hidden = weight, x_NH.shape[1]
        slices = weight()
        logits_NV = x_NH.new_empty(x_NH.shape[0], slices.vocabulary)
        for part, weight_RH in slices:
            torch.mm(x_NH, weight_RH.t(), out=logits_NV[:, part])
        return logits_NV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor, None]:
        slices = ctx.weight()
        dx_NH = grad_NV.new_empty(grad_NV.shape[0], ctx.hidden)
        product_into(dx_NH, grad_NV, slices)
        return dx_NH, None


def plan_storage(model: "PreTrainedModel", config: ModelConfig, folder: Any) -> None:
    """Put `StoredEmbedding` and `StoredHead` in the place of a model's own where `config` asks for them, unfilled yet.

    Raises:
        UserError: embedding and head are one weight and their settings differ, or they are not plain ones.
    """
    if config.embedding != config.head and is_tied(model):
        raise UserError("tied-vocabulary", embedding=config.embedding, head=config.head, folder=folder)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    for field, kind, module, plain in (
        ("embedding", config.embedding, embedding, nn.Embedding),
        ("head", config.head, head, nn.Linear),
    ):
        if kind != "bf16" and type(module) is not plain:
            type_ = type(module).__name__
            raise UserError(
                "vocabulary-not-plain", field=field, kind=kind, model_type=model.config.model_type, type=type_
            )
    if config.embedding != "bf16":
        model.set_input_embeddings(StoredEmbedding(embedding, config.embedding, config.double_quant))
    if config.head != "bf16":
        model.set_output_embeddings(StoredHead(head, config.head, config.double_quant))


def store_filled(model: "PreTrainedModel", last: bool) -> None:
    """Store what is filled of embedding and head; tied ones with `last` alone, when it is known that they are one."""
    if is_tied(model) and not last:
        return
    done: list[tuple[Tensor, Stored]] = []
    for module in stored_modules(model):
        if not module.is_filled():
            continue
        tied = next((other for weight, other in done if weight is module.weight), None)
        if tied is None:
            done.append((module.weight, module))
            module.store()
        else:
            module.share(tied)


def stored_modules(model: nn.Module) -> Iterator[Stored]:
    """The modules of `model` that keep their weight otherwise than in the compute dtype."""
    return (module for module in model.modules() if isinstance(module, Stored))


def is_tied(model: "PreTrainedModel") -> bool:
    """Whether the model's config makes embedding and head one weight."""
    names = {module: name for name, module in model.named_modules()}
    ends = {f"{names.get(end)}.weight" for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    pairs: Any = model.all_tied_weights_keys
    return any(ends == {*pair} for pair in pairs.items())


def quantize_8bit(weight_VH: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [V, H] and fp32 scales [V] of which the products are nearest to the weight; a row of zeros has scale 0."""
    rows_VH = torch.empty(weight_VH.shape, dtype=torch.int8, device=weight_VH.device)
    scale_V = torch.empty(weight_VH.shape[0], device=weight_VH.device)
    for first in range(0, weight_VH.shape[0], INT8_ROWS):
        part = slice(first, first + INT8_ROWS)
        weight = weight_VH[part].float()
        scale_V[part] = weight.abs().amax(1) / 127
        rows_VH[part] = (weight / scale_V[part].clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_()
    return rows_VH, scale_V


def slice_rows(weight: Any, vocabulary: int, hidden: int, itemsize: int) -> int:
    """Rows of a slice of the head: about SLICE_BYTES, and whole blocks of whatever is quantised."""
    multiple = SLICE_ROWS
    state = getattr(weight, "quant_state", None)
    if state is not None:
        values = state.blocksize * (state.state2.blocksize if state.nested else 1)
        multiple = math.lcm(multiple, values // math.gcd(values, hidden))
    rows = max(SLICE_BYTES // (hidden * itemsize) // multiple, 1) * multiple
    return min(rows, vocabulary)


def _quantize_nf4(weight: Tensor, double_quant: bool) -> nn.Parameter:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Params4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    made: nn.Parameter = Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=64, compress_statistics=double_quant,
        quant_type="nf4", bnb_quantized=True,
    )  # fmt: skip
    return made


def _nested(state: Any, first_block: int) -> NestedAbsmax | None:
    if not state.nested:
        return None
    outer = state.state2
    return NestedAbsmax(outer.absmax[first_block // outer.blocksize :], outer.code, state.offset, outer.blocksize)


def _dequantize_rows(out_RH: Tensor, weight: Any, first: int) -> Tensor:
    state = weight.quant_state
    begin, size = first * out_RH.shape[1], out_RH.numel()
    block = begin // state.blocksize
    packed_B = weight.data.view(-1).view(torch.uint8)[begin // 2 : (begin + size + 1) // 2]
    absmax = state.absmax[block : block + -(-size // state.blocksize)]
    return dequantize_4bit_into(out_RH, packed_B, absmax, state.code, state.blocksize, _nested(state, block))
