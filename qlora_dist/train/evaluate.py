"""Held-out loss during training, and a few held-out prompts answered by the base and by the adapter."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from qlora_dist.data.collate import collate
from qlora_dist.data.tokens import TokenTable
from qlora_dist.train.step import autocast, loss_sum


@torch.no_grad()
def held_out_loss(
    model: nn.Module, table: TokenTable, batch_size: int, rank: int, world_size: int, pad_token_id: int,
    compute_dtype: torch.dtype, device: torch.device, together: bool = False,
) -> float:  # fmt: skip
    """Mean loss a loss-bearing token over all of `table`, each rank taking its share; the same number on every rank.

    Args:
        together: every rank runs as many forwards as the others (a forward takes all of them); what is too many counts
            for nothing.
    """
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    starts = range(0, table.num_packs, batch_size)
    mine = list(starts)[rank::world_size]
    idle = math.ceil(len(starts) / world_size) - len(mine) if together else 0
    for start in mine + [table.num_packs] * idle:
        batch = collate(table, range(start, min(start + batch_size, table.num_packs)), pad_token_id).to(device)
        with autocast(device, compute_dtype):
            sums[0] += loss_sum(model, batch).double().cpu()
        sums[1] += batch.num_loss_tokens
    model.train()
    if world_size > 1:
        on_device = sums.to(device)
        dist.all_reduce(on_device)
        sums = on_device.cpu()
    return float(sums[0] / sums[1])


@torch.no_grad()
def answer_prompts(
    model: Any, tokenizer: Any, table: TokenTable, documents: Sequence[int], max_new_tokens: int,
    compute_dtype: torch.dtype, device: torch.device, together: bool = False,
) -> list[dict[str, str]]:  # fmt: skip
    """Greedy answers of the base alone (`before`) and with the adapter (`after`) to the prompts of `documents`.

    A document's prompt is what precedes its first loss-bearing token; `expected` is the rest of it.

    Args:
        together: a forward takes all ranks, so that none may end its answer before the others have.
    """
    model.eval()
    answers = []
    for document in documents:
        ids, loss_mask = table.document(document)
        prompt_T = torch.from_numpy(ids[: int(loss_mask.argmax())].astype("int64"))[None].to(device)

        def generate(prompt_T: torch.Tensor = prompt_T) -> str:
            with autocast(device, compute_dtype):
                output_T = model.generate(
                    input_ids=prompt_T, attention_mask=torch.ones_like(prompt_T), max_new_tokens=max_new_tokens,
                    do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id, synced_gpus=together,
                )[0]  # fmt: skip
            return tokenizer.decode(output_T[prompt_T.shape[1] :], skip_special_tokens=True).strip()

        with model.disable_adapter():
            before = generate()
        expected = tokenizer.decode(ids[loss_mask], skip_special_tokens=True).strip()
        answers.append({"prompt": table.prompts[document], "expected": expected, "before": before, "after": generate()})
    model.train()
    return answers
