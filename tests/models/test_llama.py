import collections
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax.models.stack import REMAT_POLICIES
from ecomjax.typing import LowRank

RNG = np.random.default_rng(0)
B, T = 3, 14


@pytest.fixture(scope="module")
def tokens():
    return RNG.integers(0, 61, (B, T)).astype(np.int32)


def assert_close(ours, expected, tolerance=1e-5):
    """Largest difference against the largest value, which is how logits are compared."""
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


def count_primitives(jaxpr, counts=None):
    """How often each primitive occurs, inner programs included."""
    counts = collections.Counter() if counts is None else counts
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            count_primitives(inner, counts)
    return counts


def test_f36_scan_is_the_unrolled_model(make_llama, tokens):
    assert_close(make_llama(scan=False).logits(tokens), make_llama().logits(tokens), 1e-6)


def loss_of(model, tokens):
    """A scalar to which every logit of the model contributes differently."""
    weights = np.random.default_rng(1).standard_normal((*tokens.shape, 61), np.float32)
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

    def loss(params):
        variables = {"params": params}
        hidden, _ = model.apply(variables, tokens, positions, jnp.ones_like(tokens))
        return (model.apply(variables, hidden, method="logits") * weights).mean()

    return loss


@pytest.mark.parametrize("scan", [True, False])
def test_remat_recomputes_what_it_says(make_llama, tokens, scan):
    """Full recomputes matrix products too, dots what lies between them alone, none nothing."""
    products, activations = {}, {}
    for remat in ("none", "dots", "full"):
        tiny = make_llama(remat=remat, scan=scan)
        grad = jax.make_jaxpr(jax.grad(loss_of(tiny.model, tokens)))(tiny.params)
        counts = count_primitives(grad.jaxpr)
        products[remat], activations[remat] = counts["dot_general"], counts["logistic"]
    assert products["none"] == products["dots"] < products["full"]
    assert activations["none"] < activations["dots"] == activations["full"]


def test_f36_remat_changes_no_number(make_llama, tokens):
    def value_and_grad(remat):
        tiny = make_llama(remat=remat)
        return jax.jit(jax.value_and_grad(loss_of(tiny.model, tokens)))(tiny.params)

    expected, expected_grads = value_and_grad("none")
    for remat in REMAT_POLICIES:
        value, grads = value_and_grad(remat)
        assert float(value) == pytest.approx(float(expected), rel=1e-6)
        jax.tree.map(assert_close, grads, expected_grads)


@functools.partial(jax.jit, static_argnums=0)
def extend(model, params, tokens, positions, segments, cache, prefix=None):
    """Logits of the slots, and the cache with them filled."""
    hidden, cache = model.apply({"params": params}, tokens, positions, segments, cache, prefix)
    return model.apply({"params": params}, hidden, method="logits"), cache


@pytest.mark.parametrize("scan", [True, False])
def test_step_by_step_is_the_full_forward(make_llama, tokens, scan):
    tiny = make_llama(scan=scan)
    cache = tiny.model.new_cache(B, T + 3)
    steps = []
    for t in range(T):
        position = np.full((B, 1), t, np.int32)
        out = extend(
            tiny.model, tiny.params, tokens[:, t : t + 1], position, np.ones_like(position), cache
        )
        steps.append(out[0])
        cache = out[1]
    assert int(cache.length) == T
    assert_close(np.concatenate(steps, axis=1), make_llama().logits(tokens))


def test_prefill_and_steps_are_the_full_forward(make_llama, tokens):
    """Prompts of 9, 4 and 1 tokens, padded on the right to 9, go on for 5 steps."""
    tiny, lengths, slots = make_llama(), np.array([9, 4, 1]), 9
    expected = tiny.logits(tokens)
    positions = np.broadcast_to(np.arange(slots, dtype=np.int32), (B, slots))
    segments = (positions < lengths[:, None]).astype(np.int32)
    cache = tiny.model.new_cache(B, slots + 5)
    logits, cache = extend(tiny.model, tiny.params, tokens[:, :slots], positions, segments, cache)
    for row, length in enumerate(lengths):
        assert_close(logits[row, :length], expected[row, :length])
    for step in range(5):
        at = (lengths + step)[:, None].astype(np.int32)
        fed = np.take_along_axis(tokens, at, axis=1)
        logits, cache = extend(tiny.model, tiny.params, fed, at, np.ones_like(at), cache)
        assert_close(logits[:, 0], np.take_along_axis(expected, at[..., None], axis=1)[:, 0])


@pytest.mark.parametrize("scan", [True, False])
def test_a_prefix_stands_before_every_row(make_llama, tokens, scan):
    """Five tokens filled once, then rows of their own, with and without a cache."""
    tiny, opened = make_llama(scan=scan), tokens.copy()
    opened[:, :5] = tokens[0, :5]
    expected = make_llama().logits(opened)[:, 5:]
    first = np.arange(7, dtype=np.int32)[None]
    shared = np.where(first < 5, -1, 0).astype(np.int32)
    empty = tiny.model.new_cache(1, 7)
    _, prefix = extend(tiny.model, tiny.params, opened[:1, :7], first, shared, empty)
    positions = np.broadcast_to(np.arange(5, T, dtype=np.int32), (B, T - 5))
    rest = (opened[:, 5:], positions, np.ones_like(positions))
    for cache in (None, tiny.model.new_cache(B, T)):
        logits, _ = extend(tiny.model, tiny.params, *rest, cache, prefix)
        assert_close(logits, expected)


