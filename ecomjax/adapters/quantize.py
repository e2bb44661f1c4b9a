"""A frozen base in 8 or 4 bits, to train adapters beside (QLoRA: Dettmers et al. 2023,
arXiv 2305.14314).

A transform over a parameter dict, like an adapter: each chosen kernel is replaced by a struct
that stands for it (`typing.FrozenKernel`), and the model does not know. The arrays of the
struct have the kernel's axes, so that they are scanned and split over devices as it was.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, UInt8

from ecomjax import trees
from ecomjax.adapters.rules import EVERY_LINEAR
from ecomjax.errors import UserError
from ecomjax.typing import ParamAxes, Params

Kind = Literal["int8", "nf4"]

NF4_CODE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of NormalFloat4 (appendix E): quantiles of the normal distribution, and 0."""

LARGEST_BLOCK = 64
"""Weights that share a scale in NF4, at most (section 3)."""


def _multiply(x, kernel, sizes):
    """x @ kernel, expert by expert where there are sizes."""
    if sizes is None:
        return kernel.reshape(x.shape[-1], -1).multiplied(x)
    return jax.lax.ragged_dot(x, kernel.astype(x.dtype), sizes)


def _forward(x, kernel, sizes):
    """Keeps the codes for the backward pass, in the shape they came in, so as not to copy them.

    Left to itself, jax keeps what it multiplied with: the weights of all layers of a scan,
    dequantized.
    """
    return _multiply(x, kernel, sizes), (kernel, sizes)


def _backward(kept, dy):
    """dx = dy @ kernel^T, dequantized once more; the kernel has no gradient."""
    kernel, sizes = kept
    experts = 1 if sizes is None else sizes.size
    d_in = math.prod(kernel.shape) // (experts * dy.shape[-1])
    x = jax.ShapeDtypeStruct((dy.shape[0], d_in), dy.dtype)
    (dx,) = jax.linear_transpose(lambda x: _multiply(x, kernel, sizes), x)(dy)
    return dx, None, None


_product = jax.custom_vjp(_multiply)
_product.defvjp(_forward, _backward)


