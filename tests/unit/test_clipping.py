"""The norm of gradients is theirs, however they are laid out."""

import pytest
import torch

from qlora_dist.shard.clipping import norm_of


def test_a_norm_of_millions_is_exact_and_says_nothing_of_the_layout() -> None:
    """fp32 sums on a CPU would be 1e-4 off; 1e-6 is some roundings of the result."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(6_500_000, generator=generator) * 1e-3
    expected = flat.double().norm().item()
    for parts in ([flat], list(flat.split(4864)), list(flat.split(3_000_000))):
        norm = norm_of(parts)
        assert norm.dtype == torch.float32
        assert norm.shape == ()
        assert norm.item() == pytest.approx(expected, rel=1e-6)
