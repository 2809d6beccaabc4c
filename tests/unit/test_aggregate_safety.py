"""What is refused and why; and the report's arithmetic."""

import math
from typing import Any

import pytest
import torch

from qlora_dist.aggregate.changes import Contribution, Tensors, norm_of
from qlora_dist.aggregate.exchange import Header, as_contribution, decode, encode
from qlora_dist.aggregate.measures import Traffic, divergence, ring_all_reduce_bytes
from qlora_dist.aggregate.outer import OuterSettings, OuterState, outer_step
from qlora_dist.aggregate.safety import refuse, refuse_round

BASE, OTHER = "a" * 64, "b" * 64
REFERENCE = {"q.lora_A.weight": torch.zeros(4, 8), "q.lora_B.weight": torch.zeros(6, 4)}
A, B = REFERENCE


def change(seed: int = 0, norm: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in REFERENCE.items()}
    return {name: tensor * (norm / norm_of(drawn)) for name, tensor in drawn.items()}


def sent(island: str = "north", lease: int = 1, **changed: Any) -> Contribution:
    fields = {"change": change(), "tokens": 10, "base": BASE, "round": 4, **changed}
    return Contribution(island, lease=lease, **fields)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"base": OTHER}, "its base model is another one (fingerprint bbbbbbbbbbbb, not aaaaaaaaaaaa)"),
        ({"tokens": 0}, "it was trained on 0 tokens"),
        ({"change": {A: change()[A]}}, f"1 parameters are missing, {B} among them"),
        ({"change": {**change(), "x": torch.zeros(1)}}, "1 parameters are unknown here, x among them"),
        ({"change": {**change(), B: torch.zeros(4, 6)}}, f"the shape of {B} is (4, 6) instead of (6, 4)"),
        ({"change": {**change(), A: change()[A].half()}}, f"the dtype of {A} is float16 instead of float32"),
        ({"change": {**change(), A: torch.full((4, 8), math.nan)}}, "1 of 2 parameters hold numbers that are not"),
        ({"change": {**change(), B: torch.full((6, 4), -math.inf)}}, f"not finite, {B} among them"),
        ({"change": change(0, 10.5)}, "the norm of its change is 10.5, more than 10 times the usual 1"),
    ],
)  # fmt: skip
def test_what_cannot_count_is_refused_and_named(wrong: dict[str, Any], reason: str) -> None:
    refused = refuse(sent(**wrong), REFERENCE, BASE, [0.9, 1.0, 1.1])
    assert refused is not None
    assert refused.startswith("island north, round 5: ")
    assert reason in refused


def test_what_is_well_counts() -> None:
    assert refuse(sent(), REFERENCE, BASE) is None
    assert refuse(sent(change=change(0, 9.5)), REFERENCE, BASE, [0.9, 1.0, 1.1]) is None
    assert refuse(sent(change=change(0, 0.0)), REFERENCE, BASE, [0.9, 1.0, 1.1]) is None
    assert refuse(sent(change=change(0, 1e6)), REFERENCE, BASE, [1.0]) is None, "one other: who of the two is far out?"
    assert refuse(sent(change=change(0, 3.5)), REFERENCE, BASE, [1.0, 1.0], most_times_median=3.0) is not None


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_a_nan_is_refused_whatever_it_was_sent_through(bits: int) -> None:
    bad = change()
    bad[A][2, 3] = math.nan
    data = encode(bad, Header("change", "north", 4, 1, 10, BASE), bits)
    contribution = as_contribution(decode(data), scale=0.5)
    assert (contribution.island, contribution.tokens, contribution.base) == ("north", 10, BASE)
    assert (contribution.round, contribution.lease, contribution.scale) == (4, 1, 0.5)
    refused = refuse(contribution, REFERENCE, BASE)
    assert refused is not None
    assert "not finite" in refused


def test_of_a_round_the_one_far_out_is_refused_and_not_the_others() -> None:
    round = [sent(name, lease, change=change(lease, 1.0)) for lease, name in enumerate(["a", "b", "c"], 1)]
    bad = change()
    bad[A][0, 0] = math.nan
    round += [sent("wild", 8, change=change(8, 1e4)), sent("nan", 9, change=bad)]
    refused = refuse_round(round, REFERENCE, BASE)
    assert sorted(refused) == [8, 9]
    assert "norm of its change is 1e+04" in refused[8]
    assert "not finite" in refused[9]


