"""Deltas are compared, never factors: many factors have one product."""

import dataclasses
import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import merge as merging
from ecomjax.adapters.merge import merge, overall_error, plan
from ecomjax.adapters.methods import LAWS, METHODS, Options, unread
from ecomjax.errors import UserError
from ecomjax.typing import LowRank

SHAPES = {
    "layers/q/kernel": ((3,), 14, 11),
    "layers/up/kernel": ((3, 2), 9, 16),
    "head": ((), 8, 7),
}
FULL = 16
"""A rank that every matrix of the tests fits into."""


def make(seed, rank=3, alpha=4.0, paths=tuple(SHAPES)):
    rng = np.random.default_rng(seed)

    def leaf(stack, d_in, d_out):
        scale = rng.uniform(0.5, 1.5, stack).astype(np.float32) * np.float32(alpha / rank)
        draw = rng.standard_normal
        return LowRank(
            a=draw((*stack, d_in, rank), np.float32),
            b=draw((*stack, rank, d_out), np.float32),
            scale=np.asarray(scale),
        )

    return trees.unflatten({path: leaf(*SHAPES[path]) for path in paths})


def deltas(tree):
    """{path: delta} of an adapter; what is dense already stays."""

    def dense(leaf):
        a, b, scale = (np.asarray(x, np.float32) for x in (leaf.a, leaf.b, leaf.scale))
        return scale[..., None, None] * (a @ b)

    flat = trees.flatten(tree)
    return {path: dense(x) if isinstance(x, LowRank) else x for path, x in flat.items()}


def assert_same(ours, expected, tolerance=1e-5):
    ours, expected = deltas(ours), deltas(expected)
    assert set(ours) == set(expected)
    for path, value in expected.items():
        np.testing.assert_allclose(
            ours[path], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=path
        )


def differ(x, y):
    x, y = deltas(x), deltas(y)
    return max(np.abs(x[path] - y[path]).max() / np.abs(x[path]).max() for path in x) > 1e-3


def options_for(name, **changes):
    exact = {} if name == "concatenation" else {"rank": FULL}
    return Options(**exact | changes)


# The laws of the table.


def keeps_identity(name, density=0.4):
    a = make(1)
    return not differ(a, merge([a], [1.0], name, options_for(name, density=density)).adapter)


def keeps_undropped(name):
    return keeps_identity(name, 1.0)


def keeps_repeat(name):
    a = make(1)
    return not differ(a, merge([a, a], [0.5, 0.5], name, options_for(name, density=0.4)).adapter)


def keeps_permutation(name):
    count = 2 if name == "slerp" else 3
    adapters, weights = [make(seed, rank=seed + 2) for seed in range(count)], [0.2, 0.5, 0.3]
    options = Options(density=0.4)
    first = merge(adapters, weights[:count], name, options).adapter
    return not any(
        differ(first, merge(*zip(*order, strict=True), name, options).adapter)
        for order in itertools.permutations(zip(adapters, weights[:count], strict=True))
    )


def is_linear(name):
    """Merging a sum of deltas (by concatenation) is the sum of what merges."""
    a, b, c = (make(seed) for seed in range(3))
    options = Options() if name == "concatenation" else options_for(name, density=0.4, rank=None)

    def merged(x):
        return merge([x, c], [0.3, 0.9], name, options).adapter

    whole = merged(merge([a, b], [1.0, 1.0], "concatenation").adapter)
    zero = trees.map_leaves(lambda leaf: leaf.replace(b=0 * leaf.b), a)
    parts = [merged(a), merged(b), merged(zero)]
    return not differ(whole, merge(parts, [1.0, 1.0, -1.0], "concatenation").adapter)


