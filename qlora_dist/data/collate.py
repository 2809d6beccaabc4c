"""Packs -> the tensors of one micro-batch.

Legend: B packs, T tokens of the longest of them, N loss-bearing predictions of the micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from qlora_dist.data.tokens import TokenTable

# What an empty micro-batch runs through the model, so that its rank joins every collective.
EMPTY_TOKENS = 2


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward of one rank, padded on the right to its longest pack.

    Attributes:
        packs: the packs in it; empty for a micro-batch of zero weight.
        input_ids_BT: int64.
        attention_mask_BT: int64, 1 at tokens and 0 at padding.
        position_ids_BT: int64, from 0 in each pack.
        predict_index_N: int64, into the flattened [B * T] hidden states: those whose next token bears loss.
        target_N: int64, that next token.
        num_tokens: tokens that are not padding.
        num_loss_tokens: N.
    """

    packs: tuple[int, ...]
    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    predict_index_N: torch.Tensor
    target_N: torch.Tensor
    num_tokens: int
    num_loss_tokens: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "MicroBatch":
        """The same micro-batch with its tensors on `device`."""
        names = ("input_ids_BT", "attention_mask_BT", "position_ids_BT", "predict_index_N", "target_N")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names})


def collate(table: TokenTable, packs: Sequence[int] | np.ndarray, pad_token_id: int) -> MicroBatch:
    """The tensors of `packs`, on the CPU.

    No packs give one pack of `EMPTY_TOKENS` padding tokens that attend to each other (a wholly masked row is NaN in
    some attention kernels) and bear no loss: N is 0, and so is `num_tokens`.
    """
    if len(packs) == 0:
        return _empty(pad_token_id)
    documents = [table.pack(int(pack)) for pack in packs]
    lengths = np.array([len(ids) for ids, _ in documents])
    shape = (len(documents), int(lengths.max()))
    input_ids_BT = np.full(shape, pad_token_id, dtype=np.int64)
    loss_mask_BT = np.zeros(shape, dtype=bool)
    for line, (ids, mask) in enumerate(documents):
        input_ids_BT[line, : len(ids)] = ids
        loss_mask_BT[line, : len(ids)] = mask
    positions_T = np.arange(shape[1])
    # Flat index of a target; column 0 never bears loss, so the one before it lies in the same line.
    target_index_N = np.flatnonzero(loss_mask_BT)
    return MicroBatch(
        packs=tuple(int(pack) for pack in packs),
        input_ids_BT=torch.from_numpy(input_ids_BT),
        attention_mask_BT=torch.from_numpy((positions_T < lengths[:, None]).astype(np.int64)),
        position_ids_BT=torch.from_numpy(np.tile(positions_T, (shape[0], 1))),
        predict_index_N=torch.from_numpy(target_index_N - 1),
        target_N=torch.from_numpy(input_ids_BT.reshape(-1)[target_index_N]),
        num_tokens=int(lengths.sum()),
        num_loss_tokens=len(target_index_N),
    )


def num_tokens(table: TokenTable, packs: Sequence[int] | np.ndarray) -> int:
    """Tokens of `packs`, without padding; every rank can count the whole global batch's."""
    return int(table.pack_tokens[_index(packs)].sum())


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
        num_tokens=0,
        num_loss_tokens=0,
    )
