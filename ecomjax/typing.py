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
from jaxtyping import Array, Float, Int

Params = dict[str, Any]
"""Nested dict of arrays (or of quantized kernels): the weights of a model."""

Adapter = dict[str, Any]
"""Nested dict with the paths of the adapted kernels in `Params`; leaves are `AdapterLeaf`s."""

PADDING_SEGMENT = 0
"""Segment id of slots that hold nothing: never attended to, never a target."""

SHARED_SEGMENT = -1
"""Segment id of a prefix that every segment of its row attends to."""


class Batch(flax.struct.PyTreeNode):
    """Packed rows of token sequences.

    Segments 1, 2, ... of a row are independent sequences; a query slot sees the key
    slots before it that are of its own segment or of the shared prefix. Positions count
    from 0 in every sequence, shared prefix included, as if it stood alone.
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


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of the slots seen so far; passed in and returned, never hidden.

    The slots of a key head lie side by side, as attention reads them.

    Slots are filled in order for the whole batch at once; shorter rows hold padding
    slots (segment 0), which no query attends to.
    """

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]
    """Number of slots filled."""


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

    fixed = ("scale",)

    def apply(self, x, kernel, y, index=None, key=None):
        del kernel
        x, a, b, scale = self._operands(x, key)
        if index is None:
            return y + scale * matmul(matmul(x, a), b)
        chosen = jnp.einsum("B...d,Bdr,Bre->B...e", x, a[index], b[index])
        return y + scale[index].reshape(-1, *[1] * (y.ndim - 1)) * chosen

    def apply_ragged(self, x, kernel, y, sizes, index=None, key=None):
        """`apply` of an expert axis to rows [M, d_in] that lie expert by expert.

        The first sizes[0] rows are of expert 0, and so on. Where `index` [M] picks one of
        several adapters, the rows of each expert lie adapter by adapter.
        """
        del kernel
        x, a, b, scale = self._operands(x, key)
        if index is not None:
            experts, adapters = scale.shape
            numbers = jnp.arange(experts, dtype=index.dtype)
            expert = jnp.repeat(numbers, sizes, total_repeat_length=x.shape[0])
            sizes = jnp.bincount(expert * adapters + index, length=experts * adapters)
            a, b, scale = (z.reshape(-1, *z.shape[2:]) for z in (a, b, scale))
        inner = jax.lax.ragged_dot(x, a, sizes)
        return y + jax.lax.ragged_dot(inner, scale[:, None, None] * b, sizes)

    def _operands(self, x, key):
        """Input with some of it dropped, factors and scale, all of the input's dtype."""
        if key is not None and self.dropout > 0.0:
            keep = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1.0 - self.dropout), jnp.zeros_like(x))
        return x, *(z.astype(x.dtype) for z in (self.a, self.b, self.scale))

    def delta(self, kernel):
        product = self.a.astype(jnp.float32) @ self.b.astype(jnp.float32)
        return (self.scale[..., None, None] * product).reshape(kernel.shape)