def test_of_two_islands_the_rounds_before_tell_who_is_far_out() -> None:
    """The lone norm beside it says nothing: the island with few steps would have the other one refused."""
    state = OuterState()
    pair = [sent("a", 1, change=change(1, 1.0)), sent("b", 2, change=change(2, 1000.0))]
    assert refuse_round(pair, REFERENCE, BASE, state.known_norms()) == {}
    usual = [sent("a", 1, change=change(1, 1.0)), sent("b", 2, change=change(2, 1.2))]
    state = outer_step(OuterSettings(method="mean"), state, REFERENCE, usual).state
    assert list(refuse_round(pair, REFERENCE, BASE, state.known_norms())) == [2]


def test_a_round_at_a_learning_rate_of_zero_has_nobody_refused_after_it() -> None:
    """Warm-up starts at zero, so with an exchange every step the first round changes nothing."""
    whole = sent()
    assert refuse(whole, REFERENCE, BASE, [0.0, 0.0]) is None
    assert "times the usual 0.05" in (refuse(whole, REFERENCE, BASE, [0.0, 0.0, 0.05, 0.05]) or "")


def test_a_ring_all_reduce_counted_message_by_message() -> None:
    for workers in (1, 2, 4, 7):
        part = 840 // workers  # bytes
        passes = (workers - 1) * 2  # sums are formed, then spread
        assert ring_all_reduce_bytes(840, workers) == pytest.approx(passes * part)


def test_traffic_is_reported_against_ddp_in_its_gradients_dtype() -> None:
    parameters, steps = 1_000_000, 40
    sent_bytes = received = 516_000
    bf16 = Traffic(sent_bytes, received, parameters, torch.bfloat16, 2, steps).report()
    assert bf16["ddp_gradient_dtype"] == "bfloat16"
    assert bf16["ddp_bytes_sent"] == 40 * 2 * 1_000_000
    assert bf16["times_fewer"] == pytest.approx(80e6 / 1.032e6)
    assert bf16["times_fewer_both_ways"] == 2 * bf16["times_fewer"]
    fp32 = Traffic(sent_bytes, received, parameters, torch.float32, 4, steps).report()
    assert fp32["times_fewer"] == pytest.approx(2 * 1.5 * bf16["times_fewer"])
    assert Traffic(0, 0, parameters, torch.float32, 1, steps).report()["times_fewer"] == math.inf


def test_divergence_of_changes_that_are_known() -> None:
    one = {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor([[0.0]])}
    across = {"x": torch.tensor([0.0, 0.0]), "y": torch.tensor([[1.0]])}
    opposite = {name: -tensor for name, tensor in one.items()}
    nothing = {name: 0 * tensor for name, tensor in one.items()}
    assert divergence([one]) is None
    assert divergence([one, one]) == (0.0, 1.0)
    assert divergence([one, across]) == (pytest.approx(math.sqrt(2)), 0.0)
    assert divergence([one, opposite]) == (pytest.approx(2), -1.0)
    assert divergence([one, nothing]) == (pytest.approx(2), 0.0)
    assert divergence([nothing, nothing]) == (0.0, 0.0)
    three = divergence([one, across, opposite])
    assert three == (pytest.approx((2 * math.sqrt(2) + 2) / 3), pytest.approx(-1 / 3))


def test_divergence_is_that_of_the_whole_vectors() -> None:
    changes = [change(seed, 1 + seed) for seed in range(3)]
    flat = [torch.cat([tensor.flatten() for tensor in one.values()]).double() for one in changes]
    pairs = [(0, 1), (0, 2), (1, 2)]
    found = divergence(changes)
    assert found is not None
    cosines = [float(torch.cosine_similarity(flat[i], flat[j], dim=0)) for i, j in pairs]
    distances = [float((flat[i] - flat[j]).norm() / (flat[i].norm() + flat[j].norm()) * 2) for i, j in pairs]
    assert found == (pytest.approx(sum(distances) / 3), pytest.approx(sum(cosines) / 3))
