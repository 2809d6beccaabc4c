"""Messages that are quantised by bitsandbytes' CUDA kernels and decoded on a CPU."""

import math

import pytest
import torch

from qlora_dist.aggregate.exchange import Encoder, Header, decode, encode

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
HEADER = Header("change", "a", 0, 1, 10, "f" * 64)


def change(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in {"x": (64, 300), "y": (3, 5)}.items()}


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_a_message_from_a_gpu_is_that_of_a_cpu(bits: int) -> None:
    here, there = (decode(encode({n: t.to(d) for n, t in change(0).items()}, HEADER, bits)) for d in ("cpu", "cuda"))
    for name, tensor in here.tensors.items():
        # Where an element lies in the middle of two codes the kernels may choose differently: rarely.
        assert float((there.tensors[name] != tensor).float().mean()) < 0.01
    bad = {name: tensor.cuda() for name, tensor in change(0).items()}
    bad["x"][5, 7] = math.nan
    tensors = decode(encode(bad, HEADER, bits)).tensors
    assert not bool(tensors["x"].isfinite().all())
    assert bool(tensors["y"].isfinite().all())


def test_error_feedback_holds_on_a_gpu() -> None:
    encoder, true, sent = Encoder(4), torch.zeros(64, 300), torch.zeros(64, 300)
    for seed in range(20):
        this = change(seed)
        true += this["x"]
        sent += encoder.encode({name: tensor.cuda() for name, tensor in this.items()}, HEADER)[1]["x"]
    torch.testing.assert_close(true - sent, encoder.residual["x"], rtol=0, atol=1e-4)
    assert float((true - sent).norm() / true.norm()) < 0.05


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_in_host_memory_takes_next_to_nothing_of_a_gpu(bits: int) -> None:
    """64 MiB of it, quantised in pieces of 4 MiB, each with a few times its size of what is between."""
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
    tensors = {"x": torch.randn(64, 1 << 18, generator=generator)}
    encode(change(0), HEADER, bits, device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    data = encode(tensors, HEADER, bits, device)
    assert torch.cuda.max_memory_allocated() - before < 24 << 20
    here = decode(encode(tensors, HEADER, bits)).tensors["x"]
    assert float((decode(data).tensors["x"] != here).float().mean()) < 0.01
