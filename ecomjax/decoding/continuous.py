"""Rows that are refilled: a row whose answer is done gets the next prompt, in fixed shapes.

This is the side of it that runs on devices; `generate` says which prompt goes where. All rows
draw a token in each step of a `while_loop`, which comes back when enough of them are done
(continuous batching; Yu et al. 2022, "Orca", there for one step at a time).

The first `max_new_tokens` slots of the cache hold tokens that were drawn. Rows have begun at
different times but all write the same slot in a step, and the slots in turn: an answer has no
more tokens than there are slots, so that it never overwrites its own, and those of the answer
before it are padding once the row is refilled. Slots of prompts lie behind, where the cache
can grow.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ecomjax.decoding.batches import Rows, follow, prefill, row_axis, with_slots
from ecomjax.decoding.regular import TokenTable
from ecomjax.decoding.sampling import sample
from ecomjax.models.encoder_decoder import Memory
from ecomjax.sharding import constrain
from ecomjax.typing import PADDING_SEGMENT, KVCache


class Drawn(NamedTuple):
    """What the rows have come to, as the host reads it."""

    done: Bool[Array, "B"]
    count: Int[Array, "B"]
    """How many of the tokens are drawn."""
    tokens: Int[Array, "B max_new"]
    log_probabilities: Float[Array, "B max_new"]
    """Of the tokens at temperature 1, before any penalty."""


class Decoding(flax.struct.PyTreeNode):
    """What the loop carries."""

    steps: Int[Array, ""]
    """That have been taken."""
    drawn: Drawn
    last: Int[Array, "B"]
    """The token drawn last, not yet in the cache."""
    positions: Int[Array, "B"]
    """Where it stands."""
    keys: jax.Array
    """Of the draws of each row [B]."""
    cache: KVCache
    own: KVCache | Memory | None
    """What each row follows, a source or the prefix of its adapter; None where all follow the
    same prefix."""
    adapter: Int[Array, "B"] | None
    """Which of several adapters each row uses."""
    seen: Bool[Array, "B V"] | None
    """Tokens of the prompts and those drawn, where there is a penalty on repeating them."""
    matched: Int[Array, "B"] | None = None
    """The state of a `TokenTable` that each answer has come to, where there is one."""


class Prompted(NamedTuple):
    """Prompts for some rows."""

    rows: Rows
    keys: jax.Array
    """Of their draws [B]."""
    seen: Bool[Array, "B V"] | None
    """See `Decoding`."""
    matched: Int[Array, "B"] | None = None
    """See `Decoding`."""


def own_of(rows: Rows) -> KVCache | Memory | None:
    """What the rows follow each alone, see `Decoding`."""
    shared = isinstance(rows.before, KVCache) and rows.adapter is None
    return None if shared else rows.before


@partial(jax.jit, static_argnums=(0, 1, 3))
def idle(model: nn.Module, options: Any, prompted: Prompted, batch: int) -> Decoding:
    """A state of `batch` rows, all of them done, that prompts like these can be filled in.

    Args:
        model, options: see `generate`.
        prompted: their shapes are read, but for the number of rows.
        batch: B.
    """
    bound: Any = model
    rows, new = prompted.rows, options.max_new_tokens

    def empty(x):
        axis = row_axis(x)
        shape = x.shape if axis is None else (*x.shape[:axis], batch, *x.shape[axis + 1 :])
        return jnp.zeros(shape, x.dtype)

    numbers = jnp.zeros(batch, jnp.int32)
    return _split(
        Decoding(
            steps=jnp.zeros((), jnp.int32),
            drawn=Drawn(
                done=jnp.ones(batch, bool),
                count=numbers,
                tokens=jnp.zeros((batch, new), jnp.int32),
                log_probabilities=jnp.zeros((batch, new), jnp.float32),
            ),
            last=numbers,
            positions=numbers,
            keys=jnp.broadcast_to(prompted.keys[:1], (batch,)),
            cache=bound.new_cache(batch, new + rows.tokens.shape[1]),
            own=jax.tree.map(empty, own_of(rows)),
            adapter=None if rows.adapter is None else numbers,
            seen=None if prompted.seen is None else empty(prompted.seen),
            matched=None if prompted.matched is None else numbers,
        )
    )


@partial(jax.jit, static_argnums=1)
def grow(s: Decoding, more: int) -> Decoding:
    """The state with so many more slots for prompts, or for sources where rows follow those."""
    name = "own" if isinstance(s.own, Memory) else "cache"
    return _split(s.replace(**{name: with_slots(getattr(s, name), more)}))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def refill(
    model: nn.Module,
    options: Any,
    variables: Any,
    s: Decoding,
    prompted: Prompted,
    places: Int[Array, "R"],
    table: TokenTable | None = None,
) -> Decoding:
    """The state with prompts filled in and their first tokens drawn.

    Args:
        model, options, variables: see `generate`.
        s: rows of which some are done; it is used up.
        prompted: R prompts, in the slots that the cache has for them.
        places: the rows that the prompts go to; B for one that goes nowhere.
        table: what tokens may follow, where not all may.
    """
    rows, new = prompted.rows, options.max_new_tokens
    hidden, filled = prefill(model, variables, rows, new_slots=0)
    numbers = jnp.zeros(places.shape, jnp.int32)
    first, log_probability = _draw(
        model, options, variables, rows.adapter, numbers, hidden, prompted, table
    )
    count = numbers + 1

    def alone(column):
        return _write(jnp.zeros((column.shape[0], new), column.dtype), column, numbers)

    def behind_drawn(x):
        return jnp.pad(x, ((0, 0), (new, 0)), constant_values=PADDING_SEGMENT)

    def put(old, fresh):
        axis = row_axis(old)
        if axis is None:
            return old
        return old.at[(slice(None),) * axis + (places,)].set(fresh, mode="drop")

    def put_slots(old, fresh):
        return old.at[:, places, :, new:].set(fresh, mode="drop")

    cache = s.cache.replace(
        keys=jax.tree.map(put_slots, s.cache.keys, filled.keys),
        values=jax.tree.map(put_slots, s.cache.values, filled.values),
        positions=put(s.cache.positions, behind_drawn(filled.positions)),
        segment_ids=put(s.cache.segment_ids, behind_drawn(filled.segment_ids)),
    )
    fresh = Decoding(
        steps=s.steps,
        drawn=Drawn(
            done=_ends(options, first, count),
            count=count,
            tokens=alone(first),
            log_probabilities=alone(log_probability),
        ),
        last=first,
        positions=rows.offset + rows.lengths,
        keys=prompted.keys,
        cache=cache,
        own=own_of(rows),
        adapter=rows.adapter,
        seen=_with(prompted.seen, first),
        matched=_after(table, prompted.matched, first),
    )
    return _split(
        jax.tree.map(put, s.replace(cache=None), fresh.replace(cache=None)).replace(cache=cache)
    )


def step(
    model: nn.Module,
    options: Any,
    variables: Any,
    prefix: KVCache | None,
    s: Decoding,
    table: TokenTable | None = None,
) -> Decoding:
    """One more token drawn for every row that is not done.

    Args:
        model, options, variables: see `generate`.
        prefix: what all rows follow, where `s.own` is None.
        s: the state so far.
        table: see `refill`.
    """
    before = prefix if s.own is None else s.own
    live, new = ~s.drawn.done, options.max_new_tokens
    cache = s.cache.replace(length=s.steps % new)
    hidden, cache = follow(model, variables, before, s.adapter, s.last, s.positions, live, cache)
    count = s.drawn.count
    token, log_probability = _draw(model, options, variables, s.adapter, count, hidden, s, table)
    # Beyond the last of its tokens nothing is written of a row.
    at = jnp.where(live, count, new)
    more = live.astype(jnp.int32)
    drawn = Drawn(
        done=s.drawn.done | _ends(options, token, count + 1),
        count=count + more,
        tokens=_write(s.drawn.tokens, token, at),
        log_probabilities=_write(s.drawn.log_probabilities, log_probability, at),
    )
    return s.replace(
        steps=s.steps + 1,
        drawn=drawn,
        last=token,
        positions=s.positions + more,
        cache=cache,
        seen=_with(s.seen, token),
        matched=_after(table, s.matched, token),
    )


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def run(
    model: nn.Module,
    options: Any,
    variables: Any,
    prefix: KVCache | None,
    s: Decoding,
    stopped: Bool[Array, "B"],
    wanted: Int[Array, ""],
    most: Int[Array, ""],
    table: TokenTable | None = None,
) -> tuple[Decoding, Drawn]:
    """Steps until so many rows are done; the state, and what has been drawn, on every device.

    Args:
        model, options, variables, prefix, table: see `step`.
        s: rows of which some may be done; it is used up.
        stopped: rows that the host knows to be done.
        wanted: rows done, 1 to B.
        most: steps to take, whatever is done by then.
    """
    s = s.replace(drawn=s.drawn._replace(done=s.drawn.done | stopped))
    last = s.steps + most

    def unfinished(s: Decoding):
        return (s.drawn.done.sum(dtype=jnp.int32) < wanted) & (s.steps < last)

    one_more = partial(step, model, options, variables, prefix, table=table)
    s = _split(jax.lax.while_loop(unfinished, one_more, s))
    # Every process reads the answers of all.
    return s, jax.tree.map(lambda x: constrain(x, (None,) * x.ndim), s.drawn)


def _draw(model, options, variables, adapter, count, hidden, rows, table):
    """Tokens and their log-probabilities, for rows that have drawn `count` [B] before.

    Of the rows, a `Decoding` or `Prompted`, what draws depend on is read.
    """
    logits: Any = model.apply(variables, hidden, adapter, method="logits")
    kept = logits[:, 0]
    if table is not None:
        allowed = table.allowed(rows.matched, options.max_new_tokens - count)
        kept = jnp.where(allowed, kept, -jnp.inf)
    chosen = sample(kept, jax.vmap(jax.random.fold_in)(rows.keys, count), options, rows.seen)
    picked = jnp.take_along_axis(logits[:, 0], chosen[:, None], axis=-1)[:, 0]
    return chosen, picked - jax.nn.logsumexp(logits[:, 0], axis=-1)


def _ends(options, tokens, count):
    """Which rows are done with these tokens, the `count`-th [B] of each."""
    ends = jnp.isin(tokens, jnp.asarray(options.ends, jnp.int32))
    return ends | (count == options.max_new_tokens)


def _with(seen, tokens):
    """What is seen, where the tokens [B] are too."""
    if seen is None:
        return None
    return seen | jax.nn.one_hot(tokens, seen.shape[1], dtype=bool)


def _after(table, matched, tokens):
    """The states that the tokens [B] lead to."""
    return None if table is None else table.targets[matched, tokens]


def _write(table, column, at):
    """The table [B, max_new] with the column [B] at these places [B]."""
    slots = jnp.arange(table.shape[1], dtype=jnp.int32)
    return jnp.where(slots[None, :] == at[:, None], column[:, None], table)


def _split(s: Decoding) -> Decoding:
    """The state, its rows split over the mesh in use."""

    def names(x) -> tuple[str | None, ...]:
        if x.ndim == 5:
            return (None, "batch", "kv_heads", None, None)
        return ("batch", *[None] * (x.ndim - 1)) if x.ndim else ()

    return jax.tree.map(lambda x: constrain(x, names(x)), s)
