"""The projected sum of products against a dense SVD in float64."""

import pytest
import torch

from qlora_dist.aggregate.products import Factors, mean_of_products


def some_factors(num_outputs=13, num_inputs=9, ranks=(2, 3, 1), scales=(2.0, 0.5, 8.0), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        Factors(
            torch.randn(r, num_inputs, generator=draw, dtype=torch.float64),
            torch.randn(num_outputs, r, generator=draw, dtype=torch.float64),
            s,
        )
        for r, s in zip(ranks, scales, strict=True)
    ]


def dense(factors, weights):
    return sum(w * s * b @ a for (a, b, s), w in zip(factors, weights, strict=True))


def truncated(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("scale", [1.0, 4.0, -0.25])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(13, 9), (4, 30), (30, 4)])
def test_equals_the_truncated_svd_of_the_dense_sum(rank, scale, num_outputs, num_inputs):
    factors, weights = some_factors(num_outputs, num_inputs), [0.5, 0.3, -0.2]
    matrix = dense(factors, weights)
    best = truncated(matrix, rank)
    a, b, lost, norm = mean_of_products(factors, weights, rank, scale)
    assert a.shape == (rank, num_inputs)
    assert b.shape == (num_outputs, rank)
    torch.testing.assert_close(scale * b @ a, best, rtol=1e-12, atol=1e-12)
    assert lost == pytest.approx(float((matrix - best).norm() / matrix.norm()), abs=1e-14)
    assert norm == pytest.approx(float(matrix.norm()))


def test_the_mean_of_products_is_not_the_product_of_means():
    factors, weights = some_factors(ranks=(2, 2), scales=(1.0, 1.0)), [0.5, 0.5]
    of_means = sum(f.b_Nr for f in factors) @ sum(f.a_rK for f in factors) / 4
    a, b, lost, _ = mean_of_products(factors, weights, rank=4)
    assert lost < 1e-14
    assert (b @ a - of_means).norm() > 0.1 * (b @ a).norm()


def test_both_sides_carry_the_same_share_and_a_fixed_sign():
    factors = some_factors()
    a, b, *_ = mean_of_products(factors, [1.0, 1.0, 1.0], rank=3, scale=2.0)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-12, atol=0)
    assert all(column[column.abs().argmax()] > 0 for column in b.T)
    # The same sum told in another order has the same factors, though QR and SVD see other numbers.
    again_a, again_b, *_ = mean_of_products(factors[::-1], [1.0, 1.0, 1.0], rank=3, scale=2.0)
    torch.testing.assert_close(again_a, a, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(again_b, b, rtol=1e-10, atol=1e-12)


def test_directions_without_a_singular_value_can_still_be_trained():
    (factor,) = some_factors(ranks=(3,), scales=(1.0,))
    a, b, lost, norm = mean_of_products([factor._replace(b_Nr=torch.zeros(13, 3))], [1.0], rank=3)
    assert (lost, norm) == (0.0, 0.0)
    assert b.count_nonzero() == 0
    torch.testing.assert_close(a @ a.T, torch.eye(3, dtype=a.dtype))
    # Twice the same adapter has rank 3, not 6.
    a, b, *_ = mean_of_products([factor, factor], [0.5, 0.5], rank=5)
    assert b[:, 3:].count_nonzero() == 0
    assert (a.norm(dim=1) > 0.1).all()
    torch.testing.assert_close(b @ a, dense([factor], [1.0]))


def test_a_rank_above_all_ranks_together_is_padded():
    (factor,) = some_factors(ranks=(2,), scales=(3.0,))
    a, b, *_ = mean_of_products([factor], [1.0], rank=4)
    assert a[2:].count_nonzero() == 0
    assert b[:, 2:].count_nonzero() == 0
    torch.testing.assert_close(b @ a, dense([factor], [1.0]))


def test_float32_and_bf16_inputs():
    factors, weights = some_factors(), [0.2, 0.3, 0.5]
    halves = [Factors(a.bfloat16(), b.bfloat16(), s) for a, b, s in factors]
    exact = mean_of_products(halves, weights, rank=3)
    single = mean_of_products(halves, weights, rank=3, dtype=torch.float32)
    assert single.a_qK.dtype == torch.float32
    # A few roundings of 6e-8 of the largest singular value.
    torch.testing.assert_close((single.b_Nq @ single.a_qK).double(), exact.b_Nq @ exact.a_qK, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        exact.b_Nq @ exact.a_qK,
        truncated(dense([Factors(a.double(), b.double(), s) for a, b, s in halves], weights), 3),
    )


def test_the_full_matrix_is_never_formed():
    # 400 000 x 300 000 in float64 would be 960 GB.
    draw = torch.Generator().manual_seed(0)
    factors = [Factors(torch.randn(2, 300_000, generator=draw), torch.randn(400_000, 2, generator=draw), 1.0)] * 2
    assert mean_of_products(factors, [0.5, 0.5], rank=2).lost < 1e-12


@pytest.mark.parametrize(
    ("factors", "weights", "rank", "scale"),
    [
        ([], [], 1, 1.0),
        (some_factors(), [1.0], 1, 1.0),
        (some_factors(), [1.0] * 3, 0, 1.0),
        (some_factors(), [1.0] * 3, 1, 0.0),
        (some_factors() + some_factors(num_inputs=8), [1.0] * 6, 1, 1.0),
    ],
)
def test_what_does_not_fit_is_refused(factors, weights, rank, scale):
    with pytest.raises(ValueError, match=r"needed|is not"):
        mean_of_products(factors, weights, rank, scale)