HOLDS = {
    "identity": keeps_identity,
    "undropped": keeps_undropped,
    "repeat": keeps_repeat,
    "permutation": keeps_permutation,
    "linear": is_linear,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("law", LAWS)
def test_a_law_holds_where_it_is_claimed_and_nowhere_else(name, law):
    claimed = METHODS[name].laws
    if law == "undropped" and "identity" in claimed:
        assert keeps_undropped(name)
    elif name == "slerp" and law not in claimed:
        with pytest.raises(UserError, match="slerp"):
            HOLDS[law](name)
    else:
        assert HOLDS[law](name) == (law in claimed)


@pytest.mark.parametrize("name", METHODS)
def test_a_stacked_tree_is_its_layers_one_by_one(name):
    """Seeds, thresholds and ranks go by matrix, and so do weights by layer."""
    adapters = [make(1), make(2, rank=5)]
    options = Options(density=0.4)
    weights = [0.4, {".*": 0.7, "layers/.*": [0.7, 0.2, 0.5]}]
    together = merge(adapters, weights, name, options).adapter
    by_layer = {f"layers_{i}/.*": weight for i, weight in enumerate([0.7, 0.2, 0.5])}
    apart = merge(
        [trees.unstack_layers(adapter) for adapter in adapters],
        [0.4, {".*": 0.7, **by_layer}],
        name,
        options,
    ).adapter
    assert_same(trees.stack_layers(apart), together, 1e-6)


# Plain oracles.


def oracle(adapters, weights, function):
    """`function` of the deltas [A, d_in, d_out] of each matrix alone, in float64."""
    dense = [deltas(adapter) for adapter in adapters]
    merged = {}
    for path in dense[0]:
        stack = SHAPES[path][0]
        merged[path] = np.empty(dense[0][path].shape)
        for index in np.ndindex(stack):
            matrices = np.stack([x[path][index] for x in dense]).astype(np.float64)
            merged[path][index] = function(matrices, np.reshape(weights, (-1, 1, 1)))
    return merged


def trimmed(matrices, density=0.4):
    sizes = np.abs(matrices).reshape(len(matrices), -1)
    count = int(density * sizes.shape[1])
    smallest = np.sort(sizes, axis=1)[:, -count].reshape(-1, 1, 1)
    return np.where(np.abs(matrices) >= smallest, matrices, 0)


def elected(matrices, weights, weighted=True, frequency=False, normalise="weights"):
    votes = matrices * weights if weighted else matrices
    ballots = np.sign(votes) if frequency else votes
    gamma = np.where(ballots.sum(0) >= 0, 1, -1)
    agree = np.sign(votes) == gamma
    total = (weights * matrices * agree).sum(0)
    count = {"weights": (weights * agree).sum(0), "count": agree.sum(0), "none": 1}[normalise]
    return total / np.where(count == 0, 1, count)


WEIGHTS = [0.5, 0.2, 0.9]
THREE = [(1, 3, 4.0), (2, 5, 16.0), (3, 2, 1.0)]


def three():
    """Of different ranks and alphas."""
    return [make(*settings) for settings in THREE]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("linear", lambda x, w: (w * x).sum(0) / w.sum()),
        ("task_arithmetic", lambda x, w: (w * x).sum(0)),
        ("concatenation", lambda x, w: (w * x).sum(0)),
        ("svd", lambda x, w: (w * x).sum(0)),
        ("magnitude_prune", lambda x, w: (w * trimmed(x)).sum(0)),
        ("ties", lambda x, w: elected(trimmed(x), w)),
    ],
)
def test_against_plain_numpy(name, function):
    options = options_for(name, density=0.4)
    ours = merge(three(), WEIGHTS, name, options).adapter
    assert_same(ours, oracle(three(), WEIGHTS, function))


