"""Answers of an allowed form: the model decides where the form leaves a choice, and only there.

Everything between two decisions is appended in one forward, known as jump-forward decoding
(Zheng et al. 2023, arXiv 2312.07104, section 3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ecomjax.decoding import prefix as prefixes
from ecomjax.decoding.automaton import Automaton
from ecomjax.decoding.batches import (
    OWN_SEGMENT,
    Rows,
    adapters_of,
    by_length,
    count_adapters,
    padded,
    prefill,
    row_axis,
    with_slots,
)
from ecomjax.errors import UserError
from ecomjax.sharding import constrain, row_parts
from ecomjax.typing import PADDING_SEGMENT, KVCache

FIRST_SLOTS = 32
"""Slots that answers are given at first."""

FEWEST_ROWS = 4
"""So few rows go on together to the last of them: fewer would hardly be faster."""

NO_TOKEN = -1
"""Stands where a state has fewer choices than another."""


@dataclasses.dataclass(frozen=True)
class Constrained:
    """One prompt's answer, its end token left out.

    Attributes:
        tokens: token ids.
        log_probability: of the decisions, each among the tokens that the form allows there
            (their probabilities sum to 1), at temperature 1. What is not decided adds nothing.
        decisions: places where the form allowed several tokens.
        forwards: times that the model ran for it, the prompt's own included.
    """

    tokens: tuple[int, ...]
    log_probability: float
    decisions: int
    forwards: int


class Tables(flax.struct.PyTreeNode):
    """The automata of a batch; W tokens of a chunk, A choices of U tokens, states and choices
    padded."""

    chunks: Int[Array, "B states W"]
    lengths: Int[Array, "B states"]
    """How many tokens of its chunk a state appends; 0 at the end of an answer, after which the
    model is not asked again."""
    tokens: Int[Array, "U"]
    """Those that a state has beside others to choose from."""
    choices: Int[Array, "B states A"]
    """Places in `tokens`, of an only choice any; NO_TOKEN where there are fewer."""
    targets: Int[Array, "B states A"]
    """A state without choices leads to itself."""


class _Walk(flax.struct.PyTreeNode):
    """What the rows have come to."""

    state: Int[Array, "B"]
    """Decided for, its chunk not yet in the cache."""
    appended: Int[Array, "B"]
    """Tokens behind the prompt that are in the cache."""
    log_probability: Float[Array, "B"]
    cache: KVCache


def _of_state(table: Array, state: Int[Array, "B"]) -> Array:
    """The entry of each row's state."""
    index = state.reshape(-1, *[1] * (table.ndim - 1))
    return jnp.take_along_axis(table, index, axis=1)[:, 0]