def test_f35_padding_changes_nothing(make_llama, tokens):
    """Whatever stands in padding slots, on the right, on the left or on both sides."""
    tiny, length, noise = make_llama(), 8, RNG.integers(0, 61, (B, T)).astype(np.int32)
    expected = tiny.logits(tokens)[:, :length]
    for left in (0, 2, T - length):
        inside = np.arange(T) - left
        segments = np.broadcast_to((inside >= 0) & (inside < length), (B, T)).astype(np.int32)
        positions = np.where(segments, inside, 5).astype(np.int32)
        padded = noise.copy()
        padded[:, left : left + length] = tokens[:, :length]
        logits = tiny.logits(padded, positions, segments)
        assert_close(logits[:, left : left + length], expected)
        assert np.isfinite(logits).all()


def test_packed_sequences_are_separate_ones(make_llama, tokens):
    """Three sequences in one row, beside a row that only one of them fills."""
    tiny, lengths = make_llama(), (5, 3, 4)
    expected = tiny.logits(tokens)
    row = np.concatenate([tokens[i, :n] for i, n in enumerate(lengths)] + [[7, 7]])
    positions = np.concatenate([np.arange(n) for n in (*lengths, 2)])
    segments = np.repeat([1, 2, 3, 0], (*lengths, 2))
    batch = [np.stack([x] * B).astype(np.int32) for x in (row, positions, segments)]
    logits, start = tiny.logits(*batch), 0
    for i, n in enumerate(lengths):
        assert_close(logits[0, start : start + n], expected[i, :n])
        start += n


def test_shared_prefix_opens_every_sequence(make_llama, tokens):
    """Two sequences with 4 tokens in common, held once, are the two sequences alone."""
    tiny, alone = make_llama(), tokens.copy()
    alone[:, :4] = tokens[0, :4]
    expected = tiny.logits(alone)
    row = np.concatenate([alone[0, :10], alone[1, 4:8]])
    positions = np.concatenate([np.arange(10), np.arange(4, 8)])
    segments = np.repeat([-1, 1, 2], (4, 6, 4))
    batch = [np.stack([x] * B).astype(np.int32) for x in (row, positions, segments)]
    logits = tiny.logits(*batch)[0]
    assert_close(logits[:10], expected[0, :10])
    assert_close(logits[10:], expected[1, 4:8])


def test_only_the_past_has_a_gradient(make_llama):
    """The gradient of each slot's logits by the embedding of every token, one token a slot."""
    tiny = make_llama()
    row = jnp.arange(T, dtype=jnp.int32)[None]

    @jax.jit
    def sensitivity(table, positions, segments):
        def outputs(table):
            params = {"params": tiny.params | {"embed": {"embedding": table}}}
            hidden, _ = tiny.model.apply(params, row, positions, segments)
            return tiny.model.apply(params, hidden, method="logits")[0].sum(axis=-1)

        return jnp.abs(jax.jacrev(outputs)(table)).max(axis=-1)[:, :T]

    table = tiny.params["embed"]["embedding"]
    reached = np.asarray(sensitivity(table, row, jnp.ones_like(row)))
    np.testing.assert_array_equal(reached > 0, np.tri(T, dtype=bool))
    segments = np.repeat([-1, 1, 2, 0], (3, 5, 4, 2))[None].astype(np.int32)
    reached = np.asarray(sensitivity(table, row, segments))
    related = (segments.T == segments) | ((segments == -1) & (segments.T != 0))
    expected = np.tri(T, dtype=bool) & related
    real = segments[0] != 0
    np.testing.assert_array_equal((reached > 0)[real], expected[real])


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_computes_and_float32_comes_out(make_llama, tokens, tied):
    tiny = make_llama(compute_dtype="bfloat16", tied_embeddings=tied)
    logits = tiny.logits(tokens)
    assert logits.dtype == np.float32
    exact = make_llama(tied_embeddings=tied).logits(tokens)
    assert_close(logits, exact, 0.1)
    assert np.abs(logits - exact).max() > 1e-4 * np.abs(exact).max()
    assert tiny.model.new_cache(1, 2).keys.dtype == jnp.bfloat16
    assert tiny.params["final_norm"]["scale"].dtype == np.float32


@pytest.mark.parametrize("changes", [{"tied_embeddings": True}, {"logit_softcap": 2.0}])
def test_logits_of_some_tokens_are_those_of_all(make_llama, changes):
    """The embedding adapted, where it is the head."""
    tiny, rng = make_llama(**changes), np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 3, 24), np.float32))
    tokens = jnp.array([60, 3, 3, 17], jnp.int32)
    a, b = (0.3 * rng.standard_normal(shape, np.float32) for shape in ((61, 2), (2, 24)))
    leaf = LowRank(jnp.asarray(a), jnp.asarray(b), jnp.float32(0.7))
    lora = {"embed": {"embedding": leaf}}
    for variables in ({"params": tiny.params}, {"params": tiny.params, "lora": lora}):
        run = functools.partial(tiny.model.apply, variables, hidden, method="logits")
        np.testing.assert_allclose(run(None, tokens), run()[..., tokens], rtol=1e-5, atol=1e-6)


def test_heads_tied_and_free(make_llama):
    hidden = jnp.asarray(RNG.standard_normal((1, 2, 24), np.float32))
    tied, free = make_llama(tied_embeddings=True), make_llama()
    assert "lm_head" not in tied.params
    for tiny, matrix in (
        (tied, tied.params["embed"]["embedding"].T),
        (free, free.params["lm_head"]["kernel"]),
    ):
        logits = tiny.model.apply({"params": tiny.params}, hidden, method="logits")
        np.testing.assert_allclose(logits, hidden @ matrix, rtol=1e-5, atol=1e-5)
