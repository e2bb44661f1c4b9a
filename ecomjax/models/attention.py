"""Grouped-query attention: one code path for training, prefill and decoding."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ecomjax.models.layers import Linear
from ecomjax.models.rope import rotate
from ecomjax.typing import PADDING_SEGMENT, SHARED_SEGMENT, KVCache

LayerCache = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]


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
    keys, queries = key_segments[:, None, :], query_segments[:, :, None]
    related = (keys == queries) | (keys == SHARED_SEGMENT)
    itself = slots[None, None, :] == own_slot[None, :, None]
    return (before & related & (keys != PADDING_SEGMENT)) | (itself & (queries == PADDING_SEGMENT))


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v, the softmax in float32.

    The N/K query heads of a key head are laid side by side, so that each of the two
    products is one batched matrix product over B and K; XLA on CPU is much slower on the
    equivalent five-axis einsum.
    """
    batch, t, heads, width = q.shape
    s, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    q = q.reshape(batch, t, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, group * t, width) * jnp.asarray(width**-0.5, q.dtype)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKTH,BKSH->BKTS", q, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, group, t, s)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKTS,BKSH->BKTH", weights.reshape(batch, kv_heads, group * t, s), v)
    out = out.reshape(batch, kv_heads, group, t, width).transpose(0, 3, 1, 2, 4)
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
        cache: LayerCache | None,
        first_slot: Int[Array, ""],
        adapter_index: Int[Array, "B"] | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        query_out, key_out = (self.heads, self.head_dim), (self.kv_heads, self.head_dim)
        key_axes = ("embed", "kv_heads", "head_dim")
        q = Linear(query_out, ("embed", "heads", "head_dim"), name="q", **types)(x, adapter_index)
        k = Linear(key_out, key_axes, name="k", **types)(x, adapter_index)
        v = Linear(key_out, key_axes, name="v", **types)(x, adapter_index)
        q = rotate(q, positions, self.rope_theta)
        k = rotate(k, positions, self.rope_theta)
        if cache is not None:
            start = (0, first_slot, 0, 0)
            k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), start)
            v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), start)
            cache = (k, v)
        out = attend(q, k.astype(q.dtype), v.astype(q.dtype), mask)
        project = Linear((self.width,), ("heads", "head_dim", "embed"), inputs=2, name="o", **types)
        return project(out, adapter_index), cache


def empty_cache(
    layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: Any
) -> KVCache:
    """A cache with no slot filled; memory is 2 L B S K H values."""
    shape = (layers, batch, slots, kv_heads, head_dim)
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.zeros((batch, slots), jnp.int32),
        segment_ids=jnp.full((batch, slots), PADDING_SEGMENT, jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )
