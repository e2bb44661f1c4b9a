"""Grouped-query attention: one code path for training, prefill and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ecomjax.models.layers import Linear
from ecomjax.models.rope import rotate
from ecomjax.typing import PADDING_SEGMENT, SHARED_SEGMENT, KVCache


class KeyValues(NamedTuple):
    """Keys and values of one layer, as attention reads them; B is 1 where all rows share them."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]


class StackedCache(NamedTuple):
    """The caches of all layers, carried through them; each layer updates its own slots."""

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]


def make_mask(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"], first_query: Int[Array, ""]
) -> Bool[Array, "B T S"]:
    """Which key slots each query slot sees.

    Those at or before its own slot (the first query stands at slot `first_query` of the
    keys), of its own segment or of the shared prefix, never padding. A padding query sees
    itself alone, so that its softmax stays finite.
    """
    slots = jnp.arange(key_segments.shape[1], dtype=jnp.int32)
    own_slot = first_query + jnp.arange(query_segments.shape[1], dtype=jnp.int32)
    before = slots[None, None, :] <= own_slot[None, :, None]
    itself = slots[None, None, :] == own_slot[None, :, None]
    padding = (query_segments == PADDING_SEGMENT)[:, :, None]
    return (before & related(query_segments, key_segments)) | (itself & padding)


def related(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "#B S"]
) -> Bool[Array, "B T S"]:
    """Where key and query are of one segment, or the key is of the shared one; never padding."""
    keys, queries = key_segments[:, None, :], query_segments[:, :, None]
    live = (keys != PADDING_SEGMENT) & (queries != PADDING_SEGMENT)
    return live & ((keys == queries) | (keys == SHARED_SEGMENT))


def attend(
    q: Float[Array, "B T N H"], parts: Sequence[tuple[KeyValues, Bool[Array, "B T _"]]]
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v over the slots of all parts together, the softmax in float32.

    The N/K query heads of a key head are laid side by side, so that each product is one
    batched matrix product over B and K, and over K alone where all rows share the keys;
    XLA on CPU is much slower on the equivalent five-axis einsum.

    Args:
        q: queries.
        parts: keys and values with their masks [B, T, S]; S may differ between parts.
    """
    batch, t, heads, width = q.shape
    kv_heads = parts[0][0].keys.shape[1]
    group = heads // kv_heads
    q = q.reshape(batch, t, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, group * t, width) * jnp.asarray(width**-0.5, q.dtype)

    def product(letters: str, x: Array, y: Array, dtype: Any) -> Array:
        if y.shape[0] == 1:
            letters, y = letters.replace(",B", ","), y[0]
        return jnp.einsum(letters, x, y, preferred_element_type=dtype)

    scores = []
    for part, mask in parts:
        score = product("BKTH,BKSH->BKTS", q, part.keys.astype(q.dtype), jnp.float32)
        score = score.reshape(batch, kv_heads, group, t, -1)
        scores.append(jnp.where(mask[:, None, None], score, jnp.finfo(jnp.float32).min))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    weights = weights.reshape(batch, kv_heads, group * t, -1)
    ends = [int(n) for n in np.cumsum([part.keys.shape[2] for part, _ in parts])]
    out = sum(
        product("BKTS,BKSH->BKTH", w, part.values.astype(q.dtype), q.dtype)
        for w, (part, _) in zip(jnp.split(weights, ends[:-1], axis=-1), parts, strict=True)
    )
    out = jnp.asarray(out).reshape(batch, kv_heads, group, t, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, t, heads, width)


class Attention(nn.Module):
    """Projections, rotation, cache update and attention of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    width: int
    rope_theta: float
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        prefix: tuple[KeyValues, Bool[Array, "B T P"]] | None,
        cache: StackedCache | None,
        layer: Int[Array, ""],
        first_slot: Int[Array, ""],
        adapter_index: Int[Array, "B"] | None,
    ) -> tuple[Float[Array, "B T D"], StackedCache | None]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        query_out, key_out = (self.heads, self.head_dim), (self.kv_heads, self.head_dim)
        key_axes = ("embed", "kv_heads", "head_dim")
        q = Linear(query_out, ("embed", "heads", "head_dim"), name="q", **types)(x, adapter_index)
        k = Linear(key_out, key_axes, name="k", **types)(x, adapter_index)
        v = Linear(key_out, key_axes, name="v", **types)(x, adapter_index)
        q = rotate(q, positions, self.rope_theta)
        k = rotate(k, positions, self.rope_theta).transpose(0, 2, 1, 3)
        own = KeyValues(k, v.transpose(0, 2, 1, 3))
        if cache is not None:
            start = (layer, 0, 0, first_slot, 0)
            cache = StackedCache(
                *(
                    jax.lax.dynamic_update_slice(stack, new[None].astype(stack.dtype), start)
                    for stack, new in zip(cache, own, strict=True)
                )
            )
            own = KeyValues(*(stack[layer] for stack in cache))
        out = attend(q, [(own, mask)] if prefix is None else [prefix, (own, mask)])
        project = Linear((self.width,), ("heads", "head_dim", "embed"), inputs=2, name="o", **types)
        return project(out, adapter_index), cache


def empty_cache(
    layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: Any
) -> KVCache:
    """A cache with no slot filled; memory is 2 L B S K H values."""
    shape = (layers, batch, kv_heads, slots, head_dim)
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.zeros((batch, slots), jnp.int32),
        segment_ids=jnp.full((batch, slots), PADDING_SEGMENT, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )
