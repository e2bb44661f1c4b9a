"""Linear, embedding and normalisation layers that declare the logical axes of their weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ecomjax.sharding import constrain
from ecomjax.typing import FrozenKernel, ParamAxes, matmul


class DeclaredAxes(nn.Partitioned[Any]):
    """A parameter boxed with its logical axis names and its number of contracted axes.

    Boxes exist only while a model is described (`models.registry.describe`); parameters
    proper are bare arrays.
    """

    inputs: int = flax.struct.field(default=0, pytree_node=False)

    def axes(self) -> ParamAxes:
        return ParamAxes(tuple(str(name) for name in self.names), self.inputs)


def declare(init, names: tuple[str, ...], inputs: int = 0):
    """An initializer that boxes its value with the axes' names."""

    def boxed(key, shape, dtype):
        return DeclaredAxes(init(key, shape, dtype), names=names, inputs=inputs)

    return boxed


def multiply(
    x: Float[Array, "*B d_in"], kernel: Any, sizes: Int[Array, "E"] | None = None
) -> tuple[Float[Array, "*B d_out"], Any]:
    """x @ kernel in the dtype of x, and the kernel as adapters see it: an array in that dtype,
    or a `FrozenKernel`.

    Args:
        x: inputs.
        kernel: [*in, *out], read as a matrix, or with sizes [E, d_in, d_out].
        sizes: the first sizes[0] rows of x [M, d_in] are of the first matrix, and so on.
    """
    matrix = kernel.reshape(x.shape[-1], -1) if sizes is None else kernel
    if isinstance(kernel, FrozenKernel):
        return kernel.matmul(x, sizes), matrix
    matrix = jnp.asarray(matrix.astype(x.dtype))
    return matmul(x, matrix) if sizes is None else jax.lax.ragged_dot(x, matrix, sizes), matrix


KEPT = "kept"
"""What has this name is kept for the backward pass by the policy "dots" of `stack`."""


def kept(x: Array) -> Array:
    """The same, and costly enough to keep it instead of computing it again."""
    return checkpoint_name(x, KEPT)


class Linear(nn.Module):
    """y = x @ kernel, with kernel [*in, *out] read as a matrix [d_in, d_out].

    Where the "lora" collection has an entry at this kernel's path, its leaf turns y into
    the adapted output; no merged weight is formed. The kernel may be a
    `FrozenKernel`. On a mesh y is split by rows and as the kernel's outputs are.
    """

    out: tuple[int, ...]
    axes: tuple[str, ...]
    inputs: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T *in"], adapter_index: Int[Array, "B"] | None = None
    ) -> Float[Array, "B T *out"]:
        d_in = x.shape[x.ndim - self.inputs :]
        if self.has_variable("params", "kernel"):
            kernel: Any = self.get_variable("params", "kernel")
        else:
            init = nn.initializers.variance_scaling(
                1.0,
                "fan_in",
                "normal",
                in_axis=tuple(range(self.inputs)),
                out_axis=tuple(range(self.inputs, self.inputs + len(self.out))),
            )
            init = declare(init, self.axes, self.inputs)
            kernel = self.param("kernel", init, (*d_in, *self.out), self.param_dtype)
        if isinstance(kernel, FrozenKernel):
            # Gathered as it is stored, and not as what it stands for, which is larger.
            kernel = jax.tree.map(lambda part: constrain(part, self.axes), kernel)
        x = x.reshape(*x.shape[: x.ndim - self.inputs], -1).astype(self.dtype)
        y, matrix = multiply(x, kernel)
        if self.has_variable("lora", "kernel"):
            leaf = self.get_variable("lora", "kernel")
            key = self.make_rng("dropout") if self.has_rng("dropout") else None
            y = leaf.apply(x, matrix, y, adapter_index, key)
        y = kept(y)
        if self.use_bias:
            init = declare(nn.initializers.zeros, self.axes[self.inputs :])
            bias: Any = self.param("bias", init, self.out, self.param_dtype)
            y = y + _broadcast(bias.reshape(-1).astype(self.dtype), y)
        y = y.reshape(*y.shape[:-1], *self.out)
        return constrain(y, ("batch", None, *self.axes[self.inputs :]))


