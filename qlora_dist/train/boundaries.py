"""Whether a model keeps the documents of a pack apart: tried out before training, not assumed.

Architectures that are not attention alone (Mamba, linear attention), and those that number positions in their own
way, may let a document see the one before it, whatever is passed to them.
"""

import inspect
from typing import Any

import numpy as np
import torch
from torch import nn

from qlora_dist.config.errors import UserError
from qlora_dist.data.collate import collate
from qlora_dist.data.packing import Packs
from qlora_dist.data.table import TokenSummary, TokenTable
from qlora_dist.train.step import autocast, document_borders

DOCUMENT_TOKENS = 8
# Rounding (kernels pick other paths for other values) stays far below this share of a real influence, a leak above.
LEAK = 0.05


@torch.no_grad()
def check_document_boundaries(model: nn.Module, flat: bool, compute_dtype: torch.dtype, device: torch.device) -> None:
    """Refuse packing with a model in which the first document of a pack changes the logits of the second.

    The yardstick is how much a change of the second document's own first token changes them. The state of the random
    number generators is left as it was, and the model in its mode.

    Raises:
        UserError: the model takes no position ids, or one document reaches into the next.
    """
    adapted: Any = model
    base: Any = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    name = type(base).__name__
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise UserError("packing-without-positions", model=name)
    first, second = np.arange(DOCUMENT_TOKENS), np.arange(DOCUMENT_TOKENS) + DOCUMENT_TOKENS

    def second_logits(first: np.ndarray, second: np.ndarray) -> torch.Tensor:
        vocabulary = base.get_input_embeddings().num_embeddings
        ids = (np.concatenate([first, second]) % vocabulary).astype(np.int32)
        summary = TokenSummary(1, 2, 0, {}, len(ids), len(ids) - 2, len(first), 1, 1.0)
        packs = Packs(np.arange(2), np.array([0, 2]))
        table = TokenTable(ids, np.ones(len(ids), dtype=bool), np.array([0, len(first), len(ids)]), summary, (), packs)
        batch = collate(table, [0], 0, flat=flat).to(device)
        torch.manual_seed(0)
        with autocast(device, compute_dtype):
            logits_BTV = model(input_ids=batch.input_ids_BT, use_cache=False, **document_borders(model, batch)).logits
        return logits_BTV[0, len(first) :].float()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        logits_TV = second_logits(first, second)
        from_before = (second_logits(first[::-1] + 20, second) - logits_TV).abs().max()
        from_itself = (second_logits(first, np.append(second[:1] + 20, second[1:])) - logits_TV).abs().max()
    if from_before > LEAK * from_itself:
        raise UserError("packing-leaks", model=name)
