"""The cases of `qlora-dist bench kernels`, small and on a CPU: through the references each does what its peer does."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qlora_dist.bench import kernels
from qlora_dist.bench.bound import Shape
from qlora_dist.bench.kernel_cases import GROUPS, NOT_INSTALLED, Case, from_package
from qlora_dist.bench.kernels import milliseconds, timed
from qlora_dist.model.shapes import SHAPES

SMALL = Shape(layers=1, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16, vocabulary=320)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_every_case_runs_and_counts_what_it_moves(group: Callable[[Shape, int, str], Iterator[Case]]) -> None:
    names = []
    for case in group(SMALL, 64, "cpu"):
        case.run()
        assert bool(case.moved) != bool(case.gemms), case.name
        for run in case.peers.values():
            assert run == NOT_INSTALLED or callable(run)
        names.append(case.name)
    assert len(set(names)) == len(names)


def test_a_dequantisation_is_its_peers() -> None:
    for case in GROUPS[0](SMALL, 64, "cpu"):
        theirs = case.peers["bitsandbytes"]
        assert not isinstance(theirs, str)
        assert torch.equal(case.run(), theirs())


def test_rates_and_shares_are_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 ms, 6e9 bytes at a copy of 4,000 GB/s; two GEMMs of 0.5 ms together."""
    monkeypatch.setattr(kernels, "device_ms", lambda run: run() or 2.0)
    monkeypatch.setattr(kernels, "host_us", lambda run, launches: 30.0)
    monkeypatch.setattr(kernels, "gemm_times", lambda m, k, n: (0.2, 0.3))

    def broken() -> Any:
        raise TypeError("other arguments\nin two lines")

    moving = Case("a", "1", lambda: None, 6_000_000_000, peers={"b": broken, "c": NOT_INSTALLED, "d": lambda: None})
    told = timed(moving, 4000.0)
    assert (told["gb_s"], told["of_ceiling"]) == pytest.approx((3000.0, 0.75))
    assert told["peers"] == {"b": "TypeError: other arguments", "c": NOT_INSTALLED, "d": 2.0}
    computing = timed(Case("a", "1", lambda: None, gemms=[(10, 10, 10, True), (10, 10, 10, False)]), 1.0)
    assert (computing["tflop_s"], computing["of_ceiling"]) == pytest.approx((4000 / 2e9, 0.25))
    assert timed(Case("a", "1", broken, 1), 1.0)["outcome"] == "failed"
    assert milliseconds(broken, lambda run: run()) == "TypeError: other arguments"


def test_names_are_those_of_the_cases() -> None:
    assert {"rms_norm", "nf4 dequantisation, nested", "projection gate_up, backward"} <= set(
        kernels.names(SHAPES["llama-3.1-8b"])
    )


def test_a_peer_that_needs_a_gpu_is_made_only_when_it_is_timed() -> None:
    def make() -> Any:
        raise ValueError("cpu tensor?")

    run = from_package("torch", make)
    assert callable(run)
    assert milliseconds(run, lambda run: run()) == "ValueError: cpu tensor?"
    assert from_package("no_such_package", make) == NOT_INSTALLED
