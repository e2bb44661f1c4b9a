import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from ecomjax import trees
from ecomjax.adapters.lowrank import Factors
from ecomjax.adapters.similarity import (
    cka,
    compare,
    grassmann,
    overlap,
    principal_angles,
    spans,
    transfer_correlation,
)
from ecomjax.errors import UserError
from ecomjax.typing import LowRank

SHAPES = {"layers/q/kernel": ((3,), 24, 17), "head": ((), 9, 12)}


def make(seed, rank=3):
    rng = np.random.default_rng(seed)

    def leaf(stack, d_in, d_out):
        a, b = (
            rng.standard_normal((*stack, *shape), np.float32)
            for shape in ((d_in, rank), (rank, d_out))
        )
        return LowRank(a=a, b=b, scale=np.full(stack, rng.uniform(0.5, 2.0), np.float32))

    return trees.unflatten({path: leaf(*shape) for path, shape in SHAPES.items()})


def deltas(adapter):
    flat = trees.flatten(adapter)
    return {path: x.scale[..., None, None] * (x.a @ x.b) for path, x in flat.items()}


def test_cosines_are_those_of_the_dense_deltas():
    adapters = [make(0), make(1, rank=5), make(2, rank=1)]
    whole, by_kernel = compare(adapters)
    dense = [deltas(adapter) for adapter in adapters]
    for path, table in by_kernel.items():
        np.testing.assert_allclose(table.cosine, cosines(dense, [path]), atol=1e-5)
    np.testing.assert_allclose(whole.cosine, cosines(dense, SHAPES), atol=1e-5)


def cosines(dense, paths):
    vectors = np.stack([np.concatenate([x[path].ravel() for path in paths]) for x in dense])
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1)
    return vectors @ vectors.T / np.outer(norms, norms)


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, -1.0)])
def test_a_multiple_is_alike_whatever_its_factors(sign, expected):
    """The same product from other factors and another scale; minus it is the opposite."""
    a, rng = make(0), np.random.default_rng(1)

    def turned(leaf):
        mixing = rng.standard_normal((3, 3)).astype(np.float32) + 3 * np.eye(3, dtype=np.float32)
        inverse = np.linalg.inv(mixing)
        scale = np.float32(sign * 0.3) * leaf.scale
        return leaf.replace(a=leaf.a @ mixing, b=inverse @ leaf.b, scale=scale)

    whole, by_kernel = compare([a, trees.map_leaves(turned, a)])
    for table in (whole, *by_kernel.values()):
        np.testing.assert_allclose(table.cosine[0, 1], expected, atol=1e-4)
        np.testing.assert_allclose(table.inputs, 1.0, atol=1e-4)
        np.testing.assert_allclose(table.outputs, 1.0, atol=1e-4)


def test_principal_angles_of_planes_at_known_angles():
    known = np.array([1e-6, 0.3, 1.2])
    x = np.eye(9)[:, :3]
    y = np.zeros((9, 3))
    y[:3], y[3:6] = np.diag(np.cos(known)), np.diag(np.sin(known))
    np.testing.assert_allclose(principal_angles(x, y), known, rtol=0, atol=1e-10)
    np.testing.assert_allclose(overlap(known), np.mean(np.cos(known) ** 2))
    np.testing.assert_allclose(principal_angles(x, np.eye(9)[:, 1:7]), [0, 0, np.pi / 2], atol=1e-9)
    assert len(principal_angles(x, np.zeros((9, 0)))) == 0 and overlap(np.zeros(0)) == 0.0


def test_overlaps_are_means_over_the_stack():
    adapters = [make(0), make(1, rank=5)]
    whole, by_kernel = compare(adapters)
    dense, found = [deltas(adapter) for adapter in adapters], {}
    for path, (stack, *_) in SHAPES.items():
        found[path] = []
        for index in np.ndindex(stack):
            (u1, _, v1), (u2, _, v2) = (np.linalg.svd(x[path][index]) for x in dense)
            inputs = np.linalg.norm(u1[:, :3].T @ u2[:, :5]) ** 2 / 3
            outputs = np.linalg.norm(v1[:3] @ v2[:5].T) ** 2 / 3
            found[path].append((inputs, outputs))
        table = by_kernel[path]
        ours = (table.inputs[0, 1], table.outputs[0, 1])
        np.testing.assert_allclose(ours, np.mean(found[path], axis=0), atol=1e-5)
        np.testing.assert_array_equal(table.inputs, table.inputs.T)
    every = np.concatenate(list(found.values()))
    ours = (whole.inputs[0, 1], whole.outputs[0, 1])
    np.testing.assert_allclose(ours, every.mean(axis=0), atol=1e-5)


