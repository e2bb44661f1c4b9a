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
from jaxtyping import Array, Bool, Float, Int

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
        for name in ("max_new_tokens", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name} {value}", "decoding", "use 1 or more")


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


def rows_of(prompts: int, batch_size: int) -> int:
    """Rows of a batch for so many prompts, so that they divide over the mesh in use."""
    rows = max(min(batch_size, prompts), 1)
    return rows + -rows % row_parts()


def row_axis(x: Array) -> int | None:
    """The axis of rows in a part of a cache, of a memory or of a state; None of a number.

    Keys and values are stacked over layers.
    """
    if x.ndim == 0:
        return None
    return 1 if x.ndim == 5 else 0


def with_slots(held: Any, more: int) -> Any:
    """A cache or a memory with so many more slots, which hold padding."""

    def wider(x: Array) -> Array:
        if row_axis(x) is None:
            return x
        slots = 3 if x.ndim == 5 else 1
        # Segment ids of 0 are padding.
        return jnp.pad(x, [(0, more if axis == slots else 0) for axis in range(x.ndim)])

    return jax.tree.map(wider, held)


def by_length(lengths: Sequence[Any], batch_size: int) -> Iterator[list[int]]:
    """Indices of the prompts of each batch, short ones first.

    A short last batch repeats its last prompt, so that no new shape is compiled and rows
    divide over the mesh in use.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    rows = rows_of(len(lengths), batch_size)
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        yield chosen + [chosen[-1]] * (rows - len(chosen))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Prompts that are ready to be decoded from.

    Attributes:
        model, variables: see `prepare`.
        own: tokens of each prompt, those that all open with left out.
        opening: those tokens.
        prefix: of those, with a row for each adapter where there are several; None for an
            encoder-decoder.
        start: what the answers of an encoder-decoder open with.
        adapters: which of several each prompt uses.
    """

    model: nn.Module
    variables: Any
    own: Sequence[Sequence[int]]
    opening: Sequence[int]
    prefix: KVCache | None
    start: tuple[int, ...]
    adapters: Sequence[int] | None

    @property
    def shared(self) -> KVCache | None:
        """What all rows follow, if it is the same for all."""
        return self.prefix if self.adapters is None else None

    def rows(self, indices: Sequence[int], slots: int | None = None) -> Rows:
        """Rows of these prompts, in so many slots; by default in bucketed ones."""
        adapter = adapters_of(indices, self.adapters)
        tokens, lengths = padded([self.own[i] for i in indices], slots)
        if self.prefix is None:
            memory = _remember(self.model, self.variables, tokens, lengths, adapter)
            start = jnp.tile(jnp.array(self.start, jnp.int32), (len(indices), 1))
            lengths = jnp.full(len(indices), len(self.start), jnp.int32)
            return Rows(memory, start, lengths, jnp.zeros((), jnp.int32), adapter)
        before = prefixes.of_rows(self.prefix, adapter)
        return Rows(before, tokens, lengths, jnp.int32(len(self.opening)), adapter)


def prepare(
    model: nn.Module,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    adapters: Sequence[int] | None = None,
) -> Prepared:
    """The prompts, checked, and what all of them open with, computed.

    Tokens that all prompts open with are computed once, for each adapter where there are
    several; those of sources, which see each other, are not.

    Args:
        model, variables, adapters: see `generate`.
        prompts: token ids; one at least.
        limits: what decoding is told.

    Raises:
        UserError: an empty prompt, one that leaves no room for an answer, or a start for a
            model that has none; what `count_adapters` refuses.
    """
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
        return Prepared(model, variables, prompts, (), None, limits.start, adapters)
    offset = prefixes.common_prefix(prompts)
    opening = prompts[0][:offset]
    prefix = prefixes.fill_prefix(model, variables, opening, count)
    own = [prompt[offset:] for prompt in prompts]
    return Prepared(model, variables, own, opening, prefix, (), adapters)


def batches(
    model: nn.Module,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    adapters: Sequence[int] | None = None,
) -> Iterator[tuple[list[int], Rows]]:
    """Indices of the prompts of each batch, as `by_length` gives them, and their rows.

    Raises:
        UserError: what `prepare` refuses.
    """
    if not prompts:
        return
    prepared = prepare(model, variables, prompts, limits, adapters)
    for indices in by_length([*map(len, prompts)], limits.batch_size):
        yield indices, prepared.rows(indices)


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


def padded(
    prompts: Sequence[Sequence[int]], slots: int | None = None
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Prompts in so many slots, or in bucketed ones, and their lengths."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), slots or prefixes.bucketed(int(lengths.max()))), np.int32)
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
    before: KVCache | Memory | None,
    adapter: Int[Array, "B"] | None,
    last: Int[Array, "B"],
    positions: Int[Array, "B"],
    live: Bool[Array, "B"],
    cache: KVCache,
) -> tuple[Float[Array, "B 1 D"], KVCache]:
    """Hidden states of the tokens drawn last, at these positions, and the cache with them.

    What a row that is not live puts in the cache is padding. For the rest see `Rows`.
    """
    bound: Any = model
    segments = jnp.where(live, OWN_SEGMENT, PADDING_SEGMENT)
    return bound.apply(
        variables, last[:, None], positions[:, None], segments[:, None], cache, before, adapter
    )
