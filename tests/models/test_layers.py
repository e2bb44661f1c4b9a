import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax.models.layers import Embed, Linear, RMSNorm

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape, np.float32))


@pytest.mark.parametrize(
    ("inputs", "shape", "out"), [(1, (7,), (5,)), (1, (7,), (3, 4)), (2, (3, 4), (7,))]
)
def test_linear_contracts_its_input_axes(inputs, shape, out):
    x, kernel = normal(2, 5, *shape), normal(*shape, *out)
    layer = Linear(out, ("embed",) * inputs + ("heads", "head_dim")[: len(out)], inputs=inputs)
    y = layer.apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(y, np.tensordot(x, kernel, inputs), rtol=1e-5, atol=1e-5)


def test_fresh_kernels_keep_the_variance():
    """Of 1 / d_in, where d_in is the product of all contracted axes."""
    layer = Linear((300,), ("heads", "head_dim", "embed"), inputs=2)
    kernel = nn.unbox(layer.init(jax.random.key(0), normal(1, 1, 5, 20)))["params"]["kernel"]
    assert kernel.shape == (5, 20, 300)
    assert float(jnp.var(kernel)) == pytest.approx(1 / 100, rel=0.05)


def test_linear_computes_in_its_dtype():
    layer = Linear((3,), ("embed", "ffn"), dtype=jnp.bfloat16)
    assert layer.apply({"params": {"kernel": normal(4, 3)}}, normal(1, 2, 4)).dtype == jnp.bfloat16


def test_embedding_and_tied_head():
    embed, table = Embed(9, 4), normal(9, 4)
    tokens = jnp.array([[3, 8, 3]], jnp.int32)
    out = embed.apply({"params": {"embedding": table}}, tokens)
    np.testing.assert_array_equal(out, table[tokens])
    logits = embed.apply({"params": {"embedding": table}}, out, method="attend")
    np.testing.assert_allclose(logits, table[tokens] @ table.T, rtol=1e-5, atol=1e-6)


def test_rms_norm_formula():
    x, scale, eps = *map(np.asarray, (normal(2, 5, 6), normal(6))), 0.3
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale
    out = RMSNorm(eps).apply({"params": {"scale": scale}}, jnp.asarray(x))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_is_of_float32_inside():
    """The mean of 512 squares of 16 and 3 others is off by some percent in bfloat16."""
    x = jnp.asarray(np.r_[np.full(512, 16.0), 1.0, 2.0, 3.0][None, None], jnp.bfloat16)
    layer = RMSNorm(1e-6, dtype=jnp.bfloat16)
    out = layer.apply({"params": {"scale": jnp.ones(515)}}, x)
    assert out.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float32) / np.sqrt((np.asarray(x, np.float32) ** 2).mean())
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))
