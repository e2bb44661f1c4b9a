"""Axis letters, tree aliases and the small structs that rooms hand to each other.

Axis letters, the same in einsum strings, docstrings and jaxtyping annotations:
    B batch (rows)           T query positions (slots)    S key positions (slots)
    D model width            N query heads                K key/value heads
    H head width             F feed-forward width         V vocabulary
    E experts                L layers                     R LoRA rank
    A adapters held at once
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int8

Params = dict[str, Any]
"""Nested dict of arrays (or of quantized kernels): the weights of a model."""

Adapter = dict[str, Any]
"""Nested dict with the paths of the adapted kernels in `Params`; leaves are `AdapterLeaf`s."""

PADDING_SEGMENT = 0
"""Segment id of slots that hold nothing: never attended to, never a target."""

SHARED_SEGMENT = -1
"""Segment id of a prefix that every segment of its row attends to."""

BRANCHES = 2**16
"""A segment s may have branches, s * BRANCHES + i for i < BRANCHES, which attend to it and each to
itself: so the labels of a prompt follow it side by side. Those below BRANCHES are no branches."""


class Batch(flax.struct.PyTreeNode):
    """Packed rows of token sequences.

    Segments 1, 2, ... of a row are independent sequences, and each may have `BRANCHES`; a query
    slot sees the key slots before it that are of its own segment, of the one that it branches
    from, or of the shared prefix. Positions count from 0 in every sequence, shared prefix and
    what it branches from included, as if it stood alone.
    """

    tokens: Int[Array, "*B T"]
    positions: Int[Array, "*B T"]
    segment_ids: Int[Array, "*B T"]
    targets: Int[Array, "*B T"]
    """The token to be predicted at each slot, that is the next one of its sequence."""
    weights: Float[Array, "*B T"]
    """1 where the target counts in the loss, else 0."""
    groups: Int[Array, "*B"] | None = None
    """Which group (task) a row is of, where several are trained together."""


class LabelledBatch(Batch):
    """Packed rows of what an encoder reads; targets are classes.

    The class of a word stands at its first token, that of a whole sequence at the sequence's
    first one. Rows have no shared prefix.
    """

    token_types: Int[Array, "*B T"] | None = None
    """Which text of a pair a token is of."""


class PairBatch(Batch):
    """Packed rows of what an encoder-decoder writes, and of what each of them answers.

    A source has the segment id of its target; both count their positions from 0.
    """

    sources: Int[Array, "*B S"] | None = None
    """Tokens."""
    source_positions: Int[Array, "*B S"] | None = None
    source_segment_ids: Int[Array, "*B S"] | None = None


class Int8Vectors(flax.struct.PyTreeNode):
    """Vectors of H numbers as int8, each with a scale of its own, by its largest magnitude.

    A number is `levels * scale`, off by at most half of `scale`. Both arrays have the axes of
    the vectors, so that slots, rows and layers of them are cut and joined as those of an array.
    """

    levels: Int8[Array, "*B H"]
    scale: Float32[Array, "*B 1"]

    @classmethod
    def of(cls, vectors: Float[Array, "*B H"]) -> Int8Vectors:
        """The nearest to these vectors."""
        exact = vectors.astype(jnp.float32)
        scale = jnp.abs(exact).max(axis=-1, keepdims=True) / jnp.float32(127)
        # A vector of zeros has no scale to be divided by.
        levels = jnp.round(exact / jnp.where(scale > 0, scale, jnp.float32(1)))
        return cls(levels.astype(jnp.int8), scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the vectors."""
        return self.levels.shape

    def astype(self, dtype: Any) -> Float[Array, "*B H"]:
        """The vectors as an array."""
        return (self.levels.astype(jnp.float32) * self.scale).astype(dtype)


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of the slots seen so far; passed in and returned, never hidden.

    The slots of a key head lie side by side, as attention reads them.

    Slots are filled for the whole batch at once; shorter rows hold padding slots
    (segment 0), which no query attends to.
    """

    keys: Float[Array, "L B K S H"] | Int8Vectors
    values: Float[Array, "L B K S H"] | Int8Vectors
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]
    """The slot that is filled next: in order, the number of those filled. Whoever sets it back
    fills slots again."""


class ParamAxes(flax.struct.PyTreeNode):
    """Logical axis names of a parameter, and how it is read as a matrix.

    `names` leads with the stacked axes ("layers", "experts"); then come `inputs`
    contracted axes, then the output axes. A parameter that is no matrix has inputs 0.
    """

    names: tuple[str, ...] = flax.struct.field(pytree_node=False)
    inputs: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def stacked(self) -> int:
        return sum(name in ("layers", "experts") for name in self.names)


@runtime_checkable
class AdapterLeaf(Protocol):
    """What stands at the path of an adapted kernel.

    A kernel is seen as a matrix [d_in, d_out], whatever its head axes; `x` and `y` are
    flattened likewise. Leaves stack over leading layer, expert and adapter axes. Those of
    experts that run on their own rows alone have `apply_ragged` too, as `LowRank` does.
    """

    fixed: tuple[str, ...]
    """Names of the fields that are constants, not trained."""

    def apply(
        self,
        x: Float[Array, "*B d_in"],
        kernel: Any,
        y: Float[Array, "*B d_out"],
        index: Int[Array, "B"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "*B d_out"]:
        """The adapted output for input `x`, given the base output `y = x @ kernel`."""
        ...

    def delta(self, kernel: Any) -> Float[Array, "..."]:
        """What the adapter adds to `kernel`, in float32 and in the kernel's shape."""
        ...


