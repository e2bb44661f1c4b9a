"""Linear, embedding and normalisation layers that declare the logical axes of their weights."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ecomjax.typing import ParamAxes, matmul


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


class Linear(nn.Module):
    """y = x @ kernel, with kernel [*in, *out] read as a matrix [d_in, d_out].

    Where the "lora" collection has an entry at this kernel's path, its leaf turns y into
    the adapted output; no merged weight is formed. The kernel itself may be any struct
    with an array's `reshape` and `astype`, such as a quantized one that dequantizes there.
    """

    out: tuple[int, ...]
    axes: tuple[str, ...]
    inputs: int = 1
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
        x = x.reshape(*x.shape[: x.ndim - self.inputs], -1).astype(self.dtype)
        matrix = jnp.asarray(kernel.reshape(x.shape[-1], -1).astype(self.dtype))
        y = matmul(x, matrix)
        if self.has_variable("lora", "kernel"):
            leaf = self.get_variable("lora", "kernel")
            key = self.make_rng("dropout") if self.has_rng("dropout") else None
            y = leaf.apply(x, matrix, y, adapter_index, key)
        return y.reshape(*y.shape[:-1], *self.out)


class Embed(nn.Module):
    """Token embedding that also serves as a tied head."""

    vocab_size: int
    width: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        init = declare(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.embedding: Any = self.param(
            "embedding", init, (self.vocab_size, self.width), self.param_dtype
        )

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.embedding[tokens].astype(self.dtype)

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        # The table stands on the left: XLA on CPU would copy it to read it transposed.
        flat = x.astype(self.dtype).reshape(-1, x.shape[-1])
        logits = (self.embedding.astype(self.dtype) @ flat.T).T
        return logits.reshape(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    eps: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale: Any = self.param(
            "scale", declare(nn.initializers.ones, ("embed",)), (x.shape[-1],), self.param_dtype
        )
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        normed = x * jax.lax.rsqrt(mean_square + self.eps)
        shape = (1,) * (x.ndim - 1) + scale.shape
        return (normed * scale.astype(jnp.float32).reshape(shape)).astype(self.dtype)