@pytest.mark.parametrize("elect", ["weighted", "unweighted"])
@pytest.mark.parametrize("votes", ["total", "frequency"])
@pytest.mark.parametrize("normalise", ["weights", "count", "none"])
def test_each_option_of_ties(elect, votes, normalise):
    options = options_for("ties", density=0.4, elect=elect, votes=votes, normalise=normalise)
    ours = merge(three(), WEIGHTS, "ties", options).adapter
    settings = (elect == "weighted", votes == "frequency", normalise)
    assert_same(ours, oracle(three(), WEIGHTS, lambda x, w: elected(trimmed(x), w, *settings)))


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.space == "dense"])
def test_rows_are_their_parts(name, monkeypatch):
    """What a method drops, injected, is then summed or elected as its row says."""

    def every_third(matrix, kind, density, *_):
        assert kind == METHODS[name].sparsify and density == 0.4
        return np.where(np.arange(matrix.size).reshape(matrix.shape) % 3 == 0, 2 * matrix, 0)

    monkeypatch.setattr(merging, "sparsify", every_third)
    ours = merge(three(), WEIGHTS, name, options_for(name, density=0.4)).adapter

    def function(x, w):
        row, dropped = (
            METHODS[name],
            np.stack([every_third(m, METHODS[name].sparsify, 0.4) for m in x]),
        )
        if row.consensus == "sign":
            return elected(dropped, w, normalise=row.normalise)
        return (w * dropped).sum(0)

    assert_same(ours, oracle(three(), WEIGHTS, function))


def test_dare_is_right_on_average():
    adapters, weights = [make(seed, paths=("head",)) for seed in (1, 2)], [0.3, 0.7]
    options = Options(density=0.5, rank=7)
    runs = [deltas(merge(adapters, weights, "dare_linear", options, s).adapter) for s in range(200)]
    expected = oracle(adapters, weights, lambda x, w: (w * x).sum(0))
    noise = oracle(adapters, weights, lambda x, w: np.sqrt((w**2 * x**2).sum(0) / 200))
    for path, value in expected.items():
        mean = np.mean([run[path] for run in runs], axis=0)
        assert (np.abs(mean - value) < 5 * noise[path] + 1e-6).all()


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.6), (1.0, 0.0)])
def test_slerp(weights):
    def function(x, w):
        t = w[1].item() / w.sum()
        theta = np.arccos((x[0] * x[1]).sum() / np.linalg.norm(x[0]) / np.linalg.norm(x[1]))
        return (np.sin((1 - t) * theta) * x[0] + np.sin(t * theta) * x[1]) / np.sin(theta)

    adapters = [make(1), make(2, rank=5)]
    ours = merge(adapters, weights, "slerp").adapter
    assert_same(ours, oracle(adapters, weights, function))


def test_slerp_of_parallel_deltas_is_a_straight_line():
    a = make(1)
    twice = trees.map_leaves(lambda leaf: leaf.replace(scale=2 * leaf.scale), a)
    ours = merge([a, twice], [0.75, 0.25], "slerp").adapter
    assert_same(ours, oracle([a], [1.25], lambda x, w: (w * x).sum(0)))


def test_knots_is_ties_in_the_joint_basis():
    """Against the dense decomposition; the signs of its vectors do not matter."""

    def function(x, w):
        u, s, vt = np.linalg.svd(np.concatenate(list(x)), full_matrices=False)
        kept = s > 1e-5 * s[0]
        coordinates = np.stack(np.split((u * s)[:, kept], len(x)))
        return elected(trimmed(coordinates), w) @ vt[kept]

    ours, report = merge(three(), WEIGHTS, "knots_ties", Options(density=0.4))
    assert_same(ours, oracle(three(), WEIGHTS, function), 1e-4)
    assert report["head"].rank == 10 and report["head"].relative_error < 1e-5