class _Frozen:
    """What quantized kernels have in common."""

    codes: Any
    ndim = property(lambda self: self.codes.ndim)

    def matmul(
        self, x: Float[Array, "*B d_in"], sizes: Int[Array, "E"] | None = None
    ) -> Float[Array, "*B d_out"]:
        y = _product(x.reshape(-1, x.shape[-1]), self, sizes)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class Int8Kernel(_Frozen, flax.struct.PyTreeNode):
    """Symmetric int8: w' = codes * scale, with scale = max|w| / 127 over a column of inputs.

    |w - w'| <= max|w| / 254.
    """

    codes: Int8[Array, "*stack *in *out"]
    scale: Float[Array, "*stack *ones *out"]
    dtype: Any = flax.struct.field(pytree_node=False)
    """Of the kernel it stands for."""

    @classmethod
    def of(cls, kernel: Float[Array, "*in *out"], inputs: int) -> Int8Kernel:
        """Of one kernel, the first `inputs` of its axes contracted."""
        w = kernel.astype(jnp.float32)
        scale = jnp.abs(w).max(axis=tuple(range(inputs)), keepdims=True) / 127.0
        return cls(jnp.round(_divide(w, scale)).astype(jnp.int8), scale, kernel.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def reshape(self, d_in: int, d_out: int) -> Int8Kernel:
        return self.replace(
            codes=self.codes.reshape(d_in, d_out), scale=self.scale.reshape(1, d_out)
        )

    @property
    def scales(self) -> tuple[Array, ...]:
        return (self.scale,)

    def astype(self, dtype: Any) -> Float[Array, "*stack *in *out"]:
        return (jnp.asarray(self.codes, jnp.float32) * self.scale).astype(dtype)

    def multiplied(self, x):
        """(x @ codes) * scale: codes are exact in any dtype, scaled weights would be rounded."""
        return (x @ jnp.asarray(self.codes, x.dtype)) * self.scale.astype(x.dtype)


class NF4Kernel(_Frozen, flax.struct.PyTreeNode):
    """NormalFloat4 in blocks of inputs, with double quantization (section 3 of the paper).

    w' = NF4_CODE[code] * m, where m = low + step * absmax is the largest |w| of a block, itself
    in 8 bits. Blocks lie along the last input axis: the largest even divisor of it up to 64.
    Adjacent inputs share a byte, the first in its high half.

    With gap = 0.304, the largest of NF4_CODE: |w - w'| <= max(gap / 2 * m, step / 2).

    The paper codes the m's of 256 blocks together, in 8-bit floats about their mean. Here those
    of a column are coded together, evenly from the least to the largest, so that the constants
    of the second quantization keep the output axes and are split with them.
    """

    codes: UInt8[Array, "*stack *halved *out"]
    absmax: UInt8[Array, "*stack *blocks *out"]
    low: Float[Array, "*stack *ones *out"]
    step: Float[Array, "*stack *ones *out"]
    dtype: Any = flax.struct.field(pytree_node=False)
    """Of the kernel it stands for."""
    outputs: int = flax.struct.field(pytree_node=False)
    """How many axes follow the input axes."""

    @classmethod
    def of(cls, kernel: Float[Array, "*in *out"], inputs: int) -> NF4Kernel:
        """Of one kernel, the first `inputs` of its axes contracted; the last of them is even."""
        before, size, out = _around(kernel.shape, inputs - 1)
        block = block_size(size)
        w = kernel.astype(jnp.float32).reshape(*before, size // block, block, *out)
        m = jnp.abs(w).max(axis=inputs)
        columns = tuple(range(inputs))
        low = m.min(axis=columns, keepdims=True)
        step = (m.max(axis=columns, keepdims=True) - low) / 255.0
        absmax = jnp.round(_divide(m - low, step)).astype(jnp.uint8)
        scale = jnp.expand_dims(low + step * absmax.astype(jnp.float32), inputs)
        code = np.asarray(NF4_CODE, np.float32)
        nearest = jnp.searchsorted(
            (code[1:] + code[:-1]) / 2, _divide(w, scale), method="compare_all"
        )
        pairs = nearest.astype(jnp.uint8).reshape(*before, size // 2, 2, *out)
        high, low_half = (jax.lax.index_in_dim(pairs, i, inputs, keepdims=False) for i in (0, 1))
        return cls((high << 4) | low_half, absmax, low, step, kernel.dtype, len(out))

    @property
    def shape(self) -> tuple[int, ...]:
        before, size, out = _around(self.codes.shape, self._axis)
        return (*before, 2 * size, *out)

    @property
    def _axis(self) -> int:
        """The last input axis."""
        return self.codes.ndim - self.outputs - 1

    def reshape(self, d_in: int, d_out: int) -> NF4Kernel:
        block = 2 * self.codes.shape[self._axis] // self.absmax.shape[self._axis]
        return self.replace(
            codes=self.codes.reshape(d_in // 2, d_out),
            absmax=self.absmax.reshape(d_in // block, d_out),
            low=self.low.reshape(1, d_out),
            step=self.step.reshape(1, d_out),
            outputs=1,
        )

    @property
    def scales(self) -> tuple[Array, ...]:
        return (self.low, self.step)

    def astype(self, dtype: Any) -> Float[Array, "*stack *in *out"]:
        axis = self._axis
        before, blocks, out = _around(self.absmax.shape, axis)
        codes = jnp.stack([self.codes >> 4, self.codes & 15], axis=axis + 1)
        values = jnp.asarray(NF4_CODE, jnp.float32)[codes].reshape(*before, blocks, -1, *out)
        m = self.low + self.step * jnp.asarray(self.absmax, jnp.float32)
        return (values * jnp.expand_dims(m, axis + 1)).astype(dtype).reshape(self.shape)

    def multiplied(self, x):
        return x @ self.astype(x.dtype)


KINDS: dict[str, type[Int8Kernel] | type[NF4Kernel]] = {"int8": Int8Kernel, "nf4": NF4Kernel}


def quantize(
    params: Params,
    axes: Params,
    kind: Kind,
    pattern: str = EVERY_LINEAR,
    place: Callable[[str, Any], Any] = lambda path, kernel: kernel,
) -> Params:
    """The parameters with every kernel that matches `pattern` quantized, one matrix at a time.

    Args:
        params: the base, stacked; numpy arrays are brought to the device matrix by matrix.
        axes: `ParamAxes` at the same paths.
        kind: a name of `KINDS`.
        pattern: regular expression over whole paths.
        place: puts a quantized kernel, given its path, where it stays, before the next is made.

    Raises:
        UserError: the pattern matches no kernel, a kernel is not finite, or its last input
            axis is odd (NF4).
    """
    flat, described = trees.flatten(params), trees.flatten(axes)
    chosen = [p for p in flat if described[p].inputs and re.fullmatch(pattern, p)]
    if not chosen:
        raise UserError("no kernel to quantize", f"pattern '{pattern}'", "give another pattern")
    for path in chosen:
        kernel, of = flat[path], described[path]
        if kind == "nf4" and (size := kernel.shape[of.stacked + of.inputs - 1]) % 2:
            raise UserError(
                f"its last input axis of {size} is odd, and NF4 packs inputs in pairs",
                path,
                "use int8, or a pattern without this kernel",
            )
        flat[path] = place(path, quantize_kernel(kernel, of, kind))
        if isinstance(kernel, jax.core.Tracer):
            continue  # Of shapes alone, under `jax.eval_shape`.
        # What is not finite in a kernel is not in its scales.
        if not all(jnp.isfinite(x).all() for x in flat[path].scales):
            raise UserError("weights that are not finite", path, "mend the weights of the base")
    return trees.unflatten(flat)


def quantize_kernel(
    kernel: Float[Array, "..."] | Float[np.ndarray, "..."], axes: ParamAxes, kind: Kind
) -> Int8Kernel | NF4Kernel:
    """One kernel, matrix by matrix of its stack."""
    shape = kernel.shape[: axes.stacked]
    made = [_of_matrix(kernel[i], KINDS[kind], axes.inputs) for i in np.ndindex(shape)]
    return jax.tree.map(lambda *xs: jnp.stack(xs).reshape(*shape, *xs[0].shape), *made)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _of_matrix(kernel, kind, inputs):
    return kind.of(kernel, inputs)


def block_size(size: int) -> int:
    """The largest even divisor, up to `LARGEST_BLOCK`, of an axis of even size."""
    return max(block for block in range(2, LARGEST_BLOCK + 1, 2) if size % block == 0)


class Ratios(NamedTuple):
    """Bytes as a fraction of those of the same weights in bfloat16."""

    kernels: float
    """Of the quantized kernels."""
    model: float
    """Of all parameters, those that are not quantized in the dtype that they have."""


def ratios(params: Params) -> Ratios:
    """How much smaller a quantized model is; also of its shapes alone."""
    quantized = {p: x for p, x in trees.flatten(params).items() if isinstance(x, _Frozen)}
    return Ratios(*(trees.bytes_of(t) / (2 * trees.count(t)) for t in (quantized, params)))


def _divide(x, by):
    """x / by, and 0 where by is 0."""
    return jnp.where(by > 0, x / jnp.where(by > 0, by, 1.0), 0.0)


def _around(shape, axis):
    """The axes before one, its size, and the axes behind."""
    return shape[:axis], shape[axis], shape[axis + 1 :]
