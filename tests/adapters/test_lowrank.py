import numpy as np
import pytest

from ecomjax.adapters.blocks import row_blocks
from ecomjax.adapters.lowrank import (
    Factors,
    add,
    approximate,
    decompose,
    factors_of,
    inner,
    refactor,
    relative_error,
    shapes_of,
)
from ecomjax.errors import UserError
from ecomjax.typing import LowRank


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def factors(d_in, rank, d_out, seed=0):
    return Factors(normal(d_in, rank, seed=seed), normal(rank, d_out, seed=seed + 100))


def test_a_sum_is_exact():
    terms = [factors(12, rank, 9, seed=rank) for rank in (2, 3, 0)]
    total = add(terms, [0.5, -2.0, 7.0])
    assert total.a.shape == (12, 5)
    expected = 0.5 * terms[0].a @ terms[0].b - 2.0 * terms[1].a @ terms[1].b
    np.testing.assert_allclose(total.a @ total.b, expected, atol=1e-5)


def test_inner_product_is_that_of_the_matrices():
    x, y = factors(12, 2, 9), factors(12, 5, 9, seed=1)
    np.testing.assert_allclose(inner(x, y), np.sum((x.a @ x.b) * (y.a @ y.b)), rtol=1e-5)


@pytest.mark.parametrize("shape", [(40, 6, 30), (30, 6, 40), (5, 8, 9), (9, 8, 5), (4, 0, 6)])
def test_decomposition_is_that_of_the_dense_matrix(shape):
    product = factors(*shape)
    u, s, vt = decompose(product)
    expected = np.linalg.svd(product.a @ product.b, compute_uv=False)
    np.testing.assert_allclose(s, expected[: len(s)], atol=1e-4)
    np.testing.assert_allclose((u * s) @ vt, product.a @ product.b, atol=1e-4)
    np.testing.assert_allclose(u.T @ u, np.eye(len(s)), atol=1e-5)
    np.testing.assert_allclose(vt @ vt.T, np.eye(len(s)), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 8, 11])
def test_refactored_is_the_nearest_of_its_rank(rank):
    """And the error told is the one there is; a rank above the true one is padded."""
    product = add([factors(40, 4, 30), factors(40, 4, 30, seed=1)], [1.0, 0.5])
    near, error = refactor(product, rank)
    assert near.a.shape == (40, rank) and near.b.shape == (rank, 30)
    dense = product.a @ product.b
    values = np.linalg.svd(dense.astype(np.float64), compute_uv=False)
    best = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
    np.testing.assert_allclose(error, best, atol=1e-5)
    np.testing.assert_allclose(relative_error(dense, near), best, atol=1e-5)


def test_refactoring_of_nothing():
    near, error = refactor(Factors(np.zeros((4, 2), np.float32), normal(2, 3)), 2)
    assert error == 0.0 and not (near.a @ near.b).any()


@pytest.mark.parametrize("shape", [(300, 120), (120, 300)])
def test_approximation_is_near_the_best(shape):
    """Of a matrix of full rank, whose singular values fall slowly as those of a trimmed delta."""
    matrix = normal(*shape)
    matrix[np.abs(matrix) < 1.0] = 0.0
    near, error = approximate(matrix, 16, np.random.default_rng(0))
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    best = np.linalg.norm(values[16:]) / np.linalg.norm(values)
    dense = matrix.astype(np.float64)
    true = np.linalg.norm(dense - near.a.astype(np.float64) @ near.b) / np.linalg.norm(dense)
    np.testing.assert_allclose(error, true, rtol=1e-5)
    assert best <= error <= 1.02 * best


def test_approximation_of_what_has_the_rank_is_exact():
    product = factors(300, 8, 120)
    matrix = product.a @ product.b
    near, error = approximate(matrix, 8, np.random.default_rng(0))
    assert error < 1e-5
    again, _ = approximate(matrix, 8, np.random.default_rng(0))
    np.testing.assert_array_equal(near.a, again.a)
    small, error = approximate(matrix[:20], 8, np.random.default_rng(0))
    assert error < 1e-5 and small.a.shape == (20, 8)
    assert approximate(0 * matrix, 8, np.random.default_rng(0))[1] == 0.0


def test_blocks_cover_every_row_once():
    shape = (5000, 700)
    rows = np.concatenate([np.arange(5000)[block] for block in row_blocks(shape)])
    assert len(row_blocks(shape)) > 1
    np.testing.assert_array_equal(rows, np.arange(5000))


def leaf(stack=(2,), d_in=4, rank=3, d_out=5):
    scale = np.full(stack, 2.0, np.float32)
    return LowRank(a=normal(*stack, d_in, rank), b=normal(*stack, rank, d_out), scale=scale)


def test_factors_carry_the_scale():
    x = leaf()
    shape = shapes_of([{"q": x}])["q"]
    assert tuple(shape) == ((2,), 4, 5)
    a, b = factors_of(x, shape, (1,))
    np.testing.assert_allclose(a @ b, 2.0 * x.a[1] @ x.b[1], rtol=1e-6)
    a, b = factors_of(None, shape, (1,))
    assert (a @ b).shape == (4, 5) and not (a @ b).any()


class Other(LowRank):
    pass


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([], "no adapter"),
        ([{"q": leaf()}, {"k": leaf()}], r"adapter 1 has no kernel in common.*it has k"),
        ([{"q": leaf()}, {"q": leaf(d_in=6)}], r"shape \(\(2,\), 6, 5\).*kernel 'q' of adapter 1"),
        ([{"q": leaf()}, {"q": leaf(d_out=6)}], r"shape .*kernel 'q' of adapter 1"),
        ([{"q": leaf()}, {"q": leaf(stack=(3,))}], r"shape .*kernel 'q' of adapter 1"),
        ([{"q": leaf().replace(b=leaf(rank=2).b)}], r"factors .*kernel 'q' of adapter 0"),
        ([{"q": leaf().replace(scale=np.float32(1))}], r"factors .*kernel 'q' of adapter 0"),
        ([{"q": leaf().replace(b=leaf().b * np.nan)}], r"NaN.*kernel 'q' of adapter 0"),
        ([{"q": leaf().replace(scale=leaf().scale * np.inf)}], r"NaN.*kernel 'q' of adapter 0"),
        ([{"q": Other(**vars(leaf()))}], r"Other is no plain LoRA.*kernel 'q' of adapter 0"),
    ],
)
def test_what_does_not_fit_is_refused(adapters, message):
    with pytest.raises(UserError, match=message):
        shapes_of(adapters)