class Embed(nn.Module):
    """A table of vectors, of tokens or positions; that of tokens also serves as a tied head.

    Where the "lora" collection has an entry at the table's path, it is adapted in both roles.
    """

    rows: int
    width: int
    axis: str = "vocab"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        # A table of tokens is a matrix, of one-hot rows; rules may name it.
        inputs = int(self.axis == "vocab")
        init = declare(nn.initializers.normal(0.02), (self.axis, "embed"), inputs)
        self.embedding: Any = self.param(
            "embedding", init, (self.rows, self.width), self.param_dtype
        )

    def __call__(
        self, tokens: Int[Array, "B T"], adapter_index: Int[Array, "B"] | None = None
    ) -> Float[Array, "B T D"]:
        y = self.embedding[tokens].astype(self.dtype)
        if self.has_variable("lora", "embedding"):
            y = self.get_variable("lora", "embedding").look_up(tokens, y, adapter_index)
        return constrain(y, ("batch", None, "embed"))

    def attend(
        self,
        x: Float[Array, "*B D"],
        adapter_index: Int[Array, "B"] | None = None,
        tokens: Int[Array, "U"] | None = None,
    ) -> Float[Array, "*B U"]:
        """Products with the vectors of all rows, or of some."""
        table = self.embedding if tokens is None else self.embedding[tokens]
        # The table stands on the left: XLA on CPU would copy it to read it transposed.
        x = x.astype(self.dtype)
        logits = (table.astype(self.dtype) @ x.reshape(-1, x.shape[-1]).T).T
        logits = logits.reshape(*x.shape[:-1], -1)
        if self.has_variable("lora", "embedding"):
            leaf = self.get_variable("lora", "embedding").transposed()
            if tokens is not None:
                leaf = leaf.replace(b=leaf.b[..., tokens])
            logits = leaf.apply(x, None, logits, adapter_index)
        return logits


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467).

    With `offset` 1 the parameter is the scale's distance from one, as in Gemma.
    """

    eps: float
    offset: float = 0.0
    axis: str = "embed"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        start = nn.initializers.constant(1.0 - self.offset)
        scale: Any = self.param(
            "scale", declare(start, (self.axis,)), (x.shape[-1],), self.param_dtype
        )
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        normed = x * jax.lax.rsqrt(mean_square + self.eps)
        scale = scale.astype(jnp.float32) + self.offset
        return (normed * _broadcast(scale, x)).astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias, in float32 (Ba et al. 2016,
    arXiv 1607.06450)."""

    eps: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        inits = {"scale": nn.initializers.ones, "bias": nn.initializers.zeros}
        parameters: Any = (
            self.param(name, declare(init, ("embed",)), (x.shape[-1],), self.param_dtype)
            for name, init in inits.items()
        )
        x = x.astype(jnp.float32)
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.eps)
        scale, bias = (_broadcast(y.astype(jnp.float32), x) for y in parameters)
        return (normed * scale + bias).astype(self.dtype)


def _broadcast(vector, like):
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class FeedForward(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x)).

    Gated with "silu" it is SwiGLU (Shazeer 2020, arXiv 2002.05202, equation 6).
    """

    width: int
    ffn: int
    activation: str = "silu"
    gated: bool = True
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], adapter_index: Int[Array, "B"] | None = None
    ) -> Float[Array, "B T D"]:
        given = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        act = ACTIVATIONS[self.activation]
        up = Linear((self.ffn,), ("embed", "ffn"), name="up", **given)(x, adapter_index)
        if self.gated:
            gate = Linear((self.ffn,), ("embed", "ffn"), name="gate", **given)(x, adapter_index)
            inner = act(gate) * up
        else:
            inner = act(up)
        return Linear((self.width,), ("ffn", "embed"), name="down", **given)(inner, adapter_index)
