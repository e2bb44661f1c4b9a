"""What rules ask of adapters: each starts as the model given, and is the fused model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.errors import UserError
from ecomjax.models.layers import Linear
from ecomjax.typing import AdapterLeaf, DoRA, LowRank

EVERY = LoraRule(".*/kernel", rank=3, alpha=4.0)
RULES = {
    "lora": [EVERY],
    "rslora": [dataclasses.replace(EVERY, rslora=True)],
    "dora": [dataclasses.replace(EVERY, dora=True)],
    "pissa": [dataclasses.replace(EVERY, pissa=True)],
    "dora from pissa": [dataclasses.replace(EVERY, dora=True, pissa=True)],
    "ranks by layer": [EVERY, LoraRule("layers/.*/kernel", rank=5, alpha=1.0, layers=(1,))],
    "pissa with ranks": [
        dataclasses.replace(EVERY, pissa=True),
        LoraRule("layers/attn/.*/kernel", rank=5, pissa=True, layers=(0,)),
    ],
    "embedding": [EVERY, LoraRule("embed/embedding", rank=2)],
}


def assert_close(ours, expected, tolerance=1e-5):
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


def shake(adapter, seed=0):
    """Every trained number moved, but for the padding of factors."""
    rng = np.random.default_rng(seed)

    def moved(leaf):
        def noise(x):
            return np.asarray(x) + 0.1 * rng.standard_normal(x.shape, np.float32)

        rank = leaf.a.shape[-1]
        ranks = np.full(leaf.scale.shape, rank) if leaf.ranks is None else np.asarray(leaf.ranks)
        used = (np.arange(rank) < ranks[..., None]).astype(np.float32)
        a, b = noise(leaf.a) * used[..., None, :], noise(leaf.b) * used[..., :, None]
        more = {"magnitude": 1.5 * noise(leaf.magnitude)} if isinstance(leaf, DoRA) else {}
        return leaf.replace(a=a, b=b, **more)

    return trees.map_leaves(moved, adapter)


@pytest.fixture(params=[*RULES, "embedding of a tied head"])
def rules(request):
    if request.param in RULES:
        return RULES[request.param]
    return [LoraRule("layers/.*/kernel", rank=3), LoraRule("embed/embedding", rank=2)]


@pytest.fixture
def model(request, make_llama):
    tied = "tied head" in request.node.callspec.params["rules"]
    return make_llama(layers=2, tied_embeddings=tied)


def test_the_start_is_the_model_given(model, rules, tokens):
    base, adapter = lora.init(model.params, model.axes, rules, jax.random.key(0))
    leaves = trees.flatten(adapter)
    assert all(isinstance(leaf, AdapterLeaf) for leaf in leaves.values())
    given = model.logits(tokens)
    assert_close(model.logits(tokens, params=base, lora=adapter), given)
    alone = model.logits(tokens, params=base)
    if any(rule.pissa for rule in rules):
        assert np.abs(alone - given).max() > 0.1 * np.abs(given).max()
    else:
        assert base is model.params


def test_side_path_is_the_fused_model(model, rules, tokens):
    base, adapter = lora.init(model.params, model.axes, rules, jax.random.key(0))
    shaken = shake(adapter)
    side = model.logits(tokens, params=base, lora=shaken)
    assert_close(side, model.logits(tokens, params=lora.fuse(base, shaken)))
    for path, leaf in trees.flatten(shaken).items():
        plain = trees.flatten(adapter)[path]
        without = trees.unflatten(trees.flatten(shaken) | {path: plain})
        changed = np.abs(model.logits(tokens, params=base, lora=without) - side).max()
        assert changed > 1e-3 * np.abs(side).max(), (path, leaf)


def test_against_the_base_given(model, rules, tokens):
    """What was trained against the base of `init` does the same to the base that it was given."""
    base, start = lora.init(model.params, model.axes, rules, jax.random.key(0))
    trained = shake(start)
    exported = lora.since(trained, start)
    assert_close(
        model.logits(tokens, lora=exported), model.logits(tokens, params=base, lora=trained), 2e-5
    )
    for path, leaf in trees.flatten(exported).items():
        changed = trees.flatten(base)[path] is not trees.flatten(model.params)[path]
        assert leaf.a.shape[-1] == (1 + changed) * trees.flatten(start)[path].a.shape[-1]


def test_dora_scales_columns_to_its_magnitude(tiny):
    """Against equation 5 written out, head axes included."""
    _, start = lora.init(tiny.params, tiny.axes, RULES["dora"], jax.random.key(0))
    adapter = shake(start)
    fused = trees.flatten(lora.fuse(tiny.params, adapter))
    for path, leaf in trees.flatten(adapter).items():
        assert isinstance(leaf, DoRA)
        kernel = trees.flatten(tiny.params)[path]
        w = kernel.reshape(*leaf.a.shape[:-1], -1)
        v = w + np.asarray(leaf.scale)[..., None, None] * (leaf.a @ leaf.b)
        norms = np.linalg.norm(v, axis=-2, keepdims=True)
        expected = leaf.magnitude[..., None, :] * v / norms
        assert_close(fused[path], expected.reshape(kernel.shape))
        first = trees.flatten(start)[path].magnitude
        np.testing.assert_allclose(first, np.linalg.norm(w, axis=-2), rtol=1e-5)


def test_norms_of_dora_are_constants_to_the_gradient():
    rng, shapes = np.random.default_rng(0), ((1, 4, 6), (6, 5), (6, 2), (2, 5))
    x, w, a, b = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes)
    leaf = DoRA(a=a, b=b, scale=jnp.float32(0.5), magnitude=jnp.ones(5))
    norms = jnp.asarray(np.linalg.norm(w + 0.5 * a @ b, axis=0))

    def by_leaf(factors):
        adapted = leaf.replace(a=factors[0], b=factors[1])
        return jnp.square(adapted.apply(x, w, x @ w)).sum()

    def by_hand(factors):
        y = x @ w + jnp.float32(0.5) * ((x @ factors[0]) @ factors[1])
        return jnp.square(y / norms[None, None]).sum()

    pairs = zip(jax.grad(by_leaf)((a, b)), jax.grad(by_hand)((a, b)), strict=True)
    for ours, expected in pairs:
        assert_close(ours, expected)


def test_a_column_of_zeros_is_finite():
    leaf = DoRA(
        a=jnp.zeros((3, 1)), b=jnp.zeros((1, 2)), scale=jnp.float32(1.0), magnitude=jnp.zeros(2)
    )
    kernel = jnp.zeros((3, 2))
    assert not np.asarray(leaf.delta(kernel)).any()
    assert not np.asarray(leaf.apply(jnp.ones((1, 1, 3)), kernel, jnp.zeros((1, 1, 2)))).any()


def test_dora_leaves_the_bias_alone():
    layer = Linear((4,), ("embed", "ffn"), use_bias=True)
    x = jnp.ones((1, 1, 3))
    kernel, bias = jnp.ones((3, 4)), jnp.array([0.0, 1.0, 2.0, 3.0])
    leaf = DoRA(
        a=jnp.zeros((3, 1)), b=jnp.zeros((1, 4)), scale=jnp.float32(1), magnitude=jnp.zeros(4)
    )
    variables = {"params": {"kernel": kernel, "bias": bias}, "lora": {"kernel": leaf}}
    np.testing.assert_array_equal(layer.apply(variables, x)[0, 0], bias)


def test_padding_of_ranks_stays_zero_in_training(tiny, tokens, loose_promotion):
    """And each layer learns as if its rank were that of all."""
    rules = [
        LoraRule(rank=2, alpha=3.0),
        LoraRule(rank=4, alpha=3.0, layers=(1,)),
    ]
    _, adapter = lora.init(tiny.params, tiny.axes, rules, jax.random.key(0))
    q = adapter["layers"]["attn"]["q"]["kernel"]
    assert q.a.shape[-1] == 4
    np.testing.assert_array_equal(q.ranks, [2, 4])
    np.testing.assert_array_equal(q.scale, np.float32([1.5, 0.75]))
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    trained, fixed = lora.split(adapter)
    state = optimizer.init(trained)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    params = jax.tree.map(jnp.asarray, tiny.params)
    batch = (jnp.asarray(tokens), positions, jnp.ones_like(positions))

    @jax.jit
    def step(trained, state):
        def loss(trained):
            variables = {"params": params, "lora": lora.join(trained, fixed)}
            hidden = tiny.model.apply(variables, *batch)[0]
            return jnp.square(hidden).mean()

        updates, state = optimizer.update(jax.grad(loss)(trained), state, trained)
        return optax.apply_updates(trained, updates), state

    for _ in range(3):
        trained, state = step(trained, state)
    for leaf in trees.flatten(lora.join(trained, fixed)).values():
        assert not np.asarray(leaf.a[0, :, 2:]).any() and not np.asarray(leaf.b[0, 2:]).any()
        assert np.asarray(leaf.b[0, :2]).all() and np.asarray(leaf.b[1]).all()
        assert leaf.ranks.tolist() == [2, 4]


def test_pissa_takes_out_the_principal_part(tiny):
    """Of a kernel whose later singular values are small, the base keeps the rest."""
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((2, 24, 24)))
    v, _ = np.linalg.qr(rng.standard_normal((2, 40, 24)))
    s = np.array([9.0, 7.0, 5.0, *[0.1] * 21])
    kernel = np.float32((u * s) @ v.swapaxes(1, 2))
    params = trees.unflatten(trees.flatten(tiny.params) | {"layers/mlp/up/kernel": kernel})
    rule = LoraRule(".*/up/kernel", rank=3, alpha=6.0, pissa=True)
    base, adapter = lora.init(params, tiny.axes, [rule], jax.random.key(0))
    rest = np.asarray(base["layers"]["mlp"]["up"]["kernel"])
    assert np.linalg.norm(rest, 2, axis=(1, 2)).max() < 0.11
    leaf = adapter["layers"]["mlp"]["up"]["kernel"]
    assert_close(rest + leaf.delta(rest), kernel)
    # Both factors carry the root of the singular values, the scale divided out.
    np.testing.assert_allclose(
        np.linalg.norm(leaf.a, axis=1), np.sqrt(np.tile(s[:3], (2, 1)) / 2), rtol=1e-3
    )


def test_an_embedding_learns_from_the_rows_seen_first(tiny):
    rule = LoraRule("embed/embedding", rank=2)
    _, adapter = lora.init(tiny.params, tiny.axes, [rule], jax.random.key(0))
    leaf = adapter["embed"]["embedding"]
    assert leaf.a.shape == (61, 2) and not np.asarray(leaf.a).any()
    assert leaf.b.shape == (2, 24) and np.asarray(leaf.b).all()


@pytest.mark.parametrize("change", [{"dora": True}, {"pissa": True}])
def test_an_embedding_is_plain_lora(tiny, change):
    rule = LoraRule("embed/embedding", **change)
    with pytest.raises(UserError, match="of an embedding: embed/embedding"):
        lora.init(tiny.params, tiny.axes, [rule], jax.random.key(0))


@pytest.mark.parametrize("dispatch", ["ragged", "dense"])
def test_dora_of_experts(make_llama, tokens, dispatch):
    model = make_llama(layers=2, experts=3, experts_per_token=2, dispatch=dispatch)
    rule = LoraRule(rank=2, dora=True)
    base, start = lora.init(model.params, model.axes, [rule], jax.random.key(0))
    assert_close(model.logits(tokens, lora=start), model.logits(tokens))
    adapter = shake(start)
    assert adapter["layers"]["mlp"]["experts"]["up"]["kernel"].magnitude.shape == (2, 3, 40)
    fused = model.logits(tokens, params=lora.fuse(base, adapter))
    assert_close(model.logits(tokens, lora=adapter), fused)
    assert np.abs(fused - model.logits(tokens)).max() > 0.1 * np.abs(fused).max()


def test_leaves_keep_their_type_through_split(tiny):
    _, adapter = lora.init(tiny.params, tiny.axes, RULES["dora"], jax.random.key(0))
    trained, fixed = lora.split(adapter)
    leaf = trees.flatten(trained)["lm_head/kernel"]
    assert leaf.scale is None and leaf.magnitude is not None
    joined = lora.join(trained, fixed)
    assert jax.tree.structure(joined) == jax.tree.structure(adapter)
    assert not isinstance(joined["lm_head"]["kernel"], LowRank)
