from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax.models.layers import Embed, Linear, RMSNorm
from ecomjax.typing import LowRank

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape, np.float32))


@pytest.mark.parametrize(
    ("inputs", "shape", "out"), [(1, (7,), (5,)), (1, (7,), (3, 4)), (2, (3, 4), (7,))]
)
def test_linear_contracts_its_input_axes(inputs, shape, out):
    x, kernel = normal(2, 5, *shape), normal(*shape, *out)
    layer = Linear(out, ("in",) * inputs + ("out",) * len(out), inputs=inputs)
    y = layer.apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(y, np.tensordot(x, kernel, inputs), rtol=1e-5, atol=1e-5)


def test_fresh_kernels_keep_the_variance():
    """Of 1 / d_in, where d_in is the product of all contracted axes."""
    layer = Linear((300,), ("heads", "head_dim", "embed"), inputs=2)
    kernel = nn.unbox(layer.init(jax.random.key(0), normal(1, 1, 5, 20)))["params"]["kernel"]
    assert kernel.shape == (5, 20, 300)
    assert float(jnp.var(kernel)) == pytest.approx(1 / 100, rel=0.05)


class Quantized(flax.struct.PyTreeNode):
    """Rounded to int8 by output column; an array to whoever reshapes and casts it."""

    values: Any
    scales: Any
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, kernel, inputs):
        matrix = kernel.reshape(np.prod(kernel.shape[:inputs]), -1)
        scales = np.abs(matrix).max(axis=0, keepdims=True) / 127
        return cls(np.round(matrix / scales).astype(np.int8), scales, kernel.shape)

    def reshape(self, *shape):
        return self.replace(shape=jnp.empty(self.values.shape).reshape(*shape).shape)

    def astype(self, dtype):
        full = self.values.astype(jnp.float32) * self.scales
        return full.reshape(self.shape).astype(dtype)


@pytest.mark.parametrize(("inputs", "shape", "out"), [(1, (7,), (3, 4)), (2, (3, 4), (7,))])
def test_linear_holds_a_quantized_kernel(inputs, shape, out):
    """Any struct with an array's `reshape` and `astype` is a kernel, side path included."""
    kernel, x = Quantized.of(normal(*shape, *out), inputs), normal(2, 5, *shape)
    d_in, d_out = kernel.values.shape
    leaf = LowRank(a=normal(d_in, 2), b=normal(2, d_out), scale=np.float32(0.5))
    layer = Linear(out, ("in",) * inputs + ("out",) * len(out), inputs=inputs)

    @jax.jit
    def run(kernel):
        return layer.apply({"params": {"kernel": kernel}, "lora": {"kernel": leaf}}, x)

    dense = kernel.astype(jnp.float32)
    np.testing.assert_allclose(run(kernel), run(dense), rtol=1e-6)
    expected = np.tensordot(x, dense + leaf.delta(dense), inputs)
    np.testing.assert_allclose(run(kernel), expected, rtol=1e-4, atol=1e-4)


def test_linear_computes_in_its_dtype():
    layer = Linear((3,), ("in", "out"), dtype=jnp.bfloat16)
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
