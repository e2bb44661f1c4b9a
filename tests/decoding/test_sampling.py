import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax.decoding import sampling
from ecomjax.decoding.generate import GenerateOptions
from ecomjax.decoding.sampling import Sampling
from ecomjax.errors import UserError

DRAWS = 20_000
sample = jax.jit(sampling.sample, static_argnums=2)
LOGITS = np.random.default_rng(0).permutation(np.linspace(-1.5, 2.0, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def keys():
    return jax.random.split(jax.random.key(0), DRAWS)


def frequencies(keys, temperature, top_p):
    drawn = sample(jnp.tile(LOGITS, (DRAWS, 1)), keys, Sampling(temperature, top_p=top_p))
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
    np.testing.assert_array_equal(
        sample(logits, keys[:50], Sampling(0.0, 3, 0.3, 0.9)), logits.argmax(axis=-1)
    )


def test_a_row_draws_whatever_its_neighbours_draw(keys):
    logits, other = np.random.default_rng(1).standard_normal((2, 50, 12), np.float32)
    drawn = np.asarray(sample(logits, keys[:50], Sampling(1.0, top_p=0.9)))
    logits[1::2] = other[1::2]
    changed = np.asarray(sample(logits, keys[:50], Sampling(1.0, top_p=0.9)))
    np.testing.assert_array_equal(changed[::2], drawn[::2])
    assert (changed[1::2] != drawn[1::2]).any()


OPTIONS = {
    "top_k": Sampling(0.7, top_k=5),
    "top_k above V": Sampling(0.7, top_k=99),
    "min_p": Sampling(1.3, min_p=0.2),
    "penalty": Sampling(1.0, repetition_penalty=1.8),
    "all": Sampling(1.7, 15, 0.8, 0.1, 2.5),
    "encouragement": Sampling(0.5, 4, 0.9, 0.3, 0.6),
}


def processed(options, logits, tokens):
    """What the processors of transformers make of logits after these tokens."""
    import torch
    from transformers.generation import logits_process as processors

    scores, ids = torch.tensor(logits), torch.tensor(tokens)
    for wanted, make in (
        (
            options.repetition_penalty != 1.0,
            lambda: processors.RepetitionPenaltyLogitsProcessor(options.repetition_penalty),
        ),
        (True, lambda: processors.TemperatureLogitsWarper(options.temperature)),
        (options.top_k, lambda: processors.TopKLogitsWarper(options.top_k)),
        (options.top_p < 1.0, lambda: processors.TopPLogitsWarper(options.top_p)),
        (options.min_p, lambda: processors.MinPLogitsWarper(options.min_p)),
    ):
        scores = make()(ids, scores) if wanted else scores
    return scores.numpy()


@pytest.mark.parametrize("name", OPTIONS)
def test_the_distribution_is_that_of_transformers(name):
    """On logits of both signs, tokens seen once, twice and not at all."""
    options, rng = OPTIONS[name], np.random.default_rng(2)
    logits = 2.0 * rng.standard_normal((40, 30), np.float32)
    tokens = rng.integers(0, 30, (40, 12))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    found = np.asarray(sampling.adjust(jnp.asarray(logits), options, jnp.asarray(seen)))
    expected = processed(options, logits, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.abs(expected - logits).max() > 0.1


def test_greedy_decoding_knows_the_penalty(keys):
    options = Sampling(0.0, repetition_penalty=1.5)
    logits = jnp.array([[3.0, 2.5, -1.0], [-1.0, -1.2, -3.0]], jnp.float32)
    seen = jnp.array([[True, False, True], [True, False, False]])
    np.testing.assert_array_equal(sample(logits, keys[:2], options, seen), [1, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature -0\.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, r"top_p 0\.0"),
        ({"top_p": 1.1}, r"top_p 1\.1"),
        ({"top_k": -1}, "top_k -1"),
        ({"min_p": 1.5}, r"min_p 1\.5"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty 0\.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)
    with pytest.raises(UserError, match=message):
        GenerateOptions(4, end=0, **options)
