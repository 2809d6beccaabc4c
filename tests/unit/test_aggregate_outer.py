"""The outer loop's step: each method against an independent reference in float64."""

from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from qlora_dist.aggregate.aligned import mean_product
from qlora_dist.aggregate.changes import (
    Contribution,
    Tensors,
    apply_change,
    change_of,
    frozen_names,
    norm_of,
    rebase,
    weighted_mean,
)
from qlora_dist.aggregate.outer import Outcome, OuterSettings, OuterState, outer_step
from qlora_dist.aggregate.products import Factors, mean_of_products

Q = "base_model.model.model.layers.0.self_attn.q_proj"
NAMES = {f"{Q}.lora_A.weight": (4, 24), f"{Q}.lora_B.weight": (16, 4), "base_model.model.lm_head.weight": (5, 3)}
A, B, HEAD = NAMES


def tensors(seed: int, scale: float = 1.0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in NAMES.items()}


def sent(island: str, change: Tensors, tokens: int = 100, **kwargs: Any) -> Contribution:
    return Contribution(island, change, tokens, base="f" * 64, round=0, **kwargs)


def three(seed: int = 1, scale: float = 0.1) -> list[Contribution]:
    return [sent(name, tensors(seed + place, scale), 100 * (place + 1)) for place, name in enumerate("abc")]


def step(contributions: list[Contribution], adapter: Tensors | None = None, **settings: Any) -> Outcome:
    return outer_step(OuterSettings(**settings), OuterState(), adapter or tensors(0), contributions)


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def product(adapter: Tensors) -> np.ndarray:
    return adapter[B].double().numpy() @ adapter[A].double().numpy()


def dense_mean(adapter: Tensors, contributions: list[Contribution]) -> np.ndarray:
    """The weighted mean of the islands' products, by whole matrices."""
    total = sum(one.tokens for one in contributions)
    moved = [apply_change(adapter, {n: t * one.scale for n, t in one.change.items()}) for one in contributions]
    return sum(one.tokens / total * product(m) for one, m in zip(contributions, moved, strict=True))


def test_the_mean_weighs_by_tokens_and_a_late_change_moves_less() -> None:
    adapter, islands = tensors(0), three()
    islands[2] = sent("c", dict(islands[2].change), 300, scale=0.5)
    outcome = step(islands, adapter, method="mean")
    for name in NAMES:
        change = sum(w * one.change[name].double() for w, one in zip([1 / 6, 2 / 6, 3 / 6 * 0.5], islands, strict=True))
        torch.testing.assert_close(outcome.adapter[name], (adapter[name].double() + change).float())
    alone = step([islands[2]], adapter, method="mean")
    assert norm_of(change_of(alone.adapter, adapter)) == pytest.approx(0.5 * norm_of(islands[2].change), rel=1e-5)
    assert outcome.reset == []


