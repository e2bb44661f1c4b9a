import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax.models import likelihood
from ecomjax.models.llama import Llama
from ecomjax.typing import Batch

RNG = np.random.default_rng(0)
B, T, V = 3, 14, 61


@pytest.fixture(scope="module")
def batch():
    """Rows with some targets, with one in the last slot, and with none; weights of any size."""
    tokens, targets = RNG.integers(0, V, (2, B, T)).astype(np.int32)
    weights = np.where(RNG.random((B, T)) < 0.3, 2.5, 0.0).astype(np.float32)
    weights[1], weights[2] = np.arange(T) == T - 1, 0
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    fields = (tokens, positions, np.ones_like(tokens), targets, weights)
    return Batch(*map(jnp.asarray, fields))


def compiled(model):
    """A fresh function, since jax knows nothing of a changed HEAD_CHUNK."""
    return jax.jit(
        lambda variables, batch: likelihood.token_log_likelihood(model, variables, batch)
    )


@pytest.mark.parametrize("chunk", [4, 7, 128])
def test_equals_the_log_softmax_of_all_logits(make_llama, batch, monkeypatch, chunk):
    """Whether or not the chunks divide the slots, and for chunks without a target."""
    monkeypatch.setattr(likelihood, "HEAD_CHUNK", chunk)
    tiny = make_llama(layers=1)
    ours = compiled(tiny.model)({"params": tiny.params}, batch)
    logits = tiny.logits(np.asarray(batch.tokens)).astype(np.float64)
    everywhere = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    picked = np.take_along_axis(everywhere, np.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    expected = np.where(np.asarray(batch.weights) > 0, picked, 0.0)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


class CountingHead(Llama):
    """Counts how often its head runs."""

    runs = 0

    def logits(self, hidden, adapter_index=None):
        jax.debug.callback(self.count)
        return super().logits(hidden, adapter_index)

    @classmethod
    def count(cls):
        cls.runs += 1


def test_head_runs_on_chunks_with_a_target_only(make_llama, batch, monkeypatch):
    """Four targets, wherever they stand in their row, fill one chunk of the four."""
    monkeypatch.setattr(likelihood, "HEAD_CHUNK", 4)
    tiny = make_llama(layers=1)
    run = compiled(CountingHead(tiny.config))
    for slots, runs in [((), 0), ((0, 6, 9, 13), 1), ((0, 1, 6, 9, 13), 2), (range(14), 4)]:
        CountingHead.runs = 0
        weights = jnp.zeros((B, T)).at[1, jnp.array(slots, int)].set(1.0)
        jax.block_until_ready(run({"params": tiny.params}, batch.replace(weights=weights)))
        jax.effects_barrier()
        assert CountingHead.runs == runs


def largest(jaxpr):
    """Elements of the largest array of a program, inner programs included."""
    sizes = [np.prod(v.aval.shape, dtype=int) for eqn in jaxpr.eqns for v in eqn.outvars]
    inner = (j for eqn in jaxpr.eqns for j in jax.extend.core.jaxprs_in_params(eqn.params))
    return max([0, *sizes, *map(largest, inner)])


def test_logits_of_all_slots_never_stand_together(make_llama, batch, monkeypatch):
    """Neither in the forward pass nor kept for the backward one."""
    tiny, sizes = make_llama(layers=1, vocab_size=499), {}
    for chunk in (2, 14):
        monkeypatch.setattr(likelihood, "HEAD_CHUNK", chunk)

        def total(table):
            variables = {"params": tiny.params | {"embed": {"embedding": table}}}
            return likelihood.token_log_likelihood(tiny.model, variables, batch).sum()

        program = jax.make_jaxpr(jax.value_and_grad(total))(tiny.params["embed"]["embedding"])
        sizes[chunk] = largest(program.jaxpr)
    assert sizes[14] == B * 14 * 499
    assert sizes[2] < B * 14 * 499


def products(jaxpr):
    """Matrix products of a program that make logits, inner programs included."""
    own = sum(
        e.primitive.name == "dot_general" and V in e.outvars[0].aval.shape for e in jaxpr.eqns
    )
    inner = (j for eqn in jaxpr.eqns for j in jax.extend.core.jaxprs_in_params(eqn.params))
    return own + sum(map(products, inner))


@pytest.mark.parametrize("tied", [False, True])
def test_under_a_frozen_head_logits_are_computed_once(make_llama, batch, tied):
    """And the gradient by hidden states is that of the formula, whatever values weigh."""
    tiny = make_llama(layers=1, tied_embeddings=tied)
    hidden = jnp.asarray(RNG.standard_normal((B, T, 24), np.float32))
    variables, direction = {"params": tiny.params}, jnp.asarray(RNG.standard_normal((B, T)))

    def total(hidden, frozen_head):
        found = likelihood.likelihood_of_hidden(
            tiny.model, variables, hidden, batch, frozen_head=frozen_head
        )
        return (found * direction.astype(jnp.float32)).sum()

    gradient = jax.jit(jax.value_and_grad(total), static_argnums=1)
    for ours, exact in zip(gradient(hidden, True), gradient(hidden, False), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)
    counts = [products(jax.make_jaxpr(gradient, 1)(hidden, own).jaxpr) for own in (True, False)]
    assert counts == [1, 2]
