"""Packs -> the tensors of one micro-batch.

Legend: B packs, T tokens of the longest of them, D documents, N loss-bearing predictions of the micro-batch.
A flat micro-batch has all documents on one line: B is 1 and nothing is padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qlora_dist.data.table import TokenTable

# What an empty micro-batch runs through the model, so that its rank joins every collective.
EMPTY_TOKENS = 2


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward of one rank, padded on the right to its longest pack.

    Attributes:
        packs: the packs in it; empty for a micro-batch of zero weight.
        input_ids_BT: int64.
        attention_mask_BT: int64, 1 at tokens and 0 at padding; stays on the CPU, since no step needs it.
        position_ids_BT: int64, from 0 in each document; padding counts on from the last one.
        predict_index_N: int64, into the flattened [B * T] hidden states: those whose next token bears loss.
        target_N: int64, that next token.
        num_tokens: tokens that are not padding.
        num_loss_tokens: N.
        packed: whether a line holds more than one document, so that they must be kept apart in attention.
        flat: whether all packs are on one line.
        cu_seqlens_D1: int32 [D + 1], where documents begin on all lines laid end to end, padding counted as a document
            of its own; the length of that last. None where no line holds more than one document.
        longest_document: tokens of the longest document.
        kept_K: int64, ascending, the positions on a line at which some line has a prediction that bears loss.
        kept_index_N: int64, where each prediction's position is in `kept_K`.
    """

    packs: tuple[int, ...]
    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    predict_index_N: torch.Tensor
    target_N: torch.Tensor
    num_tokens: int
    num_loss_tokens: int
    packed: bool = False
    flat: bool = False
    cu_seqlens_D1: torch.Tensor | None = None
    longest_document: int = 0
    kept_K: torch.Tensor | None = None
    kept_index_N: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MicroBatch":
        """The same micro-batch with its tensors on `device`, but for the attention mask.

        Args:
            non_blocking: return before they are there; what the device does from then on finds them.
        """
        tensors: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        del tensors["attention_mask_BT"]
        if non_blocking and torch.device(device).type == "cuda":
            # Only pinned memory is copied while the host goes on.
            tensors = {name: value.pin_memory() for name, value in tensors.items()}
        return replace(self, **{n: t.to(device, non_blocking=non_blocking) for n, t in tensors.items()})


def collate(table: TokenTable, packs: Sequence[int] | np.ndarray, pad_token_id: int, flat: bool = False) -> MicroBatch:
    """The tensors of `packs`, on the CPU; a line a pack, or one line for all of them where `flat`.

    No packs give one pack of `EMPTY_TOKENS` padding tokens that attend to each other (a wholly masked row is NaN in
    some attention kernels) and bear no loss: N is 0, and so is `num_tokens`.
    """
    if len(packs) == 0:
        return _empty(pad_token_id)
    lines = [[table.document(document) for document in table.documents_of(int(pack))] for pack in packs]
    if flat:
        lines = [[document for line in lines for document in line]]
    document_lengths = [[len(ids) for ids, _ in line] for line in lines]
    lengths = np.array([sum(line) for line in document_lengths])
    shape = (len(lines), int(lengths.max()))
    input_ids_BT = np.full(shape, pad_token_id, dtype=np.int64)
    loss_mask_BT = np.zeros(shape, dtype=bool)
    position_ids_BT = np.tile(np.arange(shape[1]), (shape[0], 1))
    for row, line in enumerate(lines):
        start = 0
        for ids, mask in line:
            end = start + len(ids)
            input_ids_BT[row, start:end] = ids
            loss_mask_BT[row, start:end] = mask
            position_ids_BT[row, start:] = np.arange(shape[1] - start)
            start = end
    # Flat index of a target; a document's first token never bears loss, so the one before is in the same document.
    target_index_N = np.flatnonzero(loss_mask_BT)
    kept_K, kept_index_N = np.unique((target_index_N - 1) % shape[1], return_inverse=True)
    return MicroBatch(
        packs=tuple(int(pack) for pack in packs),
        input_ids_BT=torch.from_numpy(input_ids_BT),
        attention_mask_BT=torch.from_numpy((np.arange(shape[1]) < lengths[:, None]).astype(np.int64)),
        position_ids_BT=torch.from_numpy(position_ids_BT),
        predict_index_N=torch.from_numpy(target_index_N - 1),
        target_N=torch.from_numpy(input_ids_BT.reshape(-1)[target_index_N]),
        kept_K=torch.from_numpy(kept_K),
        kept_index_N=torch.from_numpy(kept_index_N),
        num_tokens=int(lengths.sum()),
        num_loss_tokens=len(target_index_N),
        packed=any(len(line) > 1 for line in lines),
        flat=flat,
        cu_seqlens_D1=_borders(document_lengths, shape[1]) if flat or any(len(line) > 1 for line in lines) else None,
        longest_document=max(max(line) for line in document_lengths),
    )


def _borders(document_lengths: list[list[int]], length: int) -> torch.Tensor:
    pieces = [[*lengths, length - sum(lengths)] for lengths in document_lengths]
    return torch.tensor(np.cumsum([0, *(n for line in pieces for n in line if n)]), dtype=torch.int32)


def num_tokens(table: TokenTable, packs: Sequence[int] | np.ndarray) -> int:
    """Tokens of `packs`, without padding; every rank can count the whole global batch's."""
    return int(table.pack_tokens[_index(packs)].sum())


def tokens_of_ranks(
    table: TokenTable, packs: Sequence[int] | np.ndarray, per_device_train_batch_size: int, world_size: int
) -> np.ndarray:
    """Tokens of a global batch without padding, int64 [world_size], as `order.micro_batches` deals them out."""
    tokens_N = table.pack_tokens[_index(packs)]
    rank_N = np.arange(len(tokens_N)) // per_device_train_batch_size % world_size
    counted = np.zeros(world_size, dtype=np.int64)
    np.add.at(counted, rank_N, tokens_N)
    return counted


def loss_tokens(table: TokenTable, packs: Sequence[int] | np.ndarray) -> int:
    """Loss-bearing predictions of `packs`: the denominator of the global batch's loss, without communication."""
    return int(table.pack_loss_tokens[_index(packs)].sum())


def _index(packs: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(packs, dtype=np.int64)


def _empty(pad_token_id: int) -> MicroBatch:
    nothing = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        packs=(),
        input_ids_BT=torch.full((1, EMPTY_TOKENS), pad_token_id, dtype=torch.int64),
        attention_mask_BT=torch.ones((1, EMPTY_TOKENS), dtype=torch.int64),
        position_ids_BT=torch.arange(EMPTY_TOKENS)[None],
        predict_index_N=nothing,
        target_N=nothing.clone(),
        kept_K=nothing.clone(),
        kept_index_N=nothing.clone(),
        num_tokens=0,
        num_loss_tokens=0,
    )