@runtime_checkable
class FrozenKernel(Protocol):
    """A kernel that is no array and never trained, such as a quantized one.

    Its arrays lead with the stacked axes and have as many axes as the kernel it stands for,
    so that layers and experts are sliced off and split over devices as those of an array.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel it stands for."""
        ...

    @property
    def dtype(self) -> Any:
        """Of the kernel it stands for."""
        ...

    def reshape(self, d_in: int, d_out: int) -> FrozenKernel:
        """One kernel, of no stack, as a matrix."""
        ...

    def astype(self, dtype: Any) -> Float[Array, "..."]:
        """The kernel as an array."""
        ...

    def matmul(
        self, x: Float[Array, "*B d_in"], sizes: Int[Array, "E"] | None = None
    ) -> Float[Array, "*B d_out"]:
        """x @ kernel, of no stack, in the dtype of x, which alone gets a gradient.

        With sizes, of kernels [E, d_in, d_out] and rows [M, d_in] that lie expert by expert.
        """
        ...


def matmul(
    x: Float[Array, "*B d_in"], matrix: Float[Array, "d_in d_out"]
) -> Float[Array, "*B d_out"]:
    """x @ matrix, with the leading axes of x made one.

    The gradient of a product with more axes transposes its operands in memory: on a CPU
    that took longer than the products of a whole training step.
    """
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], matrix.shape[-1])


class LowRank(flax.struct.PyTreeNode):
    """LoRA: y + scale * (x @ a) @ b (Hu et al. 2021, arXiv 2106.09685, equation 3).

    `index` picks, for each row of the batch, one of several adapters held along the
    axis before the factors.
    """

    a: Float[Array, "*stack d_in R"]
    b: Float[Array, "*stack R d_out"]
    scale: Float[Array, "*stack"]
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    ranks: Int[Array, "*stack"] | None = None
    """True ranks, where matrices of the stack differ in them; factors are padded with zeros,
    which stay zero in training. None: all have R."""

    fixed = ("scale", "ranks")

    def apply(self, x, kernel, y, index=None, key=None):
        del kernel
        x, a, b, scale = self._operands(x, key)
        # Scaled where it is small, forward and backward.
        if index is None:
            return y + matmul(scale * matmul(x, a), b)
        inner = jnp.einsum("B...d,Bdr->B...r", x, a[index])
        return y + jnp.einsum("B...r,Bre->B...e", _by_row(scale[index], inner) * inner, b[index])

    def apply_ragged(self, x, kernel, y, sizes, index=None, key=None):
        """`apply` of an expert axis to rows [M, d_in] that lie expert by expert.

        The first sizes[0] rows are of expert 0, and so on. Where `index` [M] picks one of
        several adapters, the rows of each expert lie adapter by adapter.
        """
        del kernel
        x, a, b, scale = self._operands(x, key)
        if index is not None:
            experts, adapters = scale.shape
            expert = _expert_of_row(sizes, x.shape[0])
            sizes = jnp.bincount(expert * adapters + index, length=experts * adapters)
            a, b, scale = (z.reshape(-1, *z.shape[2:]) for z in (a, b, scale))
        inner = jax.lax.ragged_dot(x, a, sizes)
        return y + jax.lax.ragged_dot(inner, scale[:, None, None] * b, sizes)

    def look_up(self, tokens, y, index=None):
        """`apply` to one-hot rows: of a table of vectors, given those of the base as `y`."""
        a, b, scale = (z.astype(y.dtype) for z in (self.a, self.b, self.scale))
        if index is None:
            return y + scale * matmul(a[tokens], b)
        rows = a[index[:, None], tokens]
        return y + _by_row(scale[index], y) * jnp.einsum("BTr,Bre->BTe", rows, b[index])

    def transposed(self) -> LowRank:
        """Of the transposed kernel, as a tied head is."""
        return self.replace(a=self.b.swapaxes(-1, -2), b=self.a.swapaxes(-1, -2))

    def _operands(self, x, key):
        """Input with some of it dropped, factors and scale, all of the input's dtype."""
        if key is not None and self.dropout > 0.0:
            keep = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1.0 - self.dropout), jnp.zeros_like(x))
        return x, *(z.astype(x.dtype) for z in (self.a, self.b, self.scale))

    def delta(self, kernel):
        product = self.a.astype(jnp.float32) @ self.b.astype(jnp.float32)
        return (self.scale[..., None, None] * product).reshape(kernel.shape)


