"""What all decoding starts with: prompts in batches of like length, and their first forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ecomjax.decoding import prefix as prefixes
from ecomjax.errors import UserError
from ecomjax.typing import PADDING_SEGMENT, KVCache

OWN_SEGMENT = 1


@dataclasses.dataclass(frozen=True)
class Limits:
    """What decoding of any kind is told.

    Attributes:
        max_new_tokens: tokens a row may get, end token included.
        end: id of the token that ends a row.
        batch_size: prompts decoded together; results do not depend on it.
        window: most slots a prompt and its answer may take together.
    """

    max_new_tokens: int
    end: int
    batch_size: int = 16
    window: int = 2048

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(
                f"max_new_tokens {self.max_new_tokens}", "decoding", "ask for 1 token or more"
            )


class Rows(NamedTuple):
    """What a batch is decoded from."""

    before: KVCache
    """What all rows follow, `offset` tokens."""
    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    """How many of the tokens are a row's own; the rest is padding."""
    offset: Int[Array, ""]


def by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of the prompts of each batch, short prompts first.

    A short last batch repeats its last prompt, so that no new shape is compiled.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rows = min(batch_size, len(prompts))
    for first in range(0, len(order), max(rows, 1)):
        chosen = order[first : first + rows]
        yield chosen + [chosen[-1]] * (rows - len(chosen))


def batches(
    model: nn.Module, variables: Any, prompts: Sequence[Sequence[int]], limits: Limits
) -> Iterator[tuple[list[int], Rows]]:
    """Indices of the prompts of each batch, as `by_length` gives them, and their rows.

    Tokens that all prompts open with are computed once.

    Raises:
        UserError: an empty prompt, or one that leaves no room for an answer.
    """
    if not prompts:
        return
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError("empty prompt", f"prompt {i}", "give at least one token")
        if len(prompt) + limits.max_new_tokens > limits.window:
            raise UserError(
                f"prompt of {len(prompt)} tokens and {limits.max_new_tokens} new ones exceed "
                f"the window of {limits.window}",
                f"prompt {i}",
                "use fewer demonstrations, shorter inputs or a smaller max_new_tokens",
            )
    offset = prefixes.common_prefix(prompts)
    before = prefixes.fill_prefix(model, variables, prompts[0][:offset])
    for indices in by_length(prompts, limits.batch_size):
        lengths = np.array([len(prompts[i]) - offset for i in indices], np.int32)
        tokens = np.zeros((len(indices), prefixes.bucketed(int(lengths.max()))), np.int32)
        for row, i in enumerate(indices):
            tokens[row, : lengths[row]] = prompts[i][offset:]
        yield indices, Rows(before, *map(jnp.asarray, (tokens, lengths, np.int32(offset))))


def prefill(
    model: nn.Module, variables: Any, rows: Rows, new_slots: int
) -> tuple[Float[Array, "B 1 D"], KVCache]:
    """Hidden states of each row's last token, and a cache of its tokens with room for more."""
    bound: Any = model
    batch, slots = rows.tokens.shape
    cache = bound.new_cache(batch, slots + new_slots)
    count = jnp.arange(slots, dtype=jnp.int32)
    inside = count[None, :] < rows.lengths[:, None]
    segments = jnp.where(inside, OWN_SEGMENT, PADDING_SEGMENT)
    positions = jnp.broadcast_to(rows.offset + count, rows.tokens.shape)
    hidden, cache = bound.apply(variables, rows.tokens, positions, segments, cache, rows.before)
    return jnp.take_along_axis(hidden, (rows.lengths - 1)[:, None, None], axis=1), cache


def follow(
    model: nn.Module,
    variables: Any,
    rows: Rows,
    last: Int[Array, "B"],
    drawn: Int[Array, ""],
    cache: KVCache,
) -> tuple[Float[Array, "B 1 D"], KVCache]:
    """Hidden states of the tokens drawn last, `drawn` a row so far, and the cache with them."""
    bound: Any = model
    positions = (rows.offset + rows.lengths + drawn - 1)[:, None]
    segments = jnp.full((last.shape[0], 1), OWN_SEGMENT, jnp.int32)
    return bound.apply(variables, last[:, None], positions, segments, cache, rows.before)