def test_diloco_is_sgd_with_nesterov_momentum_on_the_mean_change() -> None:
    adapter, state = tensors(0), OuterState()
    settings = OuterSettings(method="diloco", outer_learning_rate=0.6, outer_momentum=0.85)
    parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in adapter.items()}
    reference = torch.optim.SGD(parameters.values(), lr=0.6, momentum=0.85, nesterov=True)
    for round in range(5):
        islands = three(10 * round)
        for name, parameter in parameters.items():
            weights = [1 / 6, 2 / 6, 3 / 6]
            parameter.grad = -sum(w * one.change[name] for w, one in zip(weights, islands, strict=True))
        reference.step()
        adapter, state, _, _ = outer_step(settings, state, adapter, islands)
        for name, parameter in parameters.items():
            # float32, another order of the same few operations.
            torch.testing.assert_close(adapter[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    assert state.round == 5


def test_without_momentum_and_at_rate_one_diloco_is_the_mean() -> None:
    diloco = step(three(), method="diloco", outer_learning_rate=1.0, outer_momentum=0.0)
    assert same(diloco.adapter, step(three(), method="mean").adapter)


@pytest.mark.parametrize("method", ["mean", "diloco", "svd"])
def test_a_resumed_outer_loop_goes_on_bit_for_bit(method: Any) -> None:
    def go(first: int, last: int, adapter: Tensors, state: OuterState) -> tuple[Tensors, OuterState]:
        settings = OuterSettings(method=method, clip_norm=1.0, noise=0.0 if method == "svd" else 0.01)
        for round in range(first, last):
            adapter, state, _, _ = outer_step(settings, state, adapter, three(10 * round))
        return adapter, state

    whole, whole_state = go(0, 12, tensors(0), OuterState())
    adapter, state = go(0, 5, tensors(0), OuterState())
    adapter = safetensors.torch.load(safetensors.torch.save(adapter))
    state = OuterState.load_state_dict(safetensors.torch.load(safetensors.torch.save(state.state_dict())))
    again, again_state = go(5, 12, adapter, state)
    assert same(whole, again)
    assert same(whole_state.state_dict(), again_state.state_dict())
    assert (again_state.round, len(again_state.norms)) == (12, 8)
    assert len(again_state.known_norms()) == 24


def test_who_comes_first_makes_no_difference_and_nothing_is_changed_in_place() -> None:
    for method in ("mean", "diloco", "svd"):
        adapter, islands, state = tensors(0), three(), OuterState()
        first = outer_step(OuterSettings(method=method), state, adapter, islands)
        again = outer_step(OuterSettings(method=method), state, adapter, islands[::-1])
        assert same(first.adapter, again.adapter)
        assert same(first.state.state_dict(), again.state.state_dict())
        assert same(adapter, tensors(0))
        assert state == OuterState()


def test_svd_is_the_nearest_adapter_to_the_mean_of_the_products() -> None:
    adapter, islands = tensors(0), three()
    islands[0] = sent("a", dict(islands[0].change), 100, scale=0.5)
    outcome = step(islands, adapter, method="svd")
    mean = dense_mean(adapter, islands)
    left, values, right = np.linalg.svd(mean)
    nearest = left[:, :4] * values[:4] @ right[:4]
    # The factors are float32.
    np.testing.assert_allclose(product(outcome.adapter), nearest, atol=1e-5 * values[0])
    assert outcome.lost == {Q: pytest.approx(np.linalg.norm(mean - nearest) / np.linalg.norm(mean), rel=1e-6)}
    assert outcome.reset == []
    torch.testing.assert_close(outcome.adapter[HEAD], step(islands, adapter, method="mean").adapter[HEAD])
    # The mean of the factors is another adapter, and further away.
    factors = product(step(islands, adapter, method="mean").adapter)
    assert np.linalg.norm(factors - mean) > 1.02 * np.linalg.norm(nearest - mean)


def test_svd_gives_islands_that_agree_their_own_factors_back() -> None:
    adapter, change = tensors(0), tensors(1, 0.1)
    for start in (adapter, {**adapter, B: torch.zeros(16, 4)}):  # B is 0 in a new adapter
        outcome = step([sent("a", change, 7), sent("b", change, 3)], start, method="svd")
        expected = apply_change(start, change)
        for name in NAMES:
            torch.testing.assert_close(outcome.adapter[name], expected[name], rtol=1e-4, atol=1e-5)
        assert outcome.reset == []
    nothing = step([sent("a", {name: torch.zeros(shape) for name, shape in NAMES.items()})], start, method="svd")
    torch.testing.assert_close(nothing.adapter[A], start[A])
    assert float(nothing.adapter[B].abs().max()) == 0
    assert nothing.reset == []


def test_svd_where_the_product_has_a_lower_rank_keeps_the_other_rows_of_a() -> None:
    adapter = tensors(0)
    adapter[B] = torch.zeros(16, 4)
    change = {name: torch.zeros(shape) for name, shape in NAMES.items()}
    change[B][:, 0] = 1.0
    outcome = step([sent("a", change), sent("b", change)], adapter, method="svd")
    torch.testing.assert_close(outcome.adapter[A], adapter[A], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outcome.adapter[B], change[B], rtol=1e-4, atol=1e-5)


def test_svd_names_the_moments_to_reset_where_islands_have_gone_apart() -> None:
    """Islands whose rows have nothing in common: there are no coordinates that belong to both."""
    adapter = tensors(0)
    islands = [sent("a", tensors(1, 3.0)), sent("b", tensors(2, 3.0))]
    outcome = step(islands, adapter, method="svd")
    assert outcome.reset == [A, B]
    left, values, right = np.linalg.svd(dense_mean(adapter, islands))
    nearest = left[:, :4] * values[:4] @ right[:4]
    np.testing.assert_allclose(product(outcome.adapter), nearest, atol=1e-5 * values[0])


def test_kept_moments_belong_to_the_coordinates_of_the_new_factors() -> None:
    """What Adam's moments are of: gradients. At the new factors they are those of the islands, element by element."""
    generator = torch.Generator().manual_seed(5)

    def near(tensor: Tensor) -> Tensor:
        return tensor + 0.05 * torch.randn(tensor.shape, generator=generator)

    start_a, start_b = torch.randn(4, 24, generator=generator), torch.randn(16, 4, generator=generator)
    islands = [(near(start_a), near(start_b)) for _ in range(3)]
    target = torch.randn(16, 24, generator=generator)

    def gradient(a_rK: Tensor, b_Nr: Tensor) -> Tensor:
        a_rK, b_Nr = a_rK.float().clone().requires_grad_(), b_Nr.float().clone().requires_grad_()
        (b_Nr @ a_rK - target).square().sum().backward()
        return torch.cat([a_rK.grad.flatten(), b_Nr.grad.flatten()])

    moments = sum(gradient(*island) for island in islands) / 3
    mean = mean_product(islands, [1 / 3] * 3)
    balanced = mean_of_products([Factors(a, b, 1.0) for a, b in islands], [1 / 3] * 3, 4)

    def cosine(a_rK: Tensor, b_Nr: Tensor) -> float:
        return float(torch.cosine_similarity(gradient(a_rK, b_Nr), moments, dim=0))

    assert mean.near
    assert cosine(mean.a_rK, mean.b_Nr) > 0.99
    assert abs(cosine(balanced.a_qK, balanced.b_Nq)) < 0.7, (
        "in other coordinates the moments would be of something else"
    )


def test_with_one_factor_frozen_the_mean_of_the_factors_is_the_mean_of_the_products() -> None:
    adapter = tensors(0)
    frozen = frozen_names(NAMES, "A")
    assert frozen == {A}
    islands = [
        sent(one.island, {n: t for n, t in one.change.items() if n not in frozen}, one.tokens) for one in three()
    ]
    outcome = step(islands, adapter, method="mean")
    assert torch.equal(outcome.adapter[A], adapter[A])
    mean = dense_mean(adapter, islands)
    np.testing.assert_allclose(product(outcome.adapter), mean, atol=2e-6 * np.abs(mean).max())
    both = dense_mean(adapter, three())
    apart = np.abs(product(step(three(), adapter, method="mean").adapter) - both).max()
    assert apart > 1e-3 * np.abs(both).max(), "which it is not where both train"


@pytest.mark.parametrize("count", [3, 4, 5])
def test_robust_means_are_those_of_numpy_and_one_island_cannot_move_them_far(count: int) -> None:
    honest = [sent(str(place), tensors(place), tokens=10**place) for place in range(count)]
    wild = [*honest[:-1], sent("wild", {name: 1e6 * t for name, t in tensors(99).items()}, tokens=10**9)]
    zero = {name: torch.zeros(shape) for name, shape in NAMES.items()}
    for islands in (honest, wild):
        median = step(islands, zero, method="mean", robust="median").adapter
        trimmed = step(islands, zero, method="mean", robust="trimmed", trim=0.34).adapter
        for name in NAMES:
            values = np.stack([one.change[name].double().numpy() for one in islands])
            np.testing.assert_allclose(median[name], np.median(values, 0), rtol=1e-6)
            cut = int(0.34 * count)
            kept = np.sort(values, 0)[cut : count - cut].mean(0)
            np.testing.assert_allclose(trimmed[name], kept, rtol=1e-6)
            assert max(float(median[name].abs().max()), float(trimmed[name].abs().max())) < 5
    assert norm_of(weighted_mean(wild)) > 1e6


def test_trimming_leaves_out_whole_islands_at_both_ends() -> None:
    islands = [sent(str(place), {HEAD: torch.full((5, 3), float(place**3))}) for place in range(10)]
    trimmed = step(islands, {HEAD: torch.zeros(5, 3)}, method="mean", robust="trimmed", trim=0.3).adapter
    assert float(trimmed[HEAD][0, 0]) == pytest.approx((27 + 64 + 125 + 216) / 4)


def test_clipping_brings_down_what_is_longer_only() -> None:
    adapter = {name: torch.zeros(shape) for name, shape in NAMES.items()}
    for norm, most, expected in ((8.0, 2.0, 2.0), (1.0, 2.0, 1.0)):
        change = tensors(3)
        change = {name: tensor * (norm / norm_of(change)) for name, tensor in change.items()}
        outcome = step([sent("a", change)], adapter, method="mean", clip_norm=most)
        assert norm_of(outcome.adapter) == pytest.approx(expected, rel=1e-5)
        assert outcome.state.norms == ((pytest.approx(norm, rel=1e-5),),), "what is known of norms is before clipping"


def test_noise_has_the_deviation_that_was_asked_for_and_is_the_same_again() -> None:
    name = "base_model.model.lm_head.weight"
    adapter, change = {name: torch.zeros(200, 500)}, {name: torch.zeros(200, 500)}
    islands = [sent("a", change, 300), sent("b", change, 100)]
    settings = OuterSettings(method="mean", clip_norm=2.0, noise=0.5, seed=7)
    first = outer_step(settings, OuterState(), adapter, islands).adapter[name]
    # 100,000 draws: the deviation is known to 0.3 %.
    assert float(first.std()) == pytest.approx(0.5 * 2.0 * 0.75, rel=0.02)
    assert abs(float(first.mean())) < 0.01
    assert torch.equal(first, outer_step(settings, OuterState(), adapter, islands).adapter[name])
    assert not torch.equal(first, outer_step(settings, OuterState(round=1), adapter, islands).adapter[name])


def test_an_adapter_keeps_its_dtype_and_what_has_no_change() -> None:
    adapter = {name: tensor.bfloat16() for name, tensor in tensors(0).items()}
    islands = [sent("a", {name: t for name, t in tensors(1).items() if name != HEAD})]
    outcome = step(islands, adapter, method="diloco")
    assert {tensor.dtype for tensor in outcome.adapter.values()} == {torch.bfloat16}
    assert torch.equal(outcome.adapter[HEAD], adapter[HEAD])
    assert {tensor.dtype for tensor in outcome.state.momentum.values()} == {torch.float32}


def test_contributions_that_do_not_fit_are_mistakes() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        step([])
    with pytest.raises(ValueError, match="at least one token"):
        step([sent("a", tensors(1), tokens=0)])
    with pytest.raises(ValueError, match="the same parameters"):
        step([sent("a", tensors(1)), sent("b", {A: tensors(1)[A]})])
    with pytest.raises(ValueError, match="is missing"):
        step([sent("a", {A: tensors(1)[A]})], method="svd")


def test_settings_that_contradict_each_other_are_refused() -> None:
    for wrong in (
        {"method": "svd", "robust": "median"},
        {"method": "svd", "clip_norm": 1.0, "noise": 1.0},
        {"noise": 1.0},
        {"noise": 1.0, "clip_norm": 1.0, "robust": "median"},
        {"outer_learning_rate": -1.0},
    ):
        with pytest.raises(ValueError, match=r"svd|noise"):
            OuterSettings(**wrong)


def test_an_overlapped_result_is_taken_up_without_losing_the_steps_made_meanwhile() -> None:
    sent_adapter, received = tensors(0), tensors(1)
    assert all(torch.equal(t, received[n]) for n, t in rebase(sent_adapter, sent_adapter, received).items())
    steps = tensors(2, 0.1)
    now = rebase(apply_change(sent_adapter, steps), sent_adapter, received)
    for name, change in change_of(now, received).items():
        torch.testing.assert_close(change, steps[name], rtol=1e-4, atol=1e-5)
