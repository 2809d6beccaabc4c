"""Each method on one layer against a reference in float64, entry by entry; ranks and scales mixed."""

import math

import pytest
import torch

from qlora_dist.aggregate.methods import combine_layer, recipe
from qlora_dist.aggregate.products import Factors
from qlora_dist.aggregate.sparse import (
    added,
    dropped,
    dropped_by_magnitude,
    generator_of,
    projected,
    trim_threshold,
    trimmed,
)
from qlora_dist.config.errors import UserError

NUM_OUTPUTS, NUM_INPUTS = 11, 7
# fp32 against float64: a few roundings of 6e-8 of values of order 30.
CLOSE = {"rtol": 0, "atol": 3e-5}


def some_factors(ranks=(2, 4, 3), scales=(2.0, 8.0, 0.5), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        Factors(torch.randn(r, NUM_INPUTS, generator=draw), torch.randn(NUM_OUTPUTS, r, generator=draw), s)
        for r, s in zip(ranks, scales, strict=True)
    ]


def update(factors):
    return factors.scale * factors.b_Nr.double() @ factors.a_rK.double()


def best_of_rank(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def product(projection):
    return projection.b_Nq.double() @ projection.a_qK.double()


def elected(matrices, weights, frequency=False):
    """TIES' election and disjoint merge as PEFT weights them, one entry after another."""
    result = torch.zeros_like(matrices[0])
    for place in range(result.numel()):
        values = [float(matrix.flatten()[place]) for matrix in matrices]
        votes = sum(math.copysign(1, v) if v and frequency else v for v in values)
        sign = 1 if votes >= 0 else -1
        agreeing = [w * v for w, v in zip(weights, values, strict=True) if v * sign > 0]
        result.view(-1)[place] = sum(agreeing) / max(1, len(agreeing))
    return result


def largest(matrix, density):
    kept = sorted(range(matrix.numel()), key=lambda i: -abs(float(matrix.flatten()[i])))[
        : int(density * matrix.numel())
    ]
    mask = torch.zeros(matrix.numel(), dtype=matrix.dtype)
    mask[kept] = 1
    return matrix * mask.view(matrix.shape)


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 4.0]])
def test_svd_is_the_truncated_svd_of_the_dense_weighted_mean(rank, weights):
    factors = some_factors()
    share = [w / sum(weights) for w in weights] if weights else [1 / 3] * 3
    dense = sum(w * update(f) for w, f in zip(share, factors, strict=True))
    made = combine_layer(recipe("svd", 3, weights), "layer", factors, rank)
    torch.testing.assert_close(product(made), best_of_rank(dense, rank), **CLOSE)
    assert made.lost == pytest.approx(float((dense - best_of_rank(dense, rank)).norm() / dense.norm()), abs=1e-6)


@pytest.mark.parametrize("weights", [None, [0.7, -1.5, 2.0]])
def test_task_arithmetic_adds_the_updates(weights):
    factors = some_factors()
    dense = sum(w * update(f) for w, f in zip(weights or [1.0] * 3, factors, strict=True))
    made = combine_layer(recipe("task-arithmetic", 3, weights), "layer", factors, 4)
    torch.testing.assert_close(product(made), best_of_rank(dense, 4), **CLOSE)


def test_cat_is_exact():
    factors, weights = some_factors(), [0.7, -1.5, 2.0]
    made = combine_layer(recipe("cat", 3, weights), "layer", factors, 12)
    dense = sum(w * update(f) for w, f in zip(weights, factors, strict=True))
    assert made.a_qK.shape == (12, NUM_INPUTS)
    torch.testing.assert_close(product(made), dense, **CLOSE)
    assert made.norm == pytest.approx(float(dense.norm()))


@pytest.mark.parametrize("scales", [(2.0, 2.0, 2.0), (2.0, 8.0, 0.5)])
def test_mean_is_the_product_of_the_mean_factors(scales):
    factors, weights = some_factors((3, 3, 3), scales), [2.0, 1.0, 1.0]
    made = combine_layer(recipe("mean", 3, weights), "layer", factors, 3)
    mean_a = sum(w / 4 * math.sqrt(f.scale) * f.a_rK.double() for w, f in zip(weights, factors, strict=True))
    mean_b = sum(w / 4 * math.sqrt(f.scale) * f.b_Nr.double() for w, f in zip(weights, factors, strict=True))
    torch.testing.assert_close(product(made), mean_b @ mean_a, **CLOSE)


def test_the_mean_of_copies_is_the_copy_and_with_one_frozen_factor_it_is_the_mean_of_products():
    one = some_factors((3,), (5.0,))[0]
    torch.testing.assert_close(product(combine_layer(recipe("mean", 2), "layer", [one, one], 3)), update(one), **CLOSE)
    others = [f._replace(a_rK=one.a_rK) for f in some_factors((3, 3), (5.0, 5.0))]
    mean = combine_layer(recipe("mean", 2), "layer", others, 3)
    torch.testing.assert_close(product(mean), sum(map(update, others)) / 2, **CLOSE)


