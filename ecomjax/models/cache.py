"""How the keys and values of slots are held: as the model computes, or as int8."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ecomjax.sharding import constrain
from ecomjax.typing import PADDING_SEGMENT, Int8Vectors, KVCache


class StackedCache(NamedTuple):
    """The caches of all layers, carried through them; each layer updates its own slots."""

    keys: Float[Array, "L B K S H"] | Int8Vectors
    values: Float[Array, "L B K S H"] | Int8Vectors

    def written(
        self,
        layer: Int[Array, ""] | None,
        first_slot: Int[Array, ""] | None,
        keys: Float[Array, "B K T H"],
        values: Float[Array, "B K T H"],
    ) -> StackedCache:
        """With those of T slots of a layer, from the first on, held as the others are."""
        start: Any = (layer, 0, 0, first_slot, 0)

        def write(stack, new):
            new = Int8Vectors.of(new) if isinstance(stack, Int8Vectors) else new.astype(stack.dtype)
            return jax.tree.map(
                lambda old, own: jax.lax.dynamic_update_slice(old, own[None], start), stack, new
            )

        return StackedCache(write(self.keys, keys), write(self.values, values))


def empty_cache(
    layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: Any
) -> KVCache:
    """A cache with no slot filled; memory is 2 L B S K H values.

    The dtype int8 stands for `Int8Vectors`, which add four bytes to every H values.
    """

    def empty(width: int, dtype: Any) -> Array:
        zeros = jnp.zeros((layers, batch, kv_heads, slots, width), dtype)
        return constrain(zeros, (None, "batch", "kv_heads", None, None))

    def vectors() -> Array | Int8Vectors:
        if dtype == jnp.int8:
            return Int8Vectors(empty(head_dim, jnp.int8), empty(1, jnp.float32))
        return empty(head_dim, dtype)

    return KVCache(
        keys=vectors(),
        values=vectors(),
        positions=jnp.zeros((batch, slots), jnp.int32),
        segment_ids=jnp.full((batch, slots), PADDING_SEGMENT, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )
