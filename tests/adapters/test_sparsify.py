import numpy as np
import pytest

from ecomjax.adapters import sparsify as sparsifying
from ecomjax.adapters.sparsify import KINDS, largest, middle, ranked, smallest, sparsify
from ecomjax.errors import UserError


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def draw(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.99])
def test_largest_are_those_that_sorting_finds(density):
    matrix = normal(23, 17)
    keep = largest(matrix, density)
    order = np.argsort(np.abs(matrix), axis=None)
    expected = np.zeros(matrix.size, bool)
    expected[order[matrix.size - int(density * matrix.size) :]] = True
    np.testing.assert_array_equal(keep, expected.reshape(matrix.shape))


def test_what_stays_does_not_depend_on_where_it_stands():
    """Entries equal to the smallest that is kept are kept, all of them."""
    matrix = np.float32([[3, 1, -1], [1, 0, 0]])
    np.testing.assert_array_equal(largest(matrix, 0.4), np.abs(matrix) >= 1)
    assert not largest(matrix, 0.1).any()


SKEWED = {
    "normal": normal(700, 900),
    "mostly zero": np.where(normal(700, 900, seed=1) > 1, normal(700, 900), np.float32(0)),
    "of two values": np.sign(normal(700, 900)) + np.float32(2),
    "sampled badly": np.repeat(normal(1, 900), 700, 0),
}


@pytest.mark.parametrize("matrix", SKEWED.values(), ids=SKEWED)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99, 1.0])
def test_the_magnitude_at_a_place_is_that_of_sorting(matrix, share):
    number = min(int(share * matrix.size), matrix.size - 1)
    expected = np.sort(np.abs(matrix), axis=None)[number]
    assert smallest(matrix, number) == expected


def test_a_sample_that_misleads_costs_time_alone(monkeypatch):
    matrix = normal(300, 40)
    monkeypatch.setattr(sparsifying, "SAMPLE", 4)
    found = [smallest(matrix, number) for number in range(0, matrix.size, 997)]
    np.testing.assert_array_equal(found, np.sort(np.abs(matrix), axis=None)[::997])


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.5, 0.0), (0.95, 0.2)])
def test_middle_drops_both_ends(density, gamma):
    matrix = normal(20, 20)
    keep = middle(matrix, density, gamma)
    order = np.argsort(np.abs(matrix), axis=None)
    count = int(density * 400)
    top = min(int(gamma * 400), 400 - count)
    expected = np.zeros(400, bool)
    expected[order[400 - top - count : 400 - top]] = True
    np.testing.assert_array_equal(keep, expected.reshape(20, 20))


def test_ranked_probabilities_rise_with_the_magnitude():
    """Among the inputs of each output, evenly around the density."""
    matrix = normal(11, 4)
    probability = ranked(matrix, 0.6, 0.2)
    for column in range(4):
        ordered = probability[np.argsort(np.abs(matrix[:, column])), column]
        np.testing.assert_allclose(ordered, 0.5 + 0.2 * np.arange(11) / 10, rtol=1e-6)


@pytest.mark.parametrize("kind", ["random", "ranked"])
def test_rescaled_draws_are_right_on_average(kind):
    """The mean of many draws is the matrix, and their share is the density."""
    matrix = normal(30, 20)
    options = {"kind": kind, "density": 0.3, "epsilon": 0.4}
    draws = np.stack([sparsify(matrix.copy(), rng=draw(i), **options) for i in range(2000)])
    assert abs((draws != 0).mean() - 0.3) < 0.01
    deviation = np.abs(matrix) * np.sqrt((1 / 0.1 - 1) / 2000) + 1e-6
    assert (np.abs(draws.mean(axis=0) - matrix) < 5 * deviation).all()
    plain = sparsify(matrix.copy(), rng=draw(), rescale="none", **options)
    np.testing.assert_array_equal(plain[plain != 0], matrix[plain != 0])
    np.testing.assert_array_equal(plain != 0, draws[0] != 0)


def test_random_divides_by_the_density():
    matrix = normal(30, 20)
    kept = sparsify(matrix.copy(), "random", 0.25, draw())
    np.testing.assert_allclose(kept[kept != 0], 4 * matrix[kept != 0], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_density_one_and_the_sum_of_magnitudes(kind):
    matrix = normal(30, 20)
    before = matrix.copy()
    assert sparsify(matrix, kind, 1.0, draw()) is matrix
    np.testing.assert_array_equal(matrix, before)
    kept = sparsify(before, kind, 0.5, draw(), rescale="l1")
    assert kept is before
    np.testing.assert_allclose(np.abs(kept).sum(), np.abs(matrix).sum(), rtol=1e-5)
    assert 0.4 < (kept != 0).mean() < 0.6
    assert not sparsify(0 * matrix, kind, 0.5, draw(), rescale="l1").any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "smallest"}, "unknown 'smallest'.*magnitude"),
        ({"rescale": "l2"}, "unknown 'l2'.*expectation"),
        ({"density": 0.0}, "density 0.0"),
        ({"density": 1.5}, "density 1.5"),
        ({"density": float("nan")}, "density nan"),
        ({"kind": "ranked", "epsilon": 1.2}, "epsilon 1.2 with density 0.5"),
        ({"kind": "ranked", "epsilon": -0.1}, "epsilon -0.1"),
    ],
)
def test_bad_options_are_refused(changes, message):
    options = {"kind": "magnitude", "density": 0.5, "rng": draw()} | changes
    with pytest.raises(UserError, match=message):
        sparsify(normal(4, 4), **options)
