import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax.decoding import sampling
from ecomjax.errors import UserError

DRAWS = 20_000
sample = jax.jit(sampling.sample, static_argnums=(2, 3))
LOGITS = np.random.default_rng(0).permutation(np.linspace(-1.5, 2.0, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(0), DRAWS)


def frequencies(keys, temperature, top_p):
    drawn = sample(jnp.tile(LOGITS, (DRAWS, 1)), keys, temperature, top_p)
    return np.bincount(drawn, minlength=len(LOGITS)) / DRAWS


def nucleus(temperature, top_p):
    """Probabilities when the most likely tokens are taken one by one until they sum to top_p."""
    probabilities = np.exp(LOGITS.astype(np.float64) / temperature)
    probabilities /= probabilities.sum()
    kept, mass = np.zeros_like(probabilities), 0.0
    for token in np.argsort(-probabilities):
        if mass < top_p:
            kept[token] = probabilities[token]
            mass += probabilities[token]
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (2.0, 0.8), (1.0, 0.5), (1.0, 0.01)]
)
def test_draws_follow_the_nucleus(keys, temperature, top_p):
    expected, found = nucleus(temperature, top_p), frequencies(keys, temperature, top_p)
    assert set(np.flatnonzero(found)) == set(np.flatnonzero(expected))
    assert np.abs(found - expected).max() < 0.015


def test_temperature_zero_is_greedy(keys):
    logits = np.random.default_rng(1).standard_normal((50, 12), np.float32)
    np.testing.assert_array_equal(sample(logits, keys[:50], 0.0, 0.3), logits.argmax(axis=-1))


def test_a_row_draws_whatever_its_neighbours_draw(keys):
    logits, other = np.random.default_rng(1).standard_normal((2, 50, 12), np.float32)
    drawn = np.asarray(sample(logits, keys[:50], 1.0, 0.9))
    logits[1::2] = other[1::2]
    changed = np.asarray(sample(logits, keys[:50], 1.0, 0.9))
    np.testing.assert_array_equal(changed[::2], drawn[::2])
    assert (changed[1::2] != drawn[1::2]).any()


@pytest.mark.parametrize("options", [(-0.1, 1.0), (1.0, 0.0), (1.0, 1.1)])
def test_options_out_of_range_are_refused(options):
    sampling.check(0.0, 1.0)
    with pytest.raises(UserError, match=r"(temperature -0\.1|top_p (0|1\.1))"):
        sampling.check(*options)
