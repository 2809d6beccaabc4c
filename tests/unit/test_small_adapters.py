"""What an adapter whose weights are small, as in the first steps, changes in bf16: fused layers pass all of it on."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_dist.model.fused import fuse

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=256, attn_implementation="sdpa",
)  # fmt: skip
IDS = torch.randint(0, 512, (4, 128), generator=torch.Generator().manual_seed(1))


def change_by(size: float, dtype: torch.dtype, fused: bool) -> Tensor:
    """Of the last hidden states, in float64: what B = +-size changes beside B = 0."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).requires_grad_(False).to(dtype)
    torch.manual_seed(4)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    low = dtype == torch.bfloat16
    if fused:
        fuse(model)

    def states() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            return model.get_base_model().model(input_ids=IDS, use_cache=False).last_hidden_state.double()

    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.float32 if low else dtype)
    before, generator = states(), torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (size * torch.randn(parameter.shape, generator=generator).sign()).to(parameter.dtype)
    return states() - before


@pytest.mark.parametrize(("size", "of_stock"), [(1e-4, (0.4, 0.7)), (1e-2, (0.98, 1.02))])
def test_fused_layers_pass_on_what_stock_ones_round_away(size: float, of_stock: tuple[float, float]) -> None:
    """The share of the true change, by its regression on float64's; rounding beside it is as large and averages out.

    Stock layers add the branch to a result that is rounded to bf16 already, so that what is less than half a unit of
    the last place is lost; fused ones add in fp32 within the GEMM and round the sum.
    """
    true = change_by(size, torch.float64, False).flatten()
    found = [change_by(size, torch.bfloat16, fused).flatten() for fused in (False, True)]
    stock, fused = (float(one @ true / (true @ true)) for one in found)
    assert of_stock[0] < stock < of_stock[1]
    assert fused == pytest.approx(1, abs=0.06)
