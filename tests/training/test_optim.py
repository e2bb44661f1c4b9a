import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax.training import optim
from ecomjax.typing import LowRank

PEAK = 0.4


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_rises_to_the_peak_from_the_first_step(kind):
    rate = optim.schedule(kind, PEAK, 0.1, 100)
    rising = [float(rate(step)) for step in range(11)]
    np.testing.assert_allclose(rising, PEAK * np.arange(1, 12) / 11, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "middle", "end"), [("cosine", 0.5, 0), ("linear", 0.5, 0), ("constant", 1, 1)]
)
def test_decay_ends_with_the_run(kind, middle, end):
    rate = optim.schedule(kind, PEAK, 0.1, 100)
    assert float(rate(55)) == pytest.approx(middle * PEAK, rel=1e-5)
    assert float(rate(100)) == pytest.approx(end * PEAK, abs=1e-7)
    assert float(rate(99)) > 0


def test_cosine_is_above_linear_first_and_below_it_later():
    cosine, linear = (optim.schedule(kind, PEAK, 0.0, 100) for kind in ("cosine", "linear"))
    assert float(cosine(25)) == pytest.approx(PEAK * (1 + np.cos(np.pi / 4)) / 2, rel=1e-5)
    assert float(cosine(25)) > float(linear(25))
    assert float(cosine(75)) < float(linear(75))


def test_warm_up_of_nothing_and_of_less_than_a_step():
    assert float(optim.schedule("cosine", PEAK, 0.0, 100)(0)) == pytest.approx(PEAK)
    rate = optim.schedule("linear", PEAK, 0.001, 100)
    assert float(rate(0)) == pytest.approx(PEAK / 2)
    assert float(rate(1)) == pytest.approx(PEAK)


def test_a_run_of_one_step_trains():
    assert float(optim.schedule("cosine", PEAK, 0.03, 1)(0)) > 0


def test_adamw_on_clipped_gradients(loose_promotion):
    """Against the equations in numpy; the first gradient of the three is over the norm."""
    options = {"weight_decay": 0.1, "clip_norm": 2.0, "beta1": 0.8, "beta2": 0.95}
    optimizer = optim.adamw(lambda step: 0.3 / (step + 1), **options)
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal(3), "b": rng.standard_normal((2, 2))}
    params = {k: jnp.asarray(w, jnp.float32) for k, w in weights.items()}
    state = optimizer.init(params)
    first = {k: np.zeros_like(w) for k, w in weights.items()}
    second = {k: np.zeros_like(w) for k, w in weights.items()}
    for step, size in enumerate((9.0, 0.2, 0.5)):
        gradients = {k: size * rng.standard_normal(w.shape) for k, w in weights.items()}
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        assert (norm > 2.0) == (step == 0)
        given = {k: jnp.asarray(g, jnp.float32) for k, g in gradients.items()}
        updates, state = optimizer.update(given, state, params)
        for k, w in weights.items():
            g = gradients[k] * min(1.0, 2.0 / norm)
            first[k] = 0.8 * first[k] + 0.2 * g
            second[k] = 0.95 * second[k] + 0.05 * g**2
            moment = first[k] / (1 - 0.8 ** (step + 1))
            scale = np.sqrt(second[k] / (1 - 0.95 ** (step + 1))) + 1e-8
            update = -0.3 / (step + 1) * (moment / scale + 0.1 * w)
            np.testing.assert_allclose(updates[k], update, rtol=1e-4, atol=1e-6)
            weights[k] = w + update
        params = {k: jnp.asarray(w, jnp.float32) for k, w in weights.items()}


def test_b_of_adapters_learns_faster(loose_promotion):
    """LoRA+: by the ratio exactly, decay included, and nothing else does."""
    options = {"weight_decay": 0.1, "clip_norm": 1.0, "beta1": 0.9, "beta2": 0.99}
    leaf = LowRank(a=jnp.full((3, 2), 0.5), b=jnp.full((2, 4), 0.5), scale=None)
    params = {"b": {"kernel": leaf}, "head": {"b": jnp.ones(3)}}
    gradients = jax.tree.map(lambda x: 0.1 * x, params)
    updates = []
    for ratio in (1.0, 16.0):
        optimizer = optim.adamw(lambda step: 0.3, **options, loraplus_ratio=ratio)
        updates.append(optimizer.update(gradients, optimizer.init(params), params)[0])
    plain, faster = updates
    np.testing.assert_array_equal(faster["head"]["b"], plain["head"]["b"])
    np.testing.assert_array_equal(faster["b"]["kernel"].a, plain["b"]["kernel"].a)
    np.testing.assert_allclose(faster["b"]["kernel"].b, 16.0 * plain["b"]["kernel"].b, rtol=1e-6)
