"""What all decoding starts with: prompts in batches of like length, and their first forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ecomjax import trees
from ecomjax.decoding import prefix as prefixes
from ecomjax.errors import UserError
from ecomjax.models.encoder_decoder import Memory
from ecomjax.sharding import row_parts
from ecomjax.typing import PADDING_SEGMENT, KVCache

OWN_SEGMENT = 1


@dataclasses.dataclass(frozen=True)
class Limits:
    """What decoding of any kind is told.

    Attributes:
        max_new_tokens: tokens a row may get, end token included.
        end: id of the token that ends a row.
        batch_size: prompts decoded together; results do not depend on it.
        window: most slots a prompt and its answer may take together, or, where the prompt
            is the source of an encoder-decoder, each.
        start: tokens that the answers of an encoder-decoder open with; of a decoder none.
    """

    max_new_tokens: int
    end: int
    batch_size: int = 16
    window: int = 2048
    start: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(
                f"max_new_tokens {self.max_new_tokens}", "decoding", "ask for 1 token or more"
            )


class Rows(NamedTuple):
    """What a batch is decoded from."""

    before: KVCache | Memory
    """What all rows follow, `offset` tokens; or what each row is an answer to."""
    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    """How many of the tokens are a row's own; the rest is padding."""
    offset: Int[Array, ""]
    adapter: Int[Array, "B"] | None = None
    """Which of several adapters each row uses."""


def by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of the prompts of each batch, short prompts first.

    A short last batch repeats its last prompt, so that no new shape is compiled and rows
    divide over the mesh in use.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rows, parts = min(batch_size, len(prompts)), row_parts()
    rows += -rows % parts
    for first in range(0, len(order), max(rows, 1)):
        chosen = order[first : first + rows]
        yield chosen + [chosen[-1]] * (rows - len(chosen))


def batches(
    model: nn.Module,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    adapters: Sequence[int] | None = None,
) -> Iterator[tuple[list[int], Rows]]:
    """Indices of the prompts of each batch, as `by_length` gives them, and their rows.

    Tokens that all prompts open with are computed once, for each adapter where there are
    several; those of sources, which see each other, are not.

    Raises:
        UserError: an empty prompt, one that leaves no room for an answer, or a start for a
            model that has none; what `count_adapters` refuses.
    """
    if not prompts:
        return
    count = count_adapters(variables, len(prompts), adapters)
    if bool(limits.start) != hasattr(model, "remember"):
        raise UserError(
            f"answers start with the tokens {list(limits.start)}",
            "decoding",
            "give start tokens to an encoder-decoder, and to no other model",
        )
    answer = len(limits.start) + limits.max_new_tokens
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError("empty prompt", f"prompt {i}", "give at least one token")
        slots = max(len(prompt), answer) if limits.start else len(prompt) + answer
        if slots > limits.window:
            raise UserError(
                f"prompt of {len(prompt)} tokens and {limits.max_new_tokens} new ones exceed "
                f"the window of {limits.window}",
                f"prompt {i}",
                "use fewer demonstrations, shorter inputs or a smaller max_new_tokens",
            )
    if limits.start:
        for indices in by_length(prompts, limits.batch_size):
            own = adapters_of(indices, adapters)
            memory = _remember(model, variables, *padded([prompts[i] for i in indices]), own)
            start = jnp.tile(jnp.array(limits.start, jnp.int32), (len(indices), 1))
            lengths = jnp.full(len(indices), len(limits.start), jnp.int32)
            yield indices, Rows(memory, start, lengths, jnp.zeros((), jnp.int32), own)
        return
    offset = prefixes.common_prefix(prompts)
    before = prefixes.fill_prefix(model, variables, prompts[0][:offset], count)
    for indices in by_length(prompts, limits.batch_size):
        own = adapters_of(indices, adapters)
        tokens, lengths = padded([prompts[i][offset:] for i in indices])
        seen = prefixes.of_rows(before, own)
        yield indices, Rows(seen, tokens, lengths, jnp.int32(offset), own)


def count_adapters(variables: Any, prompts: int, adapters: Sequence[int] | None) -> int | None:
    """How many adapters there are to choose from, where it is said which each prompt uses.

    Raises:
        UserError: not one for each prompt, or one that is not held. Computing would go on with
            another.
    """
    if adapters is None:
        return None
    if len(adapters) != prompts:
        raise UserError(
            f"{len(adapters)} adapters for {prompts} prompts", "decoding", "name one for each"
        )
    scales = [leaf.scale for leaf in trees.flatten(variables.get("lora", {})).values()]
    # The adapters lie along the last axis of the stack, see `adapters.routing`.
    held = min((scale.shape[-1] if scale.ndim else 0 for scale in scales), default=0)
    for number in adapters:
        if not 0 <= number < held:
            raise UserError(
                f"adapter {number} of {held} that are held", "decoding", "name one that is"
            )
    return held


def adapters_of(indices: Sequence[int], adapters: Sequence[int] | None) -> Int[Array, "B"] | None:
    """Which of several adapters the prompts of a batch use, where that is said."""
    return None if adapters is None else jnp.asarray([adapters[i] for i in indices], jnp.int32)


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Prompts in bucketed slots, and their lengths."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), prefixes.bucketed(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths)


@partial(jax.jit, static_argnums=0)
def _remember(
    model: nn.Module,
    variables: Any,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    adapter: Int[Array, "B"] | None,
) -> Memory:
    bound: Any = model
    # Padding stays at the last position, since a table of them may end there.
    count = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    positions = jnp.minimum(count, lengths.max() - 1)
    segments = jnp.where(count < lengths[:, None], OWN_SEGMENT, PADDING_SEGMENT)
    return bound.apply(variables, tokens, positions, segments, adapter, method="remember")


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
    hidden, cache = bound.apply(
        variables, rows.tokens, positions, segments, cache, rows.before, rows.adapter
    )
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
    return bound.apply(
        variables, last[:, None], positions, segments, cache, rows.before, rows.adapter
    )
