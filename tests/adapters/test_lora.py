import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.errors import UserError
from ecomjax.typing import LowRank


def assert_close(ours, expected, tolerance=1e-5):
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


def inputs_of(tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return jnp.asarray(tokens), positions, jnp.ones_like(positions)


def assert_same(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_shapes_and_draws(tiny):
    """Only shapes are read; the heads of a kernel are flattened, its layers stacked."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tiny.params)
    rules = [LoraRule(rank=5, alpha=2.0, dropout=0.1)]
    base, adapter = lora.init(shapes, tiny.axes, rules, jax.random.key(0))
    assert base is shapes
    flat = trees.flatten(adapter)
    assert {path: (leaf.a.shape, leaf.b.shape) for path, leaf in flat.items()} == {
        "layers/attn/q/kernel": ((2, 24, 5), (2, 5, 48)),
        "layers/attn/k/kernel": ((2, 24, 5), (2, 5, 16)),
        "layers/attn/v/kernel": ((2, 24, 5), (2, 5, 16)),
        "layers/attn/o/kernel": ((2, 48, 5), (2, 5, 24)),
        "layers/mlp/gate/kernel": ((2, 24, 5), (2, 5, 40)),
        "layers/mlp/up/kernel": ((2, 24, 5), (2, 5, 40)),
        "layers/mlp/down/kernel": ((2, 40, 5), (2, 5, 24)),
    }
    for leaf in flat.values():
        assert {leaf.a.dtype, leaf.b.dtype, leaf.scale.dtype} == {jnp.dtype(jnp.float32)}
        bound = leaf.a.shape[1] ** -0.5
        assert 0.9 * bound < np.abs(leaf.a).max() <= bound
        assert abs(float(leaf.a.mean())) < 0.1 * bound
        assert not leaf.b.any()
        np.testing.assert_array_equal(leaf.scale, np.float32([0.4, 0.4]))
        assert leaf.dropout == 0.1


def test_every_kernel_draws_from_its_own_key(tiny):
    init = functools.partial(lora.init, tiny.params, tiny.axes)
    one = [LoraRule(".*/up/kernel", rank=3)]
    more = [LoraRule(".*/gate/kernel", rank=3), *one, LoraRule(".*/q/kernel", rank=2)]
    few, many = (trees.flatten(init(rules, jax.random.key(4))[1]) for rules in (one, more))
    up, gate = "layers/mlp/up/kernel", "layers/mlp/gate/kernel"
    assert_same(few[up], many[up])
    assert not np.allclose(many[up].a, many[gate].a)
    assert not np.allclose(many[up].a[0], many[up].a[1])
    other = trees.flatten(init(one, jax.random.key(5))[1])
    assert not np.allclose(other[up].a, few[up].a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fuse_after_init_is_the_identity(tiny, make_adapter, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), tiny.params)
    assert_same(lora.fuse(params, make_adapter(None)), params)


def test_a_fresh_adapter_changes_no_logit(tiny, make_adapter, tokens):
    logits = tiny.logits(tokens, lora=make_adapter(None))
    np.testing.assert_array_equal(logits, tiny.logits(tokens))


def test_side_path_is_the_fused_model(tiny, make_llama, make_adapter, tokens):
    """On every kernel, LM head included, and each kernel's part is felt."""
    adapter, base = make_adapter(1), tiny.logits(tokens)
    assert len(trees.flatten(adapter)) == 8
    side = tiny.logits(tokens, lora=adapter)
    assert_close(side, tiny.logits(tokens, params=lora.fuse(tiny.params, adapter)))
    assert np.abs(side - base).max() > 0.1 * np.abs(base).max()
    for path, leaf in trees.flatten(adapter).items():
        without = trees.unflatten(trees.flatten(adapter) | {path: leaf.replace(b=0 * leaf.b)})
        changed = np.abs(tiny.logits(tokens, lora=without) - side).max()
        assert changed > 1e-3 * np.abs(side).max(), path
    unrolled = make_llama(layers=2, scan=False)
    assert_close(unrolled.logits(tokens, lora=trees.unstack_layers(adapter)), side)


def test_fused_is_the_base_and_its_delta(tiny, make_adapter):
    adapter = make_adapter(1)
    deltas, kernels = (trees.flatten(t) for t in (lora.delta(tiny.params, adapter), tiny.params))
    fused = trees.flatten(lora.fuse(tiny.params, adapter))
    assert set(deltas) == set(trees.flatten(adapter))
    assert set(fused) == set(kernels)
    for path, kernel in kernels.items():
        expected = kernel + deltas[path] if path in deltas else kernel
        np.testing.assert_array_equal(fused[path], expected)


def test_fuse_rounds_once(tiny, make_adapter):
    """A bfloat16 base is added to in float32."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params)
    adapter, path = make_adapter(1), "layers/attn/o/kernel"
    fused = trees.flatten(lora.fuse(params, adapter))[path]
    kernel = trees.flatten(params)[path].astype(np.float32)
    exact = kernel + trees.flatten(lora.delta(params, adapter))[path]
    np.testing.assert_array_equal(fused, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("use", [lora.fuse, lora.delta, lora.check_paths])
def test_a_foreign_path_is_refused(tiny, make_adapter, use):
    leaf = make_adapter()["layers"]["attn"]["q"]["kernel"]
    foreign = {"layers": {"attn": {"query": {"kernel": leaf}}}}
    with pytest.raises(UserError, match=r"layers/attn/query/kernel.*layers/attn/q/kernel"):
        use(tiny.params, foreign)


def test_join_inverts_split(make_adapter):
    adapter = make_adapter(1, (LoraRule(rank=3, dropout=0.2),))
    trained, fixed = lora.split(adapter)
    assert_same(lora.join(trained, fixed), adapter)
    assert trees.count(trained) + trees.count(fixed) == trees.count(adapter)
    assert trees.count(fixed) == 7 * 2


def test_gradients_go_to_the_factors_alone(tiny, make_adapter, tokens, loose_promotion):
    """Both factors of every kernel get one, scales none; optax steps trees with such holes."""
    trained, fixed = lora.split(make_adapter(1))
    inputs = inputs_of(tokens)

    optimizer = optax.adamw(1e-2)

    @jax.jit
    def step(trained, state, params):
        def loss(trained):
            variables = {"params": params, "lora": lora.join(trained, fixed)}
            hidden, _ = tiny.model.apply(variables, *inputs)
            return (tiny.model.apply(variables, hidden, method="logits") ** 2).mean()

        grads = jax.grad(loss)(trained)
        updates, state = optimizer.update(grads, state, trained)
        return grads, optax.apply_updates(trained, updates), state

    grads, moved, state = step(trained, optimizer.init(trained), tiny.params)
    assert jax.tree.structure(grads) == jax.tree.structure(moved) == jax.tree.structure(trained)
    for path, leaf in trees.flatten(grads).items():
        assert isinstance(leaf, LowRank)
        assert leaf.scale is None
        assert np.abs(leaf.a).max() > 0 and np.abs(leaf.b).max() > 0, path
    moments = trees.count(state) - 1
    assert moments == 2 * trees.count(trained)
    assert_same(lora.split(lora.join(moved, fixed))[1], fixed)


def test_dropout_acts_in_training_only(tiny, make_adapter, tokens):
    """With the same mask for the same key."""
    adapter = make_adapter(1, (LoraRule(rank=3, dropout=0.5),))

    @jax.jit
    def run(variables, key):
        rngs = None if key is None else {"dropout": key}
        return tiny.model.apply(variables, *inputs_of(tokens), rngs=rngs)[0]

    def hidden(seed):
        key = None if seed is None else jax.random.key(seed)
        return run({"params": tiny.params, "lora": adapter}, key)

    sure = trees.map_leaves(lambda leaf: leaf.replace(dropout=0.0), adapter)
    logits = tiny.logits(tokens, lora=adapter)
    np.testing.assert_array_equal(logits, tiny.logits(tokens, lora=sure))
    evaluated, once, again, other = hidden(None), hidden(0), hidden(0), hidden(1)
    np.testing.assert_array_equal(once, again)
    assert not np.allclose(once, evaluated, atol=1e-3)
    assert not np.allclose(once, other, atol=1e-3)