def test_concatenation_is_the_sum_on_deltas_and_keeps_the_factors():
    adapters = three()
    ours, report = merge(adapters, WEIGHTS, "concatenation")
    assert_same(ours, merge(adapters, WEIGHTS, "task_arithmetic").adapter, 1e-7)
    assert_same(ours, oracle(adapters, WEIGHTS, lambda x, w: (w * x).sum(0)))
    leaf = ours["layers"]["q"]["kernel"]
    assert leaf.a.shape == (3, 14, 10) and leaf.scale.tolist() == [1.0, 1.0, 1.0]
    bs = [adapter["layers"]["q"]["kernel"].b for adapter in adapters]
    np.testing.assert_array_equal(leaf.b, np.concatenate(bs, axis=1))
    assert all(kernel.relative_error == 0.0 for kernel in report.values())


def test_svd_is_the_truncated_sum():
    ours, report = merge(three(), WEIGHTS, "svd", Options(rank=4))

    def function(x, w):
        u, s, vt = np.linalg.svd((w * x).sum(0))
        return (u[:, :4] * s[:4]) @ vt[:4]

    assert_same(ours, oracle(three(), WEIGHTS, function), 1e-4)
    whole = oracle(three(), WEIGHTS, lambda x, w: (w * x).sum(0))
    for path, kernel in report.items():
        rest = np.linalg.norm(whole[path] - deltas(ours)[path])
        norm = np.linalg.norm(whole[path])
        np.testing.assert_allclose((kernel.norm, kernel.relative_error), (norm, rest / norm), 1e-4)
        assert kernel.rank == 4 and kernel.absent == ()
    assert merge(three(), WEIGHTS, "svd").report["head"].rank == 5


# Adapters that differ.


@pytest.mark.parametrize("name", [name for name in METHODS if name != "slerp"])
def test_an_absent_kernel_is_a_delta_of_zero(name):
    a, b, part = make(1), make(2), make(3, paths=("layers/q/kernel",))
    zeros = trees.map_leaves(lambda leaf: leaf.replace(b=0 * leaf.b), make(4))
    filled = trees.unflatten(trees.flatten(zeros) | trees.flatten(part))
    options = options_for(name, density=0.4)
    ours, report = merge([a, part, b], WEIGHTS, name, options)
    assert_same(ours, merge([a, filled, b], WEIGHTS, name, options).adapter, 1e-4)
    assert report["head"].absent == (1,) and report["head"].norms[1] == 0.0
    assert report["layers/q/kernel"].absent == ()


def test_rslora_and_half_precision():
    """Only the scale tells an rsLoRA adapter; bfloat16 factors are taken as they are."""
    a = trees.map_leaves(lambda leaf: leaf.replace(scale=leaf.scale * np.float32(3**0.5)), make(1))
    half = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), a)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float32), half)
    for adapter, expected in ((a, a), (half, exact)):
        merged = merge([adapter], [1.0], "linear").adapter
        assert_same(merged, expected, 1e-6)
        assert {x.dtype for x in jax.tree.leaves(merged)} == {np.dtype(np.float32)}


def test_the_report_has_the_norms():
    adapters = three()
    report = merge(adapters, WEIGHTS, "ties", Options(density=0.4, rank=2)).report
    for number, adapter in enumerate(adapters):
        for path, delta in deltas(adapter).items():
            np.testing.assert_allclose(report[path].norms[number], np.linalg.norm(delta), 1e-5)
    whole = oracle(adapters, WEIGHTS, lambda x, w: elected(trimmed(x), w))
    ours = deltas(merge(adapters, WEIGHTS, "ties", Options(density=0.4, rank=2)).adapter)
    rest, norm = (
        np.sqrt(sum(np.sum(x**2) for x in values))
        for values in ([whole[p] - ours[p] for p in whole], whole.values())
    )
    np.testing.assert_allclose(overall_error(report), rest / norm, rtol=1e-4)
    assert dataclasses.asdict(report["head"])["rank"] == 2