def test_zeros_span_nothing_and_padding_changes_nothing():
    a, b = make(0), make(1)

    def padded(leaf):
        wider = [(0, 0)] * (leaf.a.ndim - 1)
        return leaf.replace(
            a=np.pad(leaf.a, [*wider, (0, 2)]), b=np.pad(leaf.b, [*wider[:-1], (0, 2), (0, 0)])
        )

    for ours, expected in zip(
        compare([trees.map_leaves(padded, a), b])[0], compare([a, b])[0], strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    zero = trees.map_leaves(lambda leaf: leaf.replace(b=0 * leaf.b), a)
    for nothing in (zero, {"head": zero["head"]}):
        for table in compare([nothing, b])[0][:3]:
            np.testing.assert_allclose(table, [[0, 0], [0, 1]], atol=1e-5)
    inputs, outputs = spans(Factors(a["head"].a, 0 * a["head"].b))
    assert inputs.shape == (9, 0) and outputs.shape == (12, 0)


def test_adapters_of_another_base_are_refused():
    other = make(1)
    other["head"] = other["head"].replace(a=other["head"].a[:-1])
    with pytest.raises(UserError, match="'head' of adapter 1"):
        compare([make(0), other])


def test_grassmann_distances_are_those_of_scipy_and_means_over_the_stack():
    adapters = [make(0), make(1, rank=5), make(2)]
    whole, by_kernel = compare(adapters)
    dense, every = [deltas(adapter) for adapter in adapters], []
    for path, (stack, *_) in SHAPES.items():
        found = []
        for index in np.ndindex(stack):
            (u1, _, v1), (u2, _, v2) = (np.linalg.svd(x[path][index]) for x in dense[:2])
            inputs = scipy.linalg.subspace_angles(u1[:, :3], u2[:, :5])
            outputs = scipy.linalg.subspace_angles(v1[:3].T, v2[:5].T)
            beyond = 2 * (np.pi / 2) ** 2
            found.append([np.sqrt((x**2).sum() + beyond) for x in (inputs, outputs)])
        table = by_kernel[path]
        ours = (table.input_distance[0, 1], table.output_distance[0, 1])
        np.testing.assert_allclose(ours, np.mean(found, axis=0), rtol=1e-4)
        every += found
    ours = (whole.input_distance[0, 1], whole.output_distance[0, 1])
    np.testing.assert_allclose(ours, np.mean(every, axis=0), rtol=1e-4)
    for table in whole[3:]:
        np.testing.assert_array_equal(table, table.T)
        np.testing.assert_allclose(np.diag(table), 0.0, atol=1e-3)
        assert table[0, 1] <= table[0, 2] + table[2, 1]


def test_grassmann_distance_is_a_metric_across_dimensions():
    """Contained is not equal; nothing is as far from a space as what is orthogonal to it."""
    assert grassmann(np.array([0.3, 0.4])) == pytest.approx(0.5)
    x, eye = np.eye(9)[:, :2], np.eye(9)
    assert grassmann(principal_angles(x, eye[:, :3]), 1) == pytest.approx(np.pi / 2)
    assert grassmann(principal_angles(x, eye[:, :0]), 2) == pytest.approx(
        grassmann(principal_angles(x, eye[:, 4:6]))
    )
    zero = trees.map_leaves(lambda leaf: leaf.replace(b=0 * leaf.b), make(0))
    distances = compare([zero, zero, make(1)])[0].input_distance
    np.testing.assert_allclose(distances[0, :2], 0.0)
    np.testing.assert_allclose(distances[0, 2], np.sqrt(3) * np.pi / 2)


@pytest.fixture(scope="module")
def activations():
    """Of 40 inputs by three adapters, far from centred; two are related, widths differ."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 6)) * np.arange(1, 7) + 5.0
    return [x, x @ rng.standard_normal((6, 4)), rng.standard_normal((40, 9)) - 3.0]


def test_cka_is_that_of_gram_matrices(activations):
    """HSIC(K, L) = tr(K H L H) / (n - 1)^2 with the centring matrix H."""
    centring = np.eye(40) - 1 / 40
    grams = [centring @ (x @ x.T) @ centring for x in activations]
    hsic = np.array([[np.trace(k @ m) / 39**2 for m in grams] for k in grams])
    expected = hsic / np.sqrt(np.outer(np.diag(hsic), np.diag(hsic)))
    np.testing.assert_allclose(cka(activations), expected, rtol=1e-10)
    np.testing.assert_allclose(np.diag(cka(activations)), 1.0)


def test_cka_does_not_see_rotation_scale_or_offset(activations):
    x, y, _ = activations
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))[0]
    table = cka([x, 0.01 * x @ rotation + 7.0, y])
    np.testing.assert_allclose(table[0, 1], 1.0)
    np.testing.assert_allclose(table[0, 2], table[1, 2])
    stretched = cka([x, x * np.array([9.0, 1, 1, 1, 1, 1])])
    assert stretched[0, 1] < 0.95


def test_cka_of_single_precision_is_accumulated_in_double(activations):
    """A mean of 10^4 times the spread."""
    shifted = [(x + 1e4).astype(np.float32) for x in activations]
    exact = cka([x.astype(np.float64) for x in shifted])
    np.testing.assert_allclose(cka(shifted), exact, rtol=1e-10)


def test_cka_of_constants_is_zero_and_bad_activations_are_refused(activations):
    x = activations[0]
    np.testing.assert_array_equal(cka([x, np.ones((40, 3))])[1], [0.0, 0.0])
    with pytest.raises(UserError, match="39 rows, those before have 40"):
        cka([x, x[1:]])
    broken = x.copy()
    broken[3, 2] = np.nan
    with pytest.raises(UserError, match="activations of adapter 1"):
        cka([x, broken])


def symmetric(rng, count):
    table = rng.standard_normal((count, count))
    return table + table.T


@pytest.mark.parametrize("count", [3, 5, 9])
def test_transfer_correlation_is_spearman_over_pairs(count):
    """Each pair once, both ways of transfer averaged; ties among them share a rank."""
    rng = np.random.default_rng(count)
    similarity, transfer = symmetric(rng, count), rng.standard_normal((count, count)).round(1)
    np.fill_diagonal(similarity, 99.0)
    np.fill_diagonal(transfer, np.nan)
    pairs = list(itertools.combinations(range(count), 2))
    expected = scipy.stats.spearmanr(
        [similarity[pair] for pair in pairs], [transfer[i, j] + transfer[j, i] for i, j in pairs]
    )
    found = transfer_correlation(similarity, transfer)
    np.testing.assert_allclose(found.rho, expected.statistic, atol=1e-12)
    flipped = transfer_correlation(-similarity, transfer)
    np.testing.assert_allclose(flipped, [-found.rho, found.p_value])


@pytest.mark.parametrize("count", [4, 5])
def test_few_adapters_are_permuted_in_all_ways(count):
    """By hand: the share of orders of the adapters with as large a |rho|."""
    rng = np.random.default_rng(0)
    similarity, transfer = symmetric(rng, count), symmetric(rng, count)
    pairs = list(itertools.combinations(range(count), 2))

    def rho(order):
        permuted = [transfer[order[i], order[j]] for i, j in pairs]
        return scipy.stats.spearmanr([similarity[pair] for pair in pairs], permuted).statistic

    every = np.abs([rho(order) for order in itertools.permutations(range(count))])
    expected = np.mean(every >= abs(rho(range(count))) - 1e-9)
    found = transfer_correlation(similarity, transfer)
    np.testing.assert_allclose(found.p_value, expected)
    itself = transfer_correlation(similarity, similarity)
    np.testing.assert_allclose(itself, [1.0, 1 / math.factorial(count)])
    three = similarity[:3, :3]
    np.testing.assert_allclose(transfer_correlation(three, three), [1.0, 1 / 3])


def test_many_adapters_are_permuted_by_a_seed(monkeypatch):
    monkeypatch.setattr("ecomjax.adapters.similarity.PERMUTATIONS", 999)
    rng = np.random.default_rng(2)
    similarity, transfer = symmetric(rng, 9), rng.standard_normal((9, 9))
    found = transfer_correlation(similarity, transfer, seed=1)
    assert found == transfer_correlation(similarity, transfer, seed=1)
    other = transfer_correlation(similarity, transfer, seed=2)
    assert other.p_value != found.p_value and abs(other.p_value - found.p_value) < 0.1
    assert transfer_correlation(similarity, similarity) == pytest.approx((1.0, 1 / 1000))


def test_unrelated_tables_are_seldom_called_related(monkeypatch):
    """Pairs of one adapter are alike in both tables, which a test of pairs takes for evidence."""
    monkeypatch.setattr("ecomjax.adapters.similarity.PERMUTATIONS", 199)
    rng = np.random.default_rng(3)
    found, naive = [], []
    for _ in range(300):
        of_adapter = rng.standard_normal((2, 8))
        tables = [x[:, None] + x[None] + 0.3 * symmetric(rng, 8) for x in of_adapter]
        found.append(transfer_correlation(*tables).p_value)
        pairs = [table[np.triu_indices(8, 1)] for table in tables]
        naive.append(scipy.stats.spearmanr(*pairs).pvalue)
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.085
    assert np.mean(np.array(naive) < 0.05) > 0.15


def test_tables_without_a_correlation_are_refused():
    rng = np.random.default_rng(0)
    table = symmetric(rng, 4)
    with pytest.raises(UserError, match="2 adapters"):
        transfer_correlation(table[:2, :2], table[:2, :2])
    missing = table.copy()
    missing[0, 1] = np.nan
    for bad in (missing, np.ones((4, 4))):
        with pytest.raises(UserError, match="table of transfer"):
            transfer_correlation(table, bad)
        with pytest.raises(UserError, match="table of similarity"):
            transfer_correlation(bad, table)
