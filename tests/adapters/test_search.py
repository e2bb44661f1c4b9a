import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.lowrank import shapes_of
from ecomjax.adapters.merge import merge
from ecomjax.adapters.rules import LoraRule
from ecomjax.adapters.search import Kind, search, weighted
from ecomjax.errors import UserError
from ecomjax.training.losses import causal_lm
from ecomjax.training.step import make_loss_pass
from ecomjax.typing import Batch, DoRA

KINDS = Kind.__args__


@pytest.fixture(scope="module")
def adapters(make_adapter):
    """Two that differ in rank, alpha and kernels."""
    others = (LoraRule(".*/q/kernel", rank=5, alpha=2.0), LoraRule(".*/(up|down)/kernel", rank=2))
    return [numpy(make_adapter(1)), numpy(make_adapter(2, others))]


def numpy(adapter):
    return jax.tree.map(np.asarray, adapter)


def assert_same_deltas(ours, expected, params):
    ours, expected = (trees.flatten(lora.delta(params, x)) for x in (ours, expected))
    assert ours.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(ours[path], value, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("weights", [[0.7, -0.3], [[0.7, 0.1], [-0.3, 1.2]], [0.0, 1.0]])
@pytest.mark.parametrize("method", ["task_arithmetic", "concatenation"])
def test_weighted_is_the_merge(tiny, adapters, weights, method):
    """Traced with the adapters or not; weights by layer too."""
    array = np.array(weights)
    if array.ndim > 1:
        adapters = [{"layers": adapter["layers"]} for adapter in adapters]
    expected = merge(adapters, weights, method).adapter
    for ours in (weighted(adapters, array), jax.jit(weighted)(adapters, array)):
        assert_same_deltas(ours, expected, tiny.params)
        shapes_of([numpy(ours)])
        for leaf in trees.flatten(ours).values():
            assert leaf.a.dtype == leaf.b.dtype == leaf.scale.dtype == jnp.float32
            assert (leaf.scale == 1).all() and leaf.dropout == 0


def test_the_gradient_by_weights_is_that_of_the_deltas(tiny, adapters):
    """d <G, Σ w_i Δ_i> / d w_i = <G, Δ_i> for any G, layer by layer."""
    rng = np.random.default_rng(0)
    dense = [trees.flatten(lora.delta(tiny.params, adapter)) for adapter in adapters]
    g = {path: rng.standard_normal(x.shape).astype(np.float32) for path, x in dense[0].items()}

    def of(weights):
        merged = trees.flatten(lora.delta(tiny.params, weighted(adapters, weights)))
        return sum(jnp.sum(g[path] * merged[path]) for path in merged)

    stacked = [path for path in g if path.startswith("layers/")]
    by_layer = np.array(
        [
            sum((g[p] * np.asarray(d[p])).reshape(2, -1).sum(1) for p in stacked if p in d)
            for d in dense
        ]
    )
    adapters = [{"layers": adapter["layers"]} for adapter in adapters]
    ours = jax.jit(jax.grad(of))(jnp.ones((2, 2)))
    np.testing.assert_allclose(ours, by_layer, rtol=1e-4, atol=1e-4)
    ours = jax.jit(jax.grad(of))(jnp.ones(2))
    np.testing.assert_allclose(ours, by_layer.sum(1), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_weighted_is_refused(adapters):
    with pytest.raises(UserError, match="3 weights by layer, the kernel has 2 layers"):
        weighted(adapters, np.ones((2, 3)))
    path, leaf = next(iter(trees.flatten(adapters[0]).items()))
    flat = {path: leaf.replace(a=leaf.a[..., :-1, :])}
    with pytest.raises(UserError, match=f"'{path}' of adapter 1"):
        weighted([adapters[0], trees.unflatten(flat)], np.ones(2))
    flat = {path: DoRA(leaf.a, leaf.b, leaf.scale, leaf.b[..., 0, :])}
    with pytest.raises(UserError, match="DoRA is no plain LoRA"):
        weighted([trees.unflatten(flat)], np.ones(1))


@pytest.fixture(scope="module")
def mixture_loss(tiny, adapters, tokens):
    """Jitted (loss, gradient) of weights: cross-entropy against what 0.7 a - 0.3 b says.

    It is the loss pass of training, over a row for each token of the vocabulary: the target of
    all its slots, weighted by how likely the mixture finds it.
    """
    logits = tiny.logits(tokens[:1], lora=weighted(adapters, np.array([0.7, -0.3])))
    vocabulary, slots = logits.shape[-1], tokens.shape[1]

    def rows(row):
        return jnp.asarray(np.broadcast_to(row, (1, vocabulary, slots)).astype(np.int32))

    batch = Batch(
        tokens=rows(tokens[0]),
        positions=rows(np.arange(slots)),
        segment_ids=rows(1),
        targets=rows(np.arange(vocabulary)[:, None]),
        weights=jax.nn.softmax(jnp.asarray(logits)).swapaxes(1, 2),
    )
    loss_pass = make_loss_pass(causal_lm(tiny.model))

    def loss(weights, adapters, params):
        trained, fixed = lora.split(weighted(adapters, weights))
        total, weight = loss_pass(trained, {"params": params, "fixed": fixed}, batch)
        return total / weight

    compiled = jax.jit(jax.value_and_grad(loss))
    return lambda weights: compiled(weights, adapters, tiny.params)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_of_a_known_mixture_are_recovered(mixture_loss, kind):
    loss = mixture_loss if kind == "gradient" else lambda weights: mixture_loss(weights)[0]
    found = search(loss, 2, kind, budget=60, penalty=0.0)
    np.testing.assert_allclose(found.weights, [0.7, -0.3], atol=0.02)
    assert found.loss == min(found.history) < found.history[0] and found.evaluations < 60
    again = search(loss, 2, kind, budget=60, penalty=0.0)
    np.testing.assert_array_equal(found.weights, again.weights)
    assert found.history == again.history


CENTRES = np.array([0.9, -2.5, 0.03, 2.5, -0.3])
CURVATURES = np.array([1.0, 0.5, 2.0, 1.0, 4.0])


def quadratic(kind, shape=(5,)):
    """Σ curvature (w - centre)^2 / 2 in numpy, of the first few."""
    size = np.prod(shape)
    centres, curvatures = (x[:size].reshape(shape) for x in (CENTRES, CURVATURES))

    def loss(weights):
        assert weights.shape == shape and weights.dtype == np.float64
        value = 0.5 * float((curvatures * np.square(weights - centres)).sum())
        return (value, curvatures * (weights - centres)) if kind == "gradient" else value

    return loss


def least(penalty, size=5):
    """Where that loss with a penalty is least: the soft threshold, cut at the bound."""
    centres, thresholds = CENTRES[:size], penalty / CURVATURES[:size]
    return np.sign(centres) * np.clip(np.abs(centres) - thresholds, 0.0, 1.5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_draws_weights_to_zero_and_the_bound_holds_them(kind):
    tried, plain = [], quadratic("gradient_free")

    def loss(weights):
        tried.append(weights)
        return quadratic(kind)(weights)

    found = search(loss, 5, kind, budget=300, penalty=0.1, bound=1.5)
    np.testing.assert_allclose(found.weights, least(0.1), atol=0.02)
    assert np.abs(tried).max() <= 1.5 and list(found.weights[[1, 3]]) == [-1.5, 1.5]
    assert kind == "gradient_free" or found.weights[2] == 0.0
    assert found.loss == plain(found.weights)
    objectives = [plain(weights) + 0.1 * np.abs(weights).sum() for weights in tried]
    np.testing.assert_allclose(found.history, objectives)
    assert np.argmin(objectives) == [(x == found.weights).all() for x in tried].index(True)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_by_layer(kind):
    """The penalty is the mean over layers, that is half of it for each of two."""
    found = search(quadratic(kind, (2, 2)), 2, kind, budget=300, layers=2, penalty=0.1)
    np.testing.assert_allclose(found.weights, least(0.05, 4).reshape(2, 2), atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 3, 7])
def test_the_budget_is_kept_and_progress_told(kind, budget):
    told = []
    found = search(
        quadratic(kind), 5, kind, budget=budget, on_evaluation=lambda *state: told.append(state)
    )
    assert found.evaluations == budget and [count for count, _ in told] == [*range(1, budget + 1)]
    np.testing.assert_allclose([best for _, best in told], np.minimum.accumulate(found.history))
    assert budget > 1 or not found.weights.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_is_an_error(kind):
    def loss(weights):
        value = float("nan") if weights.any() else 1.0
        return (value, np.ones(2)) if kind == "gradient" else value

    with pytest.raises(UserError, match=r"loss nan.* is not finite"):
        search(loss, 2, kind, budget=9)
    if kind == "gradient":
        with pytest.raises(UserError, match="gradient, is not finite"):
            search(lambda weights: (1.0, np.array([0.0, np.inf])), 2, kind, budget=9)


@pytest.mark.parametrize(
    ("name", "value"),
    [("adapters", 0), ("layers", 0), ("budget", 0), ("penalty", -1.0), ("bound", 0.0)],
)
def test_bad_numbers_are_refused(name, value):
    given = {"adapters": 5, "kind": "gradient", "budget": 9, name: value}
    with pytest.raises(UserError, match=f"{name} {value}"):
        search(quadratic("gradient"), **given)
