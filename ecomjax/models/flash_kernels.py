"""What the attention kernels for TPUs compute with the blocks of a step; see `models.flash`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

MASKED = float(jnp.finfo(jnp.float32).min)


def step_of(grid: Sequence[Any], row: Any, outer: Any, inner: Any) -> Any:
    """Where a step stands in what tells each which block it gets."""
    return (row * grid[2] + outer) * grid[3] + inner


def forward(fetched, q, keys, values, mask, out, log_total, top, total, *, cap):
    """`out` is the sum so far of exp(score - top) times value, and is divided at the end."""
    inner = pl.program_id(3)

    @pl.when(inner == 0)
    def _():
        top[...] = jnp.full(top.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        out[...] = jnp.zeros(out.shape, jnp.float32)

    @pl.when(_is_needed(fetched))
    def _():
        seen = _seen(mask)
        for head, key_head in _heads(q, keys):
            scores = _scores(q[0, head], keys[0, key_head], seen, cap)
            old = top[head]
            new = jnp.maximum(old, scores.max(axis=1, keepdims=True))
            weights, kept = jnp.exp(scores - new[:, :1]), jnp.exp(old - new)
            top[head] = new
            total[head] = kept * total[head] + weights.sum(axis=1, keepdims=True)
            more = _product(weights.astype(values.dtype), values[0, key_head])
            out[0, head] = kept[:, :1] * out[0, head] + more

    @pl.when(inner == pl.num_programs(3) - 1)
    def _():
        for head in range(q.shape[1]):
            out[0, head] = out[0, head] / total[head][:, :1]
            log_total[0, head] = (top[head] + jnp.log(total[head])).T[:1]


def by_queries(
    fetched, q, d_out, keys, values, log_total, correction, mask, d_q, log_column, column, *, cap
):
    @pl.when(pl.program_id(3) == 0)
    def _():
        d_q[...] = jnp.zeros(d_q.shape, jnp.float32)
        for head in range(q.shape[1]):
            # The numbers of queries stand in a line, the scores of a query as well: turned once.
            for numbers, turned in ((log_total, log_column), (correction, column)):
                turned[head] = jnp.broadcast_to(numbers[0, head], turned.shape[:0:-1]).T

    @pl.when(_is_needed(fetched))
    def _():
        seen = _seen(mask)
        for head, key_head in _heads(q, keys):
            scores = _scores(q[0, head], keys[0, key_head], seen, cap)
            weights = jnp.exp(scores - log_column[head][:, :1])
            d_weights = _product_across(d_out[0, head], values[0, key_head])
            d_scores = weights * (d_weights - column[head][:, :1]) * _slope(scores, seen, cap)
            d_q[0, head] += _product(d_scores.astype(keys.dtype), keys[0, key_head])


def by_keys(fetched, q, d_out, keys, values, log_total, correction, mask, d_keys, d_values, *, cap):
    """Scores stand here with a key in each line, so that no product reads them transposed."""

    @pl.when(pl.program_id(3) == 0)
    def _():
        d_keys[...] = jnp.zeros(d_keys.shape, jnp.float32)
        d_values[...] = jnp.zeros(d_values.shape, jnp.float32)

    @pl.when(_is_needed(fetched))
    def _():
        seen = _seen(mask)
        for head, key_head in _heads(q, keys):
            scores = _scores(keys[0, key_head], q[0, head], seen, cap)
            weights = jnp.exp(scores - log_total[0, head])
            d_weights = _product_across(values[0, key_head], d_out[0, head])
            d_scores = weights * (d_weights - correction[0, head]) * _slope(scores, seen, cap)
            d_values[0, key_head] += _product(weights.astype(d_out.dtype), d_out[0, head])
            d_keys[0, key_head] += _product(d_scores.astype(q.dtype), q[0, head])


def _is_needed(fetched: Any) -> Any:
    """Whether this step got a block of its own. Where none is needed the first one did, so that
    sums over what no query sees are numbers all the same."""
    grid = [pl.num_programs(axis) for axis in range(4)]
    row, outer, inner = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    return fetched[step_of(grid, row, outer, inner)] == inner


def _heads(q: Any, keys: Any) -> list[tuple[int, int]]:
    """The query heads of a block, each with its key head."""
    group = q.shape[1] // keys.shape[1]
    return [(head, head // group) for head in range(q.shape[1])]


def _seen(mask: Any) -> Array:
    return mask[0].astype(jnp.int32) != 0


def _scores(x: Array, y: Array, seen: Array, cap: float) -> Array:
    scores = _product_across(x, y)
    if cap:
        scores = cap * jnp.tanh(scores / cap)
    return jnp.where(seen, scores, MASKED)


def _slope(scores: Array, seen: Array, cap: float) -> Array | float:
    """Of the cap: d (c tanh(x / c)) / dx; masked scores are no values of it."""
    return 1.0 - jnp.square(jnp.where(seen, scores, 0.0) / cap) if cap else 1.0


def _product(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, precision=_precision(x), preferred_element_type=jnp.float32)


def _product_across(x: Array, y: Array) -> Array:
    """x y^T."""
    last = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        x, y, last, precision=_precision(x), preferred_element_type=jnp.float32
    )


def _precision(x: Array) -> jax.lax.Precision | None:
    """Products of bfloat16 are exact in float32: the compiler refuses to be asked for more."""
    return jax.lax.Precision.DEFAULT if x.dtype == jnp.bfloat16 else None
