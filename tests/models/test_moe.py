"""Experts against a loop over tokens, and their load-balance loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.models.moe import MoE, Routing, balance
from ecomjax.training.losses import causal_lm
from ecomjax.typing import Batch, LowRank

B, T, D, F, E, K = 3, 5, 12, 7, 5, 3
EVERY = (LoraRule(rank=3, alpha=4.0),)
DISPATCHES = ("dense", "ragged")


def draw(*shape, seed=0):
    return 0.4 * np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def assert_close(ours, expected, tolerance=1e-5):
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(scope="module")
def params():
    experts = {name: {"kernel": draw(E, D, F, seed=i)} for i, name in enumerate(("gate", "up"))}
    experts["down"] = {"kernel": draw(E, F, D)}
    return {"router": {"kernel": draw(D, E)}, "experts": experts}


@pytest.fixture(scope="module")
def adapter():
    """Factors of two adapters for every expert, [E, A, ...]."""

    def leaf(d_in, d_out, seed):
        scale = np.abs(draw(E, 2, seed=seed)) + 0.5
        return LowRank(draw(E, 2, d_in, 2, seed=seed), draw(E, 2, 2, d_out, seed=seed), scale)

    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    leaves = {name: {"kernel": leaf(*shape, i)} for i, (name, shape) in enumerate(shapes.items())}
    return {"experts": leaves}


LIVE = np.arange(T) < np.array([[5], [2], [4]])


@functools.partial(jax.jit, static_argnums=0)
def run(dispatch, variables, x, index=None, live=LIVE):
    moe = MoE(D, F, E, K, activation="gelu", dispatch=dispatch)
    return moe.apply(variables, jnp.asarray(x), jnp.asarray(live), index)


def gelu(x):
    return np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32), approximate=False), np.float64)


def by_token(params, x):
    """Token by token: probabilities, the chosen experts, and the output."""
    params = jax.tree.map(lambda x: x.astype(np.float64), params)
    kernels = {name: leaf["kernel"] for name, leaf in params["experts"].items()}
    probabilities, choices, out = np.zeros((B, T, E)), np.zeros((B, T, E)), np.zeros((B, T, D))
    for b, t in np.ndindex(B, T):
        scores = np.exp(x[b, t] @ params["router"]["kernel"])
        probabilities[b, t] = scores / scores.sum()
        best = np.argsort(-scores)[:K]
        choices[b, t, best] = 1
        for e in best:
            inner = gelu(x[b, t] @ kernels["gate"][e]) * (x[b, t] @ kernels["up"][e])
            out[b, t] += scores[e] / scores[best].sum() * (inner @ kernels["down"][e])
    return probabilities, choices, out


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_each_token_passes_its_own_experts(params, dispatch):
    x = draw(B, T, D)
    probabilities, choices, expected = by_token(params, x)
    assert len(np.unique(choices.reshape(-1, E), axis=0)) > 3
    out, routing = run(dispatch, {"params": params}, x)
    assert_close(out, expected)
    np.testing.assert_array_equal(routing.assigned, choices[LIVE].sum(axis=0))
    np.testing.assert_allclose(routing.probability, probabilities[LIVE].sum(axis=0), rtol=1e-5)
    assert float(routing.slots) == LIVE.sum()


def test_an_expert_without_tokens(params):
    """A router that always prefers the same ones."""
    x = np.abs(draw(B, T, D))
    kernel = np.stack([np.full(D, s, np.float32) for s in (2.0, -1.0, 1.0, -2.0, 3.0)], axis=1)
    params = params | {"router": {"kernel": kernel}}
    for dispatch in DISPATCHES:
        out, routing = run(dispatch, {"params": params}, x)
        assert_close(out, by_token(params, x)[2])
        np.testing.assert_array_equal(routing.assigned > 0, [True, False, True, False, True])


def fused(params, adapter, which):
    """The parameters with one of the adapters merged in."""
    leaves = trees.map_leaves(lambda leaf: jax.tree.map(lambda x: x[:, which], leaf), adapter)
    return lora.fuse(params, leaves)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_adapters_of_experts(params, adapter, dispatch):
    """Beside the kernels as merged into them: one adapter for all rows, or each row its own."""
    x, index = draw(B, T, D), np.array([1, 0, 1], np.int32)
    expected = [run(dispatch, {"params": fused(params, adapter, i)}, x)[0] for i in range(2)]
    base = run(dispatch, {"params": params}, x)[0]
    assert np.abs(expected[0] - base).max() > 0.1 * np.abs(base).max()
    for i in range(2):
        one = trees.map_leaves(lambda leaf, i=i: jax.tree.map(lambda x: x[:, i], leaf), adapter)
        assert_close(run(dispatch, {"params": params, "lora": one}, x)[0], expected[i])
    mixed = run(dispatch, {"params": params, "lora": adapter}, x, index)[0]
    assert_close(mixed, np.stack([expected[i][row] for row, i in enumerate(index)]))


def test_dispatches_have_the_same_gradients(params, adapter):
    x, towards = draw(B, T, D), draw(B, T, D, seed=1)
    one = trees.map_leaves(lambda leaf: jax.tree.map(lambda x: x[:, 0], leaf), adapter)

    def loss(variables, x, dispatch):
        out, routing = run(dispatch, variables, x)
        return (out * towards).sum() + (routing.probability * towards[0, 0, :E]).sum()

    grads = [
        jax.grad(loss, argnums=(0, 1))({"params": params, "lora": one}, jnp.asarray(x), dispatch)
        for dispatch in DISPATCHES
    ]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[0]))
    jax.tree.map(assert_close, *grads)


def test_balance_of_an_even_and_a_skewed_load():
    even = Routing(*(jnp.full((2, 4), x) for x in (3.0, 1.5)), slots=jnp.full(2, 6.0))
    assert [float(x) for x in balance(even)] == [2 * 6.0, 6.0]
    skewed = even._replace(
        assigned=jnp.asarray([[6.0, 6.0, 0.0, 0.0]] * 2),
        probability=jnp.asarray([[2.0, 2.0, 1.0, 1.0]] * 2),
    )
    assert float(balance(skewed).sum) == pytest.approx(4 * 2 * 6 / 18 * 2 / 2 * 6)
    nothing = jax.tree.map(jnp.zeros_like, even)
    assert [float(x) for x in balance(nothing)] == [0.0, 0.0]


MIXTRAL = {"experts": E, "experts_per_token": 2, "layers": 2, "balance_coefficient": 0.5}


def a_batch(seed=0):
    """Two rows of 9 slots; the second is padding from slot 6 on."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, 61, (2, 2, 9)).astype(np.int32)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    live = positions < np.array([[9], [6]])
    weights = (live & (positions > 2)).astype(np.float32)
    batch = Batch(tokens, positions, live.astype(np.int32), targets, weights)
    return jax.tree.map(jnp.asarray, batch)