def _decide(
    model: nn.Module, variables: Any, rows: Rows, tables: Tables, hidden: Any, state: Any
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The state that each row goes on to, and the log-probability of going there.

    Args:
        hidden: of the last token of each row [B, 1, D].
        state: that the rows are in.
    """
    logits: Any = model.apply(variables, hidden, rows.adapter, tables.tokens, method="logits")
    choices, targets = _of_state(tables.choices, state), _of_state(tables.targets, state)
    allowed = choices != NO_TOKEN
    scores = jnp.take_along_axis(logits[:, 0], jnp.where(allowed, choices, 0), axis=1)
    scores = jnp.where(allowed, scores, -jnp.inf)
    best = jnp.argmax(scores, axis=1)[:, None]
    gained = jnp.take_along_axis(scores, best, axis=1)[:, 0] - jax.nn.logsumexp(scores, axis=1)
    target = jnp.take_along_axis(targets, best, axis=1)[:, 0]
    return target, jnp.where(allowed[:, 0], gained, 0.0)


def _append(
    model: nn.Module, variables: Any, rows: Rows, tables: Tables, s: _Walk
) -> tuple[Float[Array, "B 1 D"], KVCache, Int[Array, "B"]]:
    """Hidden states of the last token of each row's chunk, the cache with it, and its length.

    Rows whose chunk is shorter, or whose answer has ended, hold padding in their other slots.
    """
    bound: Any = model
    chunk, length = _of_state(tables.chunks, s.state), _of_state(tables.lengths, s.state)
    count = jnp.arange(chunk.shape[1], dtype=jnp.int32)[None, :]
    last = jnp.maximum(length - 1, 0)[:, None]
    positions = (rows.offset + rows.lengths + s.appended)[:, None] + count
    segments = jnp.where(count < length[:, None], OWN_SEGMENT, PADDING_SEGMENT)
    hidden, cache = bound.apply(
        variables, chunk, positions, segments, s.cache, rows.before, rows.adapter
    )
    return jnp.take_along_axis(hidden, last[:, :, None], axis=1), cache, length


@partial(jax.jit, static_argnums=0)
def _begin(
    model: nn.Module, variables: Any, rows: Rows, tables: Tables
) -> tuple[_Walk, Int[Array, "B"], Float[Array, "B"]]:
    """The first decision of each row, behind its prompt.

    Returns:
        the walk; then, on every process, the state decided for and the log-probability of that.
    """
    hidden, cache = prefill(model, variables, rows, new_slots=0)
    start = jnp.zeros(rows.lengths.shape[0], jnp.int32)
    state, log_probability = _decide(model, variables, rows, tables, hidden, start)
    told = constrain(state, (None,)), constrain(log_probability, (None,))
    return _Walk(state, start, log_probability, cache), *told


@partial(jax.jit, static_argnums=(0, 1))
def _go_on(
    model: nn.Module,
    most: int,
    variables: Any,
    rows: Rows,
    tables: Tables,
    s: _Walk,
    rounds: Int[Array, ""],
    fewest: Int[Array, ""],
) -> tuple[_Walk, Int[Array, ""], Int[Array, "B most"], Bool[Array, "B"], Float[Array, "B"]]:
    """As many further decisions, or until no more than the fewest answers have not ended.

    Args:
        most: decisions that there may be; `rounds` is no larger, and the cache has room for them.

    Returns:
        the walk; then, on every process, how many decisions there were, the states decided for,
        the rows whose answers have not ended, and the log-probability of all decisions so far.
    """

    def live(s: _Walk) -> Bool[Array, "B"]:
        return _of_state(tables.lengths, s.state) > 0

    def unfinished(carry: Any) -> Bool[Array, ""]:
        number, s, _ = carry
        return (live(s).sum() > fewest) & (number < rounds)

    def step(carry: Any) -> Any:
        number, s, states = carry
        hidden, cache, length = _append(model, variables, rows, tables, s)
        state, gained = _decide(model, variables, rows, tables, hidden, s.state)
        states = jax.lax.dynamic_update_slice(states, state[:, None], (0, number))
        walked = _Walk(state, s.appended + length, s.log_probability + gained, cache)
        return number + 1, walked, states

    # Rows whose answer ends stay where they are.
    states = jnp.tile(s.state[:, None], (1, most))
    number, s, states = jax.lax.while_loop(unfinished, step, (jnp.int32(0), s, states))
    told = constrain(live(s), (None,)), constrain(s.log_probability, (None,))
    return s, number, constrain(states, (None, None)), *told


@partial(jax.jit, static_argnums=1)
def _with_room(s: _Walk, slots: int) -> _Walk:
    """The walk, with so many more slots in its cache."""
    return s.replace(cache=with_slots(s.cache, slots))


@jax.jit
def _rows_kept(
    rows: Rows, tables: Tables, s: _Walk, places: Int[Array, "few"]
) -> tuple[Rows, Tables, _Walk]:
    """Some of the rows of a batch."""

    def take(x: Array) -> Array:
        axis = row_axis(x)
        return x if axis is None else jnp.take(x, places, axis)

    before = rows.before if rows.adapter is None else jax.tree.map(take, rows.before)
    rows = jax.tree.map(take, rows._replace(before=None))._replace(before=before)
    own: Tables = jax.tree.map(take, tables.replace(tokens=None))
    return rows, own.replace(tokens=tables.tokens), jax.tree.map(take, s)


def _walk(
    model: nn.Module, variables: Any, rows: Rows, tables: Tables
) -> tuple[Int[np.ndarray, "B rounds"], Float[np.ndarray, "B"]]:
    """The states that each row decides for, and the log-probability of its decisions.

    Every slot of a cache costs time in each forward: there are more of them only once the
    answers have come so far, and then twice as many, so that few shapes are compiled. Rows go
    when half of them have ended.
    """
    s, *told = _begin(model, variables, rows, tables)
    state, log_probability = map(np.array, jax.device_get(told))
    width, places = tables.chunks.shape[2], np.arange(len(state))
    live = np.asarray(tables.lengths)[places, state] > 0
    walked, most, left = [state[:, None]], 0, 0
    while live.any():
        count = len(places)
        while live.sum() <= (half := _half(count)):
            count = half
        if count < len(places):
            kept = np.argsort(~live, kind="stable")[:count]
            rows, tables, s = _rows_kept(rows, tables, s, jnp.asarray(kept, jnp.int32))
            places = places[kept]
        if left == 0:
            done = sum(states.shape[1] for states in walked) - 1
            most = left = done or max(FIRST_SLOTS // width, 1)
            s = _with_room(s, most * width)
        limits = jnp.int32(left), jnp.int32(_half(count))
        s, *told = _go_on(model, most, variables, rows, tables, s, *limits)
        number, states, live, log_probability[places] = jax.device_get(told)
        # Rows that have gone stay where they were.
        walked.append(np.repeat(walked[-1][:, -1:], number, axis=1))
        walked[-1][places] = states[:, :number]
        left -= int(number)
    return np.concatenate(walked, axis=1), log_probability


def _half(rows: int) -> int:
    """How many of so many rows go on by themselves once the others have ended; 0: all do."""
    half = rows // 2
    return half if half >= FEWEST_ROWS and half % row_parts() == 0 else 0


def generate_constrained(
    model: nn.Module,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    automata: Sequence[Automaton],
    *,
    batch_size: int,
    window: int,
    on_done: Callable[[int], None] = lambda count: None,
    adapters: Sequence[int] | None = None,
) -> list[Constrained]:
    """The answers to tokenized prompts that their automata allow, in their order.

    At every decision the allowed token is taken that the model finds most likely, the
    smaller id of two that are equally so. What precedes the first decision is appended to the
    prompt; tokens that all prompts open with are computed once.

    Args:
        model: a decoder, see `models.likelihood.token_log_likelihood`; also has `new_cache`.
        variables: {"params": ..., "lora": ...}.
        prompts: token ids, each at least one.
        automata: what each prompt may be answered.
        batch_size: prompts decoded together; results do not depend on it.
        window: most tokens a prompt and the longest answer of its automaton may take together.
        on_done: called with the number of prompts just finished, for progress.
        adapters: which of several each prompt uses, see `generate`.

    Raises:
        UserError: an empty prompt, or one that leaves no room for an answer; a model that
            is no decoder; what `count_adapters` refuses.
    """
    if hasattr(model, "remember"):
        raise UserError(
            "the answers of an encoder-decoder cannot be constrained",
            "decoding",
            "use the method generate",
        )
    for i, (prompt, automaton) in enumerate(zip(prompts, automata, strict=True)):
        if not prompt:
            raise UserError("empty prompt", f"prompt {i}", "give at least one token")
        if len(prompt) + automaton.longest > window:
            raise UserError(
                f"prompt of {len(prompt)} tokens and an answer of up to {automaton.longest} "
                f"exceed the window of {window}",
                f"prompt {i}",
                "use fewer demonstrations or shorter inputs",
            )
    if not prompts:
        return []
    count = count_adapters(variables, len(prompts), adapters)
    offset = prefixes.common_prefix(prompts)
    before = prefixes.fill_prefix(model, variables, prompts[0][:offset], count)
    opened = [
        [*prompt[offset:], *automaton.states[0].chunk]
        for prompt, automaton in zip(prompts, automata, strict=True)
    ]
    sizes = _Sizes.of(automata)
    results: dict[int, Constrained] = {}
    # All rows of a batch take as many forwards as the one that takes most.
    lengths = [(one.rounds, len(own)) for one, own in zip(automata, opened, strict=True)]
    for indices in by_length(lengths, batch_size):
        own = adapters_of(indices, adapters)
        seen = prefixes.of_rows(before, own)
        rows = Rows(seen, *padded([opened[i] for i in indices]), jnp.int32(offset), own)
        chosen = [automata[i] for i in indices]
        states, log_probabilities = _walk(model, variables, rows, _tables(chosen, sizes))
        for i, walked, log_probability in zip(indices, states, log_probabilities, strict=True):
            results[i] = _read(automata[i], walked.tolist(), float(log_probability))
        on_done(len(set(indices)))
    return [results[i] for i in range(len(prompts))]


def _read(automaton: Automaton, walked: Sequence[int], log_probability: float) -> Constrained:
    """The answer of the states that were decided for, one after the other."""
    path = [automaton.states[0]]
    for state in walked:
        if not path[-1].choices:
            break
        path.append(automaton.states[state])
    tokens = tuple(token for state in path for token in state.chunk)
    decisions = sum(len(state.choices) > 1 for state in path)
    return Constrained(tokens[:-1], log_probability, decisions, max(len(path) - 1, 1))


class _Sizes(NamedTuple):
    """Of the tables that hold some automata, rounded so that few shapes are compiled."""

    states: int
    width: int
    choices: int
    tokens: tuple[int, ...]
    """See `Tables`; in ascending order, the last of them repeated."""

    @classmethod
    def of(cls, automata: Sequence[Automaton]) -> _Sizes:
        deciding = [state for one in automata for state in one.states if state.choices]
        inner = [state for one in automata for state in one.states[1:] if state.choices]
        several = [state.choices for state in deciding if len(state.choices) > 1]
        tokens = sorted({token for choices in several for token in choices}) or [0]
        return cls(
            _rounded(max(len(automaton.states) for automaton in automata)),
            _rounded(max((len(state.chunk) for state in inner), default=1)),
            _rounded(max((len(state.choices) for state in deciding), default=1)),
            (*tokens, *tokens[-1:] * (_rounded(len(tokens)) - len(tokens))),
        )


def _tables(automata: Sequence[Automaton], sizes: _Sizes) -> Tables:
    """The automata of a batch, one a row."""
    rows = len(automata), sizes.states
    chunks, lengths = np.zeros((*rows, sizes.width), np.int32), np.zeros(rows, np.int32)
    choices = np.full((*rows, sizes.choices), NO_TOKEN, np.int32)
    targets = np.zeros_like(choices) + np.arange(sizes.states, dtype=np.int32)[:, None]
    for row, automaton in enumerate(automata):
        for number, state in enumerate(automaton.states):
            several = len(state.choices) > 1
            places = np.searchsorted(sizes.tokens, state.choices) if several else 0
            choices[row, number, : len(state.choices)] = places
            targets[row, number, : len(state.targets)] = state.targets
            # The start's stand in the prompt, and after those of an end nothing is asked.
            if number > 0 and state.choices:
                chunks[row, number, : len(state.chunk)] = state.chunk
                lengths[row, number] = len(state.chunk)
    tokens = np.array(sizes.tokens, np.int32)
    return Tables(*map(jnp.asarray, (chunks, lengths, tokens, choices, targets)))


def _rounded(size: int) -> int:
    """The next power of two that is at least so large."""
    return 1 << (size - 1).bit_length()
