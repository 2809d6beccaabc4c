"""One optimizer step: micro-batches, one token-weighted loss over all ranks, clip, step.

B rows of a micro-batch, T tokens a row, K positions whose logits are needed, N loss-bearing tokens, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qlora_dist.config.schema import RunConfig
from qlora_dist.data.collate import MicroBatch
from qlora_dist.kernels.documents import has_flash
from qlora_dist.model.fused import attends_by_documents, fused_loss_sum, has_window
from qlora_dist.shard.strategy import Strategy


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16, as in Micikevicius et al. 2018, section 3.2 (arXiv:1710.03740).

    Halved after a step that overflowed, doubled after `growth_interval` steps that did not. At a scale of 1 a
    non-finite step is no longer the scale's fault.
    """

    scale: float = 1.0
    good_steps: int = 0
    growth_interval: int = 2000
    enabled: bool = False

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> "LossScale":
        """Scaling for fp16, a constant 1 for what needs none."""
        return cls(scale=2.0**16, enabled=True) if dtype == torch.float16 else cls()

    def update(self, overflowed: bool) -> bool:
        """Adapt to one step; True where lowering the scale is the answer to the overflow."""
        if not self.enabled:
            return False
        if overflowed:
            self.good_steps = 0
            lowered = self.scale > 1.0
            self.scale = max(1.0, self.scale / 2)
            return lowered
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0
        return False


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in `dtype` while adapters stay fp32; nothing for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def draw_seed(seed: int, step: int, pack: int) -> int:
    """The seed of a micro-batch's random draws: a function of the run's seed, the step and its first pack alone."""
    return int(np.random.SeedSequence([seed, step, pack]).generate_state(1, np.uint64)[0] >> 1)


def loss_sum(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Sum of the token losses of one micro-batch, in fp32, a scalar.

    Logits are computed only at positions that bear loss, where the model can (`logits_to_keep`). No attention mask is
    passed: padding is on the right, where causal attention never looks from a real token.
    """
    length = batch.input_ids_BT.shape[1]
    inputs = {"input_ids": batch.input_ids_BT, "use_cache": False} | document_borders(model, batch)
    fused = fused_loss_sum(model, batch.predict_index_N, batch.target_N, **inputs)
    if fused is not None:
        return fused
    row_N = batch.predict_index_N // length
    if batch.kept_K is not None and _can_select_logits(model):
        logits_BKV = model(**inputs, logits_to_keep=batch.kept_K).logits
        all_kept = logits_BKV.shape[0] * logits_BKV.shape[1] == len(row_N)
        logits_NV = logits_BKV.flatten(0, 1) if all_kept else logits_BKV[row_N, batch.kept_index_N]
    else:
        logits_NV = model(**inputs).logits[row_N, batch.predict_index_N % length]
    return cross_entropy(logits_NV.float(), batch.target_N, reduction="sum")


def lays_flat(config: RunConfig) -> bool:
    """Whether all packs of a micro-batch share one line: flash attention keeps documents apart there only."""
    return config.data.packing and config.model.attn_implementation == "flash_attention_2"


def document_borders(model: nn.Module, batch: MicroBatch) -> dict[str, Any]:
    """What keeps the documents of a line apart in a transformers model; nothing where each has a line of its own.

    Without an attention mask, transformers makes the block-diagonal causal mask from position ids that begin anew
    (`sdpa`, `eager`, any number of lines). Flash attention takes the borders themselves, and needs one flat line. On a
    GPU a model whose layers are all fused takes them for any number of lines, and no mask is ever made for it.
    """
    by_documents = has_flash(batch.input_ids_BT.device) and attends_by_documents(model) and not batch.flat
    if not batch.packed and not by_documents:
        return {}
    told: dict[str, Any] = {"position_ids": batch.position_ids_BT} if batch.packed else {}
    borders_D1, longest = batch.cu_seqlens_D1, batch.longest_document
    if by_documents:
        # transformers waits for the GPU to see whether lines are packed, but not where it is given a mask of four
        # dimensions; that is handed on to the layers, which have no use for one of a single element.
        told["attention_mask"] = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids_BT.device)
        lines, longest = batch.input_ids_BT.shape
        if borders_D1 is None and has_window(model):
            borders_D1 = torch.arange(
                0, lines * longest + 1, longest, dtype=torch.int32, device=batch.input_ids_BT.device
            )
    if borders_D1 is None or not (batch.flat or by_documents):
        return told
    told |= {"cu_seq_lens_q": borders_D1, "cu_seq_lens_k": borders_D1}
    return told | {"max_length_q": longest, "max_length_k": longest}


def _can_select_logits(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base not in _SELECTS_LOGITS:
        _SELECTS_LOGITS[base] = "logits_to_keep" in inspect.signature(base.forward).parameters
    return _SELECTS_LOGITS[base]


# Reading a signature takes longer than launching a layer.
_SELECTS_LOGITS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def accumulate_gradients(
    model: nn.Module,
    strategy: Strategy,
    batches: Sequence[tuple[MicroBatch, int]],
    loss_tokens: int,
    loss_scale: float,
    compute_dtype: torch.dtype,
) -> Tensor:
    """Forward and backward of this rank's micro-batches of one global batch.

    Args:
        batches: micro-batches on the model's device, each with the seed of its random draws.
        loss_tokens: loss-bearing tokens of the whole global batch, over all ranks.

    Returns:
        This rank's share of the global loss: its sum of token losses over `loss_tokens`, a detached scalar.
    """
    device = batches[0][0].input_ids_BT.device
    share = torch.zeros((), device=device)
    for index, (batch, seed) in enumerate(batches):
        torch.manual_seed(seed)
        with autocast(device, compute_dtype):
            loss = loss_sum(model, batch) / loss_tokens
        strategy.backward(loss * loss_scale, last_micro_batch=index == len(batches) - 1)
        share += loss.detach()
    return share