@pytest.fixture(scope="module")
def mixtral(make_llama):
    """(the tiny model, its jitted loss, what is frozen, what is trained)"""
    tiny = make_llama(**MIXTRAL)
    _, adapter = lora.init(tiny.params, tiny.axes, EVERY, jax.random.key(0))
    trained, fixed = lora.split(trees.map_leaves(lambda x: x.replace(b=x.b + 0.1), adapter))
    frozen = {"params": jax.tree.map(jnp.asarray, tiny.params), "fixed": fixed}
    return tiny, jax.jit(causal_lm(tiny.model)), frozen, trained


def test_the_loss_of_training_adds_the_balance(mixtral):
    tiny, loss, frozen, adapter = mixtral
    batch, key = a_batch(), jax.random.key(0)
    alone, weight, _ = loss(adapter, frozen, batch, None)
    together, same_weight, _ = loss(adapter, frozen, batch, key)
    variables = {"params": frozen["params"], "lora": lora.join(adapter, frozen["fixed"])}
    slots = (batch.tokens, batch.positions, batch.segment_ids)
    forward = functools.partial(tiny.model.apply, method="with_balance")
    _, found = jax.jit(forward)(variables, *slots)
    assert float(found.weight) == 15
    mean = float(found.sum) / 15
    assert mean > 1.0
    assert float(weight) == float(same_weight) == 9
    assert float(together - alone) == pytest.approx(0.5 * mean * 9, rel=1e-4)
    off = dataclasses.replace(tiny.config, balance_coefficient=0.0)
    without = jax.jit(causal_lm(type(tiny.model)(off)))(adapter, frozen, batch, key)
    assert float(without[0]) == pytest.approx(float(alone), rel=1e-6)