def test_task_arithmetic_on_factors():
    factors, weights = some_factors((3, 3, 3)), [0.5, -2.0, 1.0]
    made = combine_layer(recipe("task-arithmetic", 3, weights, on="factors"), "layer", factors, 3)
    roots = [math.sqrt(abs(w) * f.scale) for w, f in zip(weights, factors, strict=True)]
    a = sum(math.copysign(r, w) * f.a_rK.double() for r, w, f in zip(roots, weights, factors, strict=True))
    b = sum(r * f.b_Nr.double() for r, f in zip(roots, factors, strict=True))
    torch.testing.assert_close(product(made), b @ a, **CLOSE)


@pytest.mark.parametrize("majority_sign", ["total", "frequency", "none"])
@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
def test_ties_on_updates(majority_sign, density):
    factors, weights = some_factors(), [0.9, 0.4, 1.3]
    kept = [largest(update(f), density) for f in factors]
    if majority_sign == "none":
        dense = sum(w * m for w, m in zip(weights, kept, strict=True))
    else:
        dense = elected(kept, weights, majority_sign == "frequency")
    chosen = recipe("ties", 3, weights, density=density, majority_sign=majority_sign)
    torch.testing.assert_close(product(combine_layer(chosen, "layer", factors, 7)), dense, **CLOSE)
    made = combine_layer(chosen, "layer", factors, 2)
    torch.testing.assert_close(product(made), best_of_rank(dense, 2), **CLOSE)
    assert made.lost == pytest.approx(float((dense - best_of_rank(dense, 2)).norm() / dense.norm()), abs=1e-5)


def test_ties_on_factors():
    factors = some_factors((3, 3, 3))
    chosen = recipe("ties", 3, [0.9, 0.4, 1.3], density=0.5, on="factors")
    roots = [math.sqrt(w * f.scale) for w, f in zip(chosen.weights, factors, strict=True)]
    a = elected([largest(f.a_rK.double(), 0.5) for f in factors], roots)
    b = elected([largest(f.b_Nr.double(), 0.5) for f in factors], roots)
    torch.testing.assert_close(product(combine_layer(chosen, "layer", factors, 3)), b @ a, **CLOSE)


@pytest.mark.parametrize("method", ["dare", "della"])
@pytest.mark.parametrize("majority_sign", ["total", "none"])
def test_what_dare_and_della_draw_is_added_and_elected(method, majority_sign):
    factors, weights = some_factors(), [0.9, 0.4, 1.3]
    chosen = recipe(method, 3, weights, density=0.5, seed=7, majority_sign=majority_sign)
    sparse = []
    for i, f in enumerate(factors):
        draws = torch.rand(NUM_OUTPUTS, NUM_INPUTS, generator=generator_of(7, "layer", i, "update", 0))
        kept = torch.full((NUM_OUTPUTS, NUM_INPUTS), 0.5, dtype=torch.float64)
        if method == "della":
            for n, row in enumerate(update(f)):
                for rank, k in enumerate(sorted(range(NUM_INPUTS), key=lambda k, row=row: abs(float(row[k])))):
                    kept[n, k] = 0.45 + 0.1 * rank / (NUM_INPUTS - 1)
        sparse.append(torch.where(draws < kept, update(f) / kept, 0.0))
    if majority_sign == "none":
        dense = sum(w * m for w, m in zip(weights, sparse, strict=True))
    else:
        dense = elected(sparse, weights)
    torch.testing.assert_close(product(combine_layer(chosen, "layer", factors, 7)), dense, **CLOSE)
    assert torch.equal(combine_layer(chosen, "layer", factors, 7).a_qK, combine_layer(chosen, "layer", factors, 7).a_qK)
    other = recipe(method, 3, weights, density=0.5, seed=8, majority_sign=majority_sign)
    assert not torch.allclose(product(combine_layer(other, "layer", factors, 7)), dense, atol=1e-2)
    assert not torch.allclose(product(combine_layer(chosen, "another", factors, 7)), dense, atol=1e-2)


def test_dropping_keeps_the_expected_value():
    matrix, rounds = update(some_factors()[0]), 4000
    generator = torch.Generator().manual_seed(0)
    for drop in (
        lambda: dropped(matrix, 0.4, generator),
        lambda: dropped_by_magnitude(matrix, 0.4, 0.6, generator),
    ):
        draws = torch.stack([drop() for _ in range(rounds)])
        # At least 0.1 of the draws keep an entry: a standard deviation of at most 3 |entry|.
        bound = 5 * 3 * matrix.abs() / math.sqrt(rounds) + 1e-12
        assert ((draws.mean(0) - matrix).abs() < bound).all()
    kept = (draws != 0).double().mean(0)  # della: by the order of magnitudes in a row, from 0.1 to 0.7
    in_order = kept.gather(1, matrix.abs().argsort(dim=1)).mean(0)
    torch.testing.assert_close(in_order, torch.linspace(0.1, 0.7, NUM_INPUTS, dtype=torch.float64), rtol=0, atol=0.015)


