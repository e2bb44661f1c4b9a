"""Grouped-query attention: one code path for training, prefill and decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ecomjax.models import flash
from ecomjax.models.cache import StackedCache
from ecomjax.models.layers import Linear, kept
from ecomjax.models.rope import Rotation, rotate
from ecomjax.typing import BRANCHES, PADDING_SEGMENT, SHARED_SEGMENT, Int8Vectors


class KeyValues(NamedTuple):
    """Keys and values of one layer, as attention reads them; B is 1 where all rows share them."""

    keys: Float[Array, "B K S H"] | Int8Vectors
    values: Float[Array, "B K S H"] | Int8Vectors


def make_mask(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"], first_query: Int[Array, ""]
) -> Bool[Array, "B T S"]:
    """Which key slots each query slot sees.

    Those of its own segment, of the one that it branches from, or of the shared prefix, never
    padding, and none of the queries behind it (the first stands at slot `first_query` of the
    keys, and the others follow). All other slots hold what came before, wherever they are. A
    padding query sees itself alone, so that its softmax stays finite.
    """
    slots = jnp.arange(key_segments.shape[1], dtype=jnp.int32)
    own_slot = first_query + jnp.arange(query_segments.shape[1], dtype=jnp.int32)
    ahead = slots[None, None, :] > own_slot[None, :, None]
    ahead &= slots[None, None, :] <= own_slot[-1]
    itself = slots[None, None, :] == own_slot[None, :, None]
    padding = (query_segments == PADDING_SEGMENT)[:, :, None]
    return (~ahead & related(query_segments, key_segments)) | (itself & padding)


def make_bidirectional_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Which slots each slot of an encoder sees: those of its own segment, before and after it.

    A padding slot sees itself alone, so that its softmax stays finite.
    """
    keys, queries = segment_ids[:, None, :], segment_ids[:, :, None]
    itself = jnp.eye(segment_ids.shape[1], dtype=bool)[None]
    return itself | ((keys == queries) & (queries != PADDING_SEGMENT))


