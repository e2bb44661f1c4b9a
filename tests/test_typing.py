import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax.typing import AdapterLeaf, LowRank, ParamAxes

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape, np.float32))


@pytest.fixture
def leaf():
    return LowRank(a=normal(5, 3), b=normal(3, 4), scale=jnp.float32(0.7), dropout=0.5)


def test_low_rank_adds_its_scaled_product(leaf):
    x, y = normal(2, 6, 5), normal(2, 6, 4)
    expected = y + 0.7 * np.einsum("btd,dr,re->bte", x, leaf.a, leaf.b)
    np.testing.assert_allclose(leaf.apply(x, None, y), expected, rtol=1e-5, atol=1e-5)


def test_low_rank_computes_in_the_dtype_of_its_input(leaf):
    x, y = jnp.ones((2, 1, 5), jnp.bfloat16), jnp.ones((2, 1, 4), jnp.bfloat16)
    assert leaf.apply(x, None, y).dtype == jnp.bfloat16


def test_low_rank_of_each_row():
    """With several adapters along the leading axis, the index says which one a row uses."""
    many = LowRank(a=normal(3, 5, 2), b=normal(3, 2, 4), scale=normal(3))
    x, y, index = normal(4, 6, 5), normal(4, 6, 4), jnp.array([2, 0, 0, 1])
    together = many.apply(x, None, y, index)
    for row, i in enumerate(index.tolist()):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], many)
        alone = one.apply(x[row], None, y[row])
        np.testing.assert_allclose(together[row], alone, rtol=1e-5, atol=1e-5)


def test_delta_has_the_shape_of_the_kernel_and_float32():
    """Factors are stacked over layers; the kernel's head axes are flattened in them."""
    leaf = LowRank(a=normal(2, 5, 3), b=normal(2, 3, 8), scale=jnp.array([0.5, 2.0]))
    kernel = jnp.zeros((2, 5, 4, 2), jnp.bfloat16)
    delta = leaf.delta(kernel)
    assert delta.dtype == jnp.float32
    expected = jnp.stack([0.5 * leaf.a[0] @ leaf.b[0], 2.0 * leaf.a[1] @ leaf.b[1]])
    np.testing.assert_allclose(delta, expected.reshape(kernel.shape), rtol=1e-5, atol=1e-5)


def test_dropout_drops_inputs_of_the_adapter_alone():
    """Seen through factors that are the identity: zeros, and the rest scaled to keep the mean."""
    eye = jnp.eye(200)
    leaf = LowRank(a=eye, b=eye, scale=jnp.float32(1.0), dropout=0.25)
    x, y = jnp.ones((1, 50, 200)), jnp.full((1, 50, 200), 10.0)
    out = np.asarray(leaf.apply(x, None, y, key=jax.random.key(0))) - 10.0
    dropped = np.isclose(out, 0.0)
    np.testing.assert_allclose(out[~dropped], 1 / 0.75, rtol=1e-5)
    assert abs(dropped.mean() - 0.25) < 0.02
    np.testing.assert_array_equal(leaf.apply(x, None, y), y + 1.0)
    sure = leaf.replace(dropout=0.0)
    np.testing.assert_array_equal(sure.apply(x, None, y, key=jax.random.key(0)), y + 1.0)


def test_low_rank_is_an_adapter_leaf(leaf):
    assert isinstance(leaf, AdapterLeaf)
    assert len(jax.tree.leaves(leaf)) == 3
    assert set(leaf.fixed) == {"scale", "ranks"}


def test_stacked_axes_are_counted():
    assert ParamAxes(("layers", "embed", "heads", "head_dim"), 1).stacked == 1
    assert ParamAxes(("layers", "experts", "embed", "ffn"), 1).stacked == 2
    assert ParamAxes(("vocab", "embed"), 1).stacked == 0
    assert not jax.tree.leaves(ParamAxes(("vocab", "embed")))