def test_every_matrix_is_told_and_inputs_stay_as_they_are():
    told, adapters = [], three()
    copies = jax.tree.map(np.copy, adapters)
    planned = plan(adapters, WEIGHTS, "ties")
    assert set(planned.shapes) == set(SHAPES)
    for path in planned.shapes:
        planned.kernel(path, told.append)
    assert len(told) == 3 + 6 + 1
    assert {"head", "layers_2/q/kernel", "layers_1/up/kernel[1]"} <= set(told)
    jax.tree.map(np.testing.assert_array_equal, adapters, copies)


def test_seeds():
    adapters = three()
    runs = [merge(adapters, WEIGHTS, "dare_ties", seed=seed).adapter for seed in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[1])
    assert differ(runs[0], runs[2])
    twins = trees.map_leaves(
        lambda leaf: leaf.replace(a=leaf.a[:1].repeat(3, 0)),
        {"layers": {"q": adapters[0]["layers"]["q"]}},
    )
    twins = trees.map_leaves(
        lambda leaf: leaf.replace(b=leaf.b[:1].repeat(3, 0), scale=np.ones(3, np.float32)), twins
    )
    layers = deltas(merge([twins], [1.0], "dare_linear", Options(rank=11)).adapter)
    assert not np.allclose(*layers["layers/q/kernel"][:2])


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1.0, [1.0, 2.0, 3.0]], {"q": [1, 2, 3], "up": [1, 2, 3]}),
        ([1.0, {".*": 5.0, ".*/up/.*": [1.0, 2.0, 3.0]}], {"q": [5] * 3, "up": [1, 2, 3]}),
        ([1.0, {".*/up/.*": 0.5, ".*": 5.0}], {"q": [5] * 3, "up": [5] * 3}),
    ],
)
def test_weights_by_layer_and_kernel(weights, expected):
    paths = ("layers/q/kernel", "layers/up/kernel")
    a, b = make(1, paths=paths), make(2, paths=paths)
    ours = deltas(merge([a, b], weights, "task_arithmetic").adapter)
    for path in paths:
        shares = np.asarray(expected[path.split("/")[1]], np.float32)
        shares = shares.reshape(-1, *[1] * (deltas(b)[path].ndim - 1))
        np.testing.assert_allclose(
            ours[path], deltas(a)[path] + shares * deltas(b)[path], atol=1e-4
        )


# Refusals.


@pytest.mark.parametrize(
    ("weights", "method", "options", "message"),
    [
        ([1.0, 1.0], "tie", {}, "unknown method 'tie'.*ties"),
        ([1.0], "ties", {}, "1 weights for 2 adapters"),
        ([1.0, float("nan")], "ties", {}, "weight nan: weight of adapter 1"),
        ([1.0, [1.0, 2.0]], "linear", {}, "2 weights by layer, the kernel has no layers"),
        ([1.0, {".*": 1.0, "layers/.*": [1.0, 2.0]}], "linear", {}, "2 weights.* has 3 layers"),
        ([1.0, {"head": 1.0}], "linear", {}, "no weight: weight of adapter 1 for kernel 'layers"),
        ([1.0, {".*": 1.0, "heads": 1.0}], "linear", {}, "'heads' matches no kernel.*head"),
        ([1.0, -1.0], "linear", {}, "add up to 0.0.*kernel 'head'"),
        ([1.0, -0.5], "ties", {}, "weight -0.5: kernel 'head'"),
        ([1.0, -0.5], "slerp", {}, "weight -0.5"),
        ([1.0, 1.0], "concatenation", {"rank": 3}, "rank 3.*svd"),
        ([1.0, 1.0], "ties", {"density": 0.0}, "density 0.0"),
        ([1.0, 1.0], "ties", {"rank": 0}, "rank 0"),
        ([1.0, 1.0], "ties", {"elect": "loud"}, "elect 'loud'.*unweighted"),
        ([1.0, 1.0], "ties", {"votes": "most"}, "votes 'most'.*frequency"),
        ([1.0, 1.0], "ties", {"normalise": "sum"}, "normalise 'sum'.*count"),
    ],
)
def test_what_cannot_be_merged_is_refused(weights, method, options, message):
    with pytest.raises(UserError, match=message):
        merge([make(1), make(2)], weights, method, Options(**options))