def related(
    query_segments: Int[Array, "B T"], key_segments: Int[Array, "#B S"]
) -> Bool[Array, "B T S"]:
    """Where the key is of the query's segment, of the one that it branches from, or of the shared
    one; never padding."""
    keys, queries = key_segments[:, None, :], query_segments[:, :, None]
    stems = jnp.where(queries < BRANCHES, queries, queries // BRANCHES)
    live = (keys != PADDING_SEGMENT) & (queries != PADDING_SEGMENT)
    return live & ((keys == queries) | (keys == stems) | (keys == SHARED_SEGMENT))


def attend(
    q: Float[Array, "B T N H"],
    parts: Sequence[tuple[KeyValues, Bool[Array, "B T _"]]],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Float[Array, "#B N T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T + bias) v over the slots of all parts together, in float32.

    The N/K query heads of a key head are laid side by side, so that each product is one
    batched matrix product over B and K, and over K alone where all rows share the keys;
    XLA on CPU is much slower on the equivalent five-axis einsum.

    Args:
        q: queries.
        parts: keys and values with their masks [B, T, S]; S may differ between parts.
        scale: of the scores, 1/sqrt(H) unless given.
        softcap: c > 0 turns a score x into c tanh(x / c) (Gemma 2, arXiv 2408.00118).
        bias: added to the scores of the last part, as relative positions are.
    """
    batch, t, heads, width = q.shape
    kv_heads = parts[0][0].keys.shape[1]
    group = heads // kv_heads
    scale = width**-0.5 if scale is None else scale
    q = q.reshape(batch, t, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, group * t, width) * jnp.asarray(scale, q.dtype)
    cast = [(KeyValues(*(x.astype(q.dtype) for x in part)), mask) for part, mask in parts]
    if bias is not None:
        bias = bias.astype(jnp.float32).reshape(-1, kv_heads, group * t, bias.shape[-1])
    grouped: Any = _attend_grouped(q, cast, bias, softcap)
    out = grouped.reshape(batch, kv_heads, group, t, width)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, t, heads, width)


Parts = list[tuple[KeyValues, Bool[Array, "B T _"]]]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend_grouped(
    q: Float[Array, "B K GT H"], parts: Parts, bias: Float[Array, "#B K GT S"] | None, cap: float
) -> Float[Array, "B K GT H"]:
    """Attention of grouped and scaled queries.

    Its gradient is written by hand (Dao et al. 2022, arXiv 2205.14135, appendix B.2): the
    weights are computed again from the log-sum-exp instead of kept, and no product reads
    them transposed, which XLA on CPU would copy them for.
    """
    return _forward(q, parts, bias, cap)[0]


def _forward(q, parts, bias, cap):
    jointly = partial(_attend_jointly, bias=bias, cap=cap)
    by_kernel = [bias is None and _has_kernel(q, *part) for part in parts]
    if any(by_kernel):
        by_part = partial(_attend_by_part, by_kernel=by_kernel, cap=cap)
        out, log_total = jax.lax.platform_dependent(q, parts, tpu=by_part, default=jointly)
    else:
        out, log_total = jointly(q, parts)
    out, log_total = kept(out.astype(q.dtype)), kept(log_total)
    return out, (q, parts, bias, out, log_total)


def _biases(parts, bias):
    """Of each part; the last one alone may have any."""
    return [*[None] * (len(parts) - 1), bias]


def _attend_jointly(q, parts, bias, cap):
    """Output, and the log of what the softmax over all parts divides by, in float32."""
    scores = [
        _scores(q, part.keys, mask, own, cap)
        for (part, mask), own in zip(parts, _biases(parts, bias), strict=True)
    ]
    top = jnp.stack([s.max(axis=-1) for s in scores]).max(axis=0)[..., None]
    weights = [jnp.exp(s - top) for s in scores]
    total = jnp.stack([w.sum(axis=-1) for w in weights]).sum(axis=0)[..., None]
    summed = [
        _product("BKTS,BKSH->BKTH", w.astype(q.dtype), part.values)
        for w, (part, _) in zip(weights, parts, strict=True)
    ]
    return jnp.stack(summed).sum(axis=0) / total, top + jnp.log(total)


def _attend_by_part(q, parts, by_kernel, cap):
    """`_attend_jointly`, of a softmax over each part, by a kernel where there is one."""
    found = []
    for (part, mask), has_kernel in zip(parts, by_kernel, strict=True):
        if not has_kernel:
            found.append(_attend_jointly(q, [(part, mask)], None, cap))
            continue
        out, log_total = flash.attend(_by_heads(q, part, mask), cap=cap)
        found.append((out.reshape(q.shape), log_total.reshape(*q.shape[:3], 1)))
    log_total = jax.nn.logsumexp(jnp.stack([log for _, log in found]), axis=0)
    out = jnp.stack([own * jnp.exp(log - log_total) for own, log in found]).sum(axis=0)
    return out, log_total


def _has_kernel(q, part, mask):
    by_heads = _by_heads(q, part, mask)
    return flash.fits(by_heads.q.shape, by_heads.keys.shape)


def _computed(kernel, formula, q, part, mask, bias, *more):
    """What both return for (q, part, mask, *more), by the kernel where there is one."""
    given = (q, part, mask, *more)
    if bias is not None or not _has_kernel(q, part, mask):
        return formula(*given)
    return jax.lax.platform_dependent(*given, tpu=kernel, default=formula)


def _by_heads(q, part, mask):
    """Grouped queries [B, K, GT, H] head by head: [B, N, T, H]."""
    rows, _, _, width = q.shape
    q = q.reshape(rows, -1, mask.shape[1], width)
    return flash.Inputs(q, part.keys, part.values, mask)


def _backward(cap, saved, d_out):
    q, parts, bias, out, log_total = saved
    correction = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    d_q, d_parts, d_bias = jnp.zeros(q.shape, jnp.float32), [], None
    for (part, mask), own in zip(parts, _biases(parts, bias), strict=True):
        d_queries, d_part, d_bias = _gradients_of_part(
            q, part, mask, own, cap, d_out, log_total, correction
        )
        d_q += d_queries
        d_parts.append((d_part, None))
    return d_q.astype(q.dtype), d_parts, d_bias


def _gradients_of_part(q, part, mask, bias, cap, d_out, log_total, correction):
    """By queries in float32, by keys and values, and by the bias, where there is one."""

    def formula(q, part, mask, d_out, log_total, correction):
        scores = _scores(q, part.keys, mask, bias, cap)
        weights = jnp.exp(scores - log_total)
        d_weights = _product("BKTH,BKSH->BKTS", d_out, part.values)
        d_scores = weights * (d_weights - correction)
        if cap:
            # Masked scores are no values of tanh, and have no weight.
            d_scores *= 1.0 - jnp.square(jnp.where(weights > 0.0, scores, 0.0) / cap)
        d_bias = None
        if bias is not None:
            d_bias = d_scores if bias.shape[0] > 1 else d_scores.sum(axis=0, keepdims=True)
        d_scores = d_scores.astype(q.dtype)
        d_part = KeyValues(
            *(
                _summed_over_queries(x, y, part.keys.shape[0])
                for x, y in ((q, d_scores), (d_out, weights.astype(q.dtype)))
            )
        )
        return _product("BKTS,BKSH->BKTH", d_scores, part.keys), d_part, d_bias

    def kernel(q, part, mask, d_out, log_total, correction):
        given = _by_heads(q, part, mask)
        per_query = (x.reshape(given.q.shape[:3]) for x in (log_total, correction))
        d_out = d_out.reshape(given.q.shape)
        d_queries, *d_part = flash.gradients(given, d_out, *per_query, cap=cap)
        return d_queries.reshape(q.shape), KeyValues(*(x.astype(q.dtype) for x in d_part)), None

    return _computed(kernel, formula, q, part, mask, bias, d_out, log_total, correction)


_attend_grouped.defvjp(_forward, _backward)


def _scores(q, keys, mask, bias, cap):
    """Masked q k^T + bias in float32."""
    scores = _product("BKTH,BKSH->BKTS", q, keys)
    if bias is not None:
        scores = scores + bias
    if cap:
        scores = cap * jnp.tanh(scores / cap)
    grouped = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])
    masked = jnp.where(mask[:, None, None], grouped, jnp.finfo(jnp.float32).min)
    return masked.reshape(scores.shape)


def _product(letters: str, x: Array, y: Array) -> Array:
    """einsum summed in float32, where y may have one row for all rows of x.

    Those rows are laid out as one: XLA on CPU is slower on the product of three axes by two,
    and has none of bfloat16 that sums in float32.
    """
    rows, heads, _, width = x.shape
    if y.shape[0] == rows:
        return jnp.einsum(letters, x, y, preferred_element_type=jnp.float32)
    flat = x.swapaxes(0, 1).reshape(1, heads, -1, width)
    out = jnp.einsum(letters, flat, y, preferred_element_type=jnp.float32)
    return out.reshape(heads, rows, -1, out.shape[-1]).swapaxes(0, 1)


def _summed_over_queries(x: Array, weights: Array, rows: int) -> Array:
    """x [B,K,T,H] and weights [B,K,T,S] -> [B,K,S,H], summed over B as well for one row."""
    small = jnp.einsum("BKHT,BKTS->BKHS", x.swapaxes(2, 3), weights)
    if rows == 1:
        small = small.sum(axis=0, keepdims=True)
    return small.swapaxes(2, 3)


class View(NamedTuple):
    """What the slots of a layer see besides each other."""

    mask: Bool[Array, "B T S"]
    rotation: Rotation | None = None
    """The rotary embedding of queries and keys, where there is one."""
    bias: Float[Array, "#B N T S"] | None = None
    prefix: tuple[KeyValues, Bool[Array, "B T P"]] | None = None
    """Slots that stand before all rows."""
    layer: Int[Array, ""] | None = None
    first_slot: Int[Array, ""] | None = None
    """Where in the cache the slots are written, and of which layer."""


class Attention(nn.Module):
    """Projections, rotation, cache update and attention of one layer.

    Attributes:
        heads, kv_heads, head_dim, width: N, K, H, D.
        qkv_bias, out_bias: whether the projections have biases.
        joint: whether queries, keys and values are one kernel [D, 3, N, H].
        normed: makes the norm, given its name, that queries and keys pass head by head.
        scale, softcap: see `attend`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    width: int
    qkv_bias: bool = False
    out_bias: bool = False
    joint: bool = False
    normed: Callable[[str], nn.Module] | None = None
    scale: float | None = None
    softcap: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        view: View,
        cache: StackedCache | None = None,
        adapter_index: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], StackedCache | None]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        given = {"use_bias": self.qkv_bias, **types}
        if self.joint:
            axes, out = ("embed", "qkv", "heads", "head_dim"), (3, self.heads, self.head_dim)
            q, k, v = jnp.moveaxis(Linear(out, axes, name="qkv", **given)(x, adapter_index), 2, 0)
        else:
            queries = ((self.heads, self.head_dim), ("embed", "heads", "head_dim"))
            keys = ((self.kv_heads, self.head_dim), ("embed", "kv_heads", "head_dim"))
            q = Linear(*queries, name="q", **given)(x, adapter_index)
            k = Linear(*keys, name="k", **given)(x, adapter_index)
            v = Linear(*keys, name="v", **given)(x, adapter_index)
        if self.normed is not None:
            q, k = self.normed("q_norm")(q), self.normed("k_norm")(k)
        if view.rotation is not None:
            q, k = rotate(q, view.rotation), rotate(k, view.rotation)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        own = KeyValues(k, v)
        if cache is not None:
            cache = cache.written(view.layer, view.first_slot, k, v)
            own = KeyValues(*jax.tree.map(lambda stack: stack[view.layer], cache))
        parts = [(own, view.mask)] if view.prefix is None else [view.prefix, (own, view.mask)]
        out = attend(q, parts, scale=self.scale, softcap=self.softcap, bias=view.bias)
        axes = ("heads", "head_dim", "embed")
        project = Linear((self.width,), axes, 2, self.out_bias, name="o", **types)
        return project(out, adapter_index), cache


class CrossAttention(nn.Module):
    """Attention of one layer to slots of other sequences, the sources.

    Their keys and values are projected once (`remember`), however often they are read.

    Attributes:
        heads, head_dim, width: N, H, D.
        use_bias: whether the projections have biases.
        scale: see `attend`.
    """

    heads: int
    head_dim: int
    width: int
    use_bias: bool = False
    scale: float | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self):
        given = {
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        out = (self.heads, self.head_dim)
        self.q = Linear(out, ("embed", "heads", "head_dim"), **given)
        self.k = Linear(out, ("embed", "kv_heads", "head_dim"), **given)
        self.v = Linear(out, ("embed", "kv_heads", "head_dim"), **given)
        self.o = Linear((self.width,), ("heads", "head_dim", "embed"), 2, **given)

    def remember(
        self, x: Float[Array, "B S D"], adapter_index: Int[Array, "B"] | None = None
    ) -> KeyValues:
        """Keys and values of the sources' hidden states."""
        k, v = self.k(x, adapter_index), self.v(x, adapter_index)
        return KeyValues(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        sources: tuple[KeyValues, Bool[Array, "B T S"]],
        adapter_index: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Output for what is remembered of the sources, and the slots of them each x sees."""
        q = self.q(x, adapter_index)
        return self.o(attend(q, [sources], scale=self.scale), adapter_index)