class DoRA(flax.struct.PyTreeNode):
    """DoRA: magnitude * V / |V| with V = W + scale * a @ b, norms |V| by output.

    Liu et al. 2024, arXiv 2402.09353, equation 5. The norms are constants to the gradient
    (section 4.3), and V is never formed to find them. Dropout is of the low-rank part alone.
    """

    a: Float[Array, "*stack d_in R"]
    b: Float[Array, "*stack R d_out"]
    scale: Float[Array, "*stack"]
    magnitude: Float[Array, "*stack d_out"]
    dropout: float = flax.struct.field(pytree_node=False, default=0.0)
    ranks: Int[Array, "*stack"] | None = None
    """See `LowRank`."""

    fixed = ("scale", "ranks")

    @property
    def low_rank(self) -> LowRank:
        """What is added to the kernel before it is scaled."""
        return LowRank(self.a, self.b, self.scale, self.dropout, self.ranks)

    def apply(self, x, kernel, y, index=None, key=None):
        adapted = self.low_rank.apply(x, kernel, y, index, key)
        gain = self.gain(kernel).astype(y.dtype)
        if index is None:
            return jnp.broadcast_to(gain, y.shape) * adapted
        return _by_row(gain[index], y) * adapted

    def apply_ragged(self, x, kernel, y, sizes, index=None, key=None):
        """See `LowRank.apply_ragged`."""
        adapted = self.low_rank.apply_ragged(x, kernel, y, sizes, index, key)
        gain = self.gain(kernel).astype(y.dtype)
        expert = _expert_of_row(sizes, x.shape[0])
        return (gain[expert] if index is None else gain[expert, index]) * adapted

    def gain(self, kernel: Any) -> Float[Array, "*stack d_out"]:
        """magnitude / |V| for a kernel [*stack, d_in, d_out], without an adapter axis.

        |W + s a b|^2 = |W|^2 + 2 s sum((W^T a) * b^T) + s^2 sum((b^T a^T a) * b^T).
        """
        w, a, b, s = (
            jax.lax.stop_gradient(z.astype(jnp.float32))
            for z in (kernel, self.a, self.b, self.scale[..., None])
        )
        if w.ndim < a.ndim:
            w = jnp.expand_dims(w, -3)
        w = jnp.broadcast_to(w, (*a.shape[:-1], w.shape[-1]))
        across = (jnp.einsum("...io,...ir->...ro", w, a) * b).sum(axis=-2)
        own = (((a.swapaxes(-1, -2) @ a) @ b) * b).sum(axis=-2)
        square = jnp.square(w).sum(axis=-2) + 2.0 * s * across + jnp.square(s) * own
        norm = jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))
        return self.magnitude.astype(jnp.float32) / norm

    def delta(self, kernel):
        stack, d_out = self.a.shape[:-2], self.b.shape[-1]
        w = kernel.astype(jnp.float32).reshape(*stack, -1, d_out)
        adapted = w + self.low_rank.delta(w)
        return (self.gain(w)[..., None, :] * adapted - w).reshape(kernel.shape)


def _by_row(values, like):
    """What rows [B] have of each, beside an array [B, ..., *]."""
    spread = (1,) * (like.ndim - values.ndim) if values.ndim > 1 else (1,) * (like.ndim - 1)
    return values.reshape(values.shape[0], *spread, *values.shape[1:])


def _expert_of_row(sizes, rows: int):
    """The expert of each of the rows that lie expert by expert; E for those behind them."""
    numbers = jnp.arange(rows, dtype=jnp.int32)
    return jnp.searchsorted(jnp.cumsum(sizes), numbers, side="right").astype(jnp.int32)