def test_a_layer_that_an_adapter_does_not_have_is_an_update_of_zero():
    factors = some_factors((3, 3, 3))
    absent, zero = [*factors[:2], None], [*factors[:2], factors[2]._replace(b_Nr=torch.zeros(NUM_OUTPUTS, 3))]
    for method in ("svd", "task-arithmetic", "ties", "cat", "dare", "della"):
        chosen, rank = recipe(method, 3), 9
        made, expected = (product(combine_layer(chosen, "layer", given, rank)) for given in (absent, zero))
        torch.testing.assert_close(made, expected, **CLOSE)


def test_trimming_keeps_what_is_as_large_as_the_last():
    row = torch.tensor([[1.0, -1.0, 0.5, 2.0]])
    assert trimmed(row, trim_threshold(row, 0.5)).tolist() == [[1.0, -1.0, 0.0, 2.0]]
    assert trimmed(row, trim_threshold(row, 0.2)).count_nonzero() == 0


def test_an_election_that_ends_even_is_positive():
    pair = [lambda begin, end: torch.tensor([[1.0, -2.0]]), lambda begin, end: torch.tensor([[-1.0, 1.0]])]
    assert added(pair, [1.0, 1.0], "frequency", 1).tolist() == [[1.0, 1.0]]
    assert added(pair, [1.0, 1.0], "total", 1).tolist() == [[1.0, -2.0]]


@pytest.mark.parametrize("method", ["ties", "dare", "della"])
def test_blocks_of_rows_change_nothing_but_the_draws(method, monkeypatch):
    factors, chosen = some_factors(), recipe(method, 3, density=0.5)
    whole = product(combine_layer(chosen, "layer", factors, 7))
    monkeypatch.setattr("qlora_dist.aggregate.sparse.BLOCK_ROWS", 4)
    blocks = product(combine_layer(chosen, "layer", factors, 7))
    if method == "ties":
        torch.testing.assert_close(blocks, whole, **CLOSE)
    else:
        first = blocks[:4] - whole[:4]
        assert first.abs().max() < 2e-4  # two SVDs in fp32 of entries up to 60
        assert not torch.allclose(blocks[4:], whole[4:], atol=1e-2)


def test_a_large_matrix_is_projected_by_subspace_iteration_as_well_as_by_an_svd():
    draw = torch.Generator().manual_seed(0)
    signal = torch.randn(1500, 8, generator=draw) @ torch.randn(8, 1100, generator=draw)
    matrix = signal + torch.randn(1500, 1100, generator=draw)  # a bulk without gaps, as pruning leaves it
    made = projected(matrix, 8, generator_of("a"))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(made.b_Nq @ made.a_qK, u[:, :8] * s[:8] @ v[:8], rtol=0, atol=1e-3)
    assert made.lost == pytest.approx(float(s[8:].norm() / s.norm()), rel=1e-5)
    # Into the bulk there is no gap to find; what is lost may exceed the best by a thousandth.
    assert projected(matrix, 16, generator_of("b")).lost == pytest.approx(float(s[16:].norm() / s.norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("median", {}, "no such method"),
        ("mean", {"on": "updates"}, "--on updates has no meaning for mean"),
        ("cat", {"on": "factors"}, "--on factors has no meaning for cat"),
        ("svd", {"on": "layers"}, "--on layers has no meaning"),
        ("cat", {"rank": 4}, "--rank has no meaning for cat"),
        ("ties", {"rank": 4, "on": "factors"}, "--rank has no meaning for ties on factors"),
        ("svd", {"density": 0.5}, "--density has no meaning for svd"),
        ("dare", {"epsilon": 0.1}, "--epsilon has no meaning for dare"),
        ("mean", {"majority_sign": "total"}, "--majority-sign has no meaning"),
        ("ties", {"seed": 1}, "--seed has no meaning"),
        ("svd", {"rank": 0}, "--rank 0 is not possible"),
        ("ties", {"density": 0.0}, "--density 0.0 is not possible"),
        ("ties", {"density": math.nan}, "--density nan is not possible"),
        ("della", {"density": 0.9, "epsilon": 0.3}, "--epsilon 0.3 is not possible; give 0 or more, and less than 0.2"),
        ("dare", {"majority_sign": "most"}, "--majority-sign most is not possible"),
        ("svd", {"weights": [1.0]}, r"1 number\(s\) for 2 adapter\(s\)"),
        ("svd", {"weights": [1.0, -1.0]}, "takes no negative weight; use --method task-arithmetic"),
        ("ties", {"weights": [0.0, 0.0]}, "not all of them 0"),
        ("ties", {"weights": [math.inf, 1.0]}, "--weights inf,1 is not possible"),
    ],
)
def test_what_has_no_meaning_is_refused(method, options, sentence):
    with pytest.raises(UserError, match=sentence):
        recipe(method, 2, **options)
