"""The largest micro-batch of a run, as a rehearsal takes it."""

from dataclasses import dataclass

import torch

from qlora_dist.config.schema import RunConfig
from qlora_dist.data.collate import MicroBatch
from qlora_dist.data.table import TokenTable
from qlora_dist.train.step import lays_flat


@dataclass(frozen=True)
class Largest:
    """The largest micro-batch of a run: rows, tokens a row, whether rows hold several documents, or one holds all."""

    rows: int
    length: int
    packed: bool = False
    flat: bool = False


def largest_micro_batch(config: RunConfig, table: TokenTable) -> Largest:
    """As many rows as a micro-batch has, each as long as the longest pack."""
    rows, length = config.train.per_device_train_batch_size, int(table.pack_tokens.max())
    return Largest(rows, length, config.data.packing, lays_flat(config))


def rehearsal_batch(size: Largest, pad_token_id: int, device: torch.device) -> MicroBatch:
    """A micro-batch of that size in which every token bears loss, of two documents a row where rows are packed."""
    shape = (1, size.rows * size.length) if size.flat else (size.rows, size.length)
    document = -(-size.length // 2) if size.packed else size.length
    ids_BT = torch.full(shape, pad_token_id, dtype=torch.int64)
    place_T = torch.arange(shape[1])
    predict_N = torch.arange(ids_BT.numel()).view(shape)[:, :-1].reshape(-1)
    starts = [line * shape[1] + start for line in range(shape[0]) for start in range(0, shape[1], document)]
    return MicroBatch(
        packs=(),
        input_ids_BT=ids_BT,
        attention_mask_BT=torch.ones_like(ids_BT),
        position_ids_BT=(place_T % document).expand(shape),
        predict_index_N=predict_N,
        target_N=torch.full_like(predict_N, pad_token_id),
        num_tokens=ids_BT.numel(),
        num_loss_tokens=len(predict_N),
        packed=size.packed,
        flat=size.flat,
        cu_seqlens_D1=torch.tensor([*starts, ids_BT.numel()], dtype=torch.int32) if size.packed else None,
        longest_document=document,
    ).to(device)