def test_slerp_refuses_what_has_no_direction():
    a, part = make(1), make(2, paths=("head",))
    with pytest.raises(UserError, match=r"adapter 1 lacks kernel 'layers/q/kernel'.*slerp"):
        merge([a, part], [0.5, 0.5], "slerp")
    zero = make(2)
    zero["head"] = zero["head"].replace(b=np.zeros_like(zero["head"].b))
    with pytest.raises(UserError, match=r"adapter 1 is zero.*head.*slerp"):
        merge([a, zero], [0.5, 0.5], "slerp")
    with pytest.raises(UserError, match="3 adapters"):
        merge([a, a, a], [0.5, 0.5, 0.5], "slerp")


def test_bad_adapters_are_refused_before_anything_is_merged():
    bad = make(2)
    bad["layers"]["up"]["kernel"].b[2, 1, 0, 0] = np.inf
    with pytest.raises(UserError, match=r"infinity.*layers/up/kernel.*adapter 1"):
        plan([make(1), bad], [1.0, 1.0], "linear")


@pytest.mark.parametrize("name", ["concatenation", "svd", "ties"])
def test_a_plan_says_what_comes_out(name):
    planned = plan(three(), WEIGHTS, name)
    for path in planned.shapes:
        wanted, (made, _) = planned.result(path), planned.kernel(path)
        for field in ("a", "b", "scale"):
            announced, array = getattr(wanted, field), getattr(made, field)
            assert (announced.shape, announced.dtype) == (array.shape, array.dtype)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("linear", {"density": 0.2, "elect": "unweighted"}, ["density", "elect"]),
        ("concatenation", {"rank": 3}, ["rank"]),
        ("slerp", {"normalise": "count", "rank": 3}, ["normalise"]),
        ("ties", {"gamma": 0.1, "density": 0.2, "votes": "frequency"}, ["gamma"]),
        ("breadcrumbs", {"gamma": 0.1, "epsilon": 0.2, "votes": "frequency"}, ["epsilon", "votes"]),
        ("della", {"epsilon": 0.2, "rescale": "none"}, []),
        ("linear", {"density": 0.5}, []),
    ],
)
def test_options_that_a_method_does_not_read(name, changes, expected):
    assert unread(name, Options(**changes)) == expected


@pytest.mark.parametrize("name", METHODS)
def test_an_option_that_is_not_read_changes_nothing(name):
    """The table of `unread` against the methods themselves."""
    changed = {"density": 0.3, "gamma": 0.2, "epsilon": 0.3, "rescale": "l1"}
    changed |= {"elect": "unweighted", "votes": "frequency", "normalise": "count"}
    adapters, weights = (three()[:2], [0.2, 0.7])
    plain = merge(adapters, weights, name, options_for(name)).adapter
    for option, value in changed.items():
        options = options_for(name, **{option: value})
        if unread(name, options):
            ours = merge(adapters, weights, name, options).adapter
            jax.tree.map(np.testing.assert_array_equal, ours, plain)


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.space == "dense"])
def test_one_matrix_for_each_adapter_and_two_more_are_held(name):
    """Beside the result, which is of low rank."""
    rng, side, count = np.random.default_rng(0), 1500, 3
    leaves = [
        LowRank(
            a=rng.standard_normal((2, side, 2), np.float32),
            b=rng.standard_normal((2, 2, side), np.float32),
            scale=np.ones(2, np.float32),
        )
        for _ in range(count)
    ]
    planned = plan([{"layers": {"q": leaf}} for leaf in leaves], [1.0] * count, name)
    tracemalloc.start()
    try:
        planned.kernel("layers/q")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count * side**2 * 4 < peak < (count + 2) * side**2 * 4