def test_padding_counts_for_nothing(mixtral):
    """Another token in a padding slot changes neither loss, nor gradient."""
    _, loss, frozen, adapter = mixtral
    batch, key = a_batch(), jax.random.key(0)
    noise = a_batch(seed=1).tokens
    changed = batch.replace(tokens=jnp.where(batch.segment_ids == 0, noise, batch.tokens))
    assert (changed.tokens != batch.tokens).any()

    def value_and_grad(batch):
        return jax.value_and_grad(lambda t: loss(t, frozen, batch, key)[0])(adapter)

    (value, grads), (other, others) = value_and_grad(batch), value_and_grad(changed)
    assert float(value) == pytest.approx(float(other), rel=1e-6)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-4), grads, others)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("scan", [True, False])
def test_dispatches_agree_in_the_model(make_llama, scan, remat):
    tokens = np.asarray(a_batch().tokens)
    expected = make_llama(**MIXTRAL, dispatch="dense").logits(tokens)
    for dispatch in DISPATCHES:
        tiny = make_llama(**MIXTRAL, dispatch=dispatch, scan=scan, remat=remat)
        assert_close(tiny.logits(tokens), expected)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_names_axes_and_shapes(make_llama, dispatch):
    """The same tree in both dispatches; the default rule adapts the experts, not the router."""
    tiny = make_llama(**MIXTRAL, dispatch=dispatch)
    axes = {
        p: (a.names, a.inputs, a.stacked) for p, a in trees.select(tiny.axes, ".*/mlp/.*").items()
    }
    experts = ("layers", "experts")
    assert axes == {
        "layers/mlp/router/kernel": (("layers", "embed", "routes"), 1, 1),
        "layers/mlp/experts/gate/kernel": ((*experts, "embed", "ffn"), 1, 2),
        "layers/mlp/experts/up/kernel": ((*experts, "embed", "ffn"), 1, 2),
        "layers/mlp/experts/down/kernel": ((*experts, "ffn", "embed"), 1, 2),
    }
    assert tiny.params["layers"]["mlp"]["experts"]["down"]["kernel"].shape == (2, E, 40, 24)
    _, adapter = lora.init(tiny.params, tiny.axes, EVERY, jax.random.key(0))
    paths = {path for path in trees.flatten(adapter) if "/mlp/" in path}
    assert paths == {path for path in axes if "router" not in path}
    assert adapter["layers"]["mlp"]["experts"]["up"]["kernel"].a.shape == (2, E, 24, 3)


def test_experts_are_drawn_apart_and_alike_in_both_dispatches():
    """Every expert from its own key, as widely as a linear layer of its width."""
    x, live = jnp.ones((1, 1, 64)), jnp.ones((1, 1), bool)
    for dispatch in DISPATCHES:
        moe = MoE(64, 48, 4, 2, dispatch=dispatch)
        boxed = jax.jit(moe.init)(jax.random.key(0), x, live)["params"]["experts"]
        for name, d_in in (("gate", 64), ("down", 48)):
            kernel = np.asarray(boxed[name]["kernel"].value)
            assert not np.allclose(kernel[0], kernel[1])
            assert kernel.std() == pytest.approx(d_in**-0.5, rel=0.05)


def test_bfloat16(params):
    x = jnp.asarray(draw(B, T, D), jnp.bfloat16)
    for dispatch in DISPATCHES:
        moe = MoE(D, F, E, K, dispatch=dispatch, dtype=jnp.bfloat16)
        out, routing = jax.jit(moe.apply)({"params": params}, x, jnp.asarray(LIVE))
        assert out.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in routing} == {jnp.dtype("float32")}
