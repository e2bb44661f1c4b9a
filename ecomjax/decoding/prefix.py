"""Tokens that all prompts open with are computed once and their keys and values reused."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Int

from ecomjax.typing import PADDING_SEGMENT, SHARED_SEGMENT, KVCache

BUCKET = 32
"""Lengths are rounded up to a multiple of this, so that few shapes are compiled."""


def bucketed(length: int) -> int:
    """The smallest multiple of BUCKET that holds `length` slots."""
    return -(-length // BUCKET) * BUCKET


def size_class(length: int) -> int:
    """The smallest of 32, 64, 96, 128, 192, 256, 384, ... slots that hold `length`.

    Few shapes are compiled however prompts differ, and none has half as many slots again as
    it needs, small ones apart.
    """
    buckets = -(-length // BUCKET)
    grain = 2 ** max(buckets.bit_length() - 2, 0)
    return -(-buckets // grain) * grain * BUCKET


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix of all prompts that leaves each at least one token."""
    shortest = min(len(p) for p in prompts)
    common = 0
    while common < shortest - 1 and all(p[common] == prompts[0][common] for p in prompts):
        common += 1
    return common


@partial(jax.jit, static_argnums=0)
def _fill(model: nn.Module, variables: Any, tokens, positions, segments, adapter) -> KVCache:
    bound: Any = model
    cache = bound.new_cache(*tokens.shape)
    return bound.apply(variables, tokens, positions, segments, cache, None, adapter)[1]


def fill_prefix(
    model: nn.Module, variables: Any, prefix: Sequence[int], adapters: int | None = None
) -> KVCache:
    """A cache of one row that holds the prefix as the shared segment, in bucketed slots.

    There is one bucket at least, so that no prefix is no other shape than a short one. Where
    rows use several adapters, it has a row for each of so many, see `of_rows`.
    """
    slots = bucketed(max(1, len(prefix)))
    tokens, segments = np.zeros((1, slots), np.int32), np.zeros((1, slots), np.int32)
    tokens[0, : len(prefix)] = prefix
    segments[0] = PADDING_SEGMENT
    segments[0, : len(prefix)] = SHARED_SEGMENT
    positions = np.arange(slots, dtype=np.int32)[None]
    filled = tokens, positions, segments
    if adapters is None:
        return _fill(model, variables, *filled, None)
    filled = (np.repeat(x, adapters, axis=0) for x in filled)
    return _fill(model, variables, *filled, np.arange(adapters, dtype=np.int32))


def of_rows(prefix: KVCache, adapter: Int[Array, "B"] | None) -> KVCache:
    """The prefix that each row sees: of one row for all, or of the row of its adapter."""
    if adapter is None:
        return prefix
    keys, values = jax.tree.map(lambda x: x[:, adapter], (prefix.keys, prefix.values))
    return prefix.replace(
        keys=keys,
        values=values,
        positions=prefix.positions[adapter],
        segment_ids=prefix.segment_ids[adapter],
    )
