import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters.lowrank import Factors
from ecomjax.adapters.similarity import compare, overlap, principal_angles, spans
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
        for table in compare([nothing, b])[0]:
            np.testing.assert_allclose(table, [[0, 0], [0, 1]], atol=1e-5)
    inputs, outputs = spans(Factors(a["head"].a, 0 * a["head"].b))
    assert inputs.shape == (9, 0) and outputs.shape == (12, 0)


def test_adapters_of_another_base_are_refused():
    other = make(1)
    other["head"] = other["head"].replace(a=other["head"].a[:-1])
    with pytest.raises(UserError, match="'head' of adapter 1"):
        compare([make(0), other])
