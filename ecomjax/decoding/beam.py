"""Beam search: the most likely answers that `beams` running ones a prompt lead to.

The rules are those of transformers' `generate(do_sample=False, early_stopping=False)`,
under which published encoder-decoders were evaluated: candidates are twice as many as
beams; an answer is finished if its end token is among the best half of them; a prompt is
done when as many answers as beams are finished and the best running one, were it to end
now, would not displace the worst of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ecomjax.decoding.batches import Limits, Rows, batches, follow, prefill, row_axis
from ecomjax.decoding.generate import until
from ecomjax.errors import UserError
from ecomjax.sharding import constrain
from ecomjax.typing import KVCache


@dataclasses.dataclass(frozen=True)
class BeamOptions(Limits):
    """How to search.

    Attributes:
        beams: answers kept running for each prompt; 1 is greedy.
        length_penalty: p in score = log-probability / length**p, where the length counts
            the end token and all start tokens but the first; 0 compares sums, and large
            values favour long answers.
    """

    beams: int = 4
    length_penalty: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.beams < 1:
            raise UserError(f"beams {self.beams}", "decoding", "search with 1 beam or more")

    def divisor(self, drawn: Any) -> Any:
        """What the log-probability of an answer of so many drawn tokens is divided by."""
        return (drawn + len(self.start[1:])) ** self.length_penalty


@dataclasses.dataclass(frozen=True)
class Found:
    """The best answer, its end token left out.

    Attributes:
        tokens: token ids.
        log_probability: of the tokens and, if there was one, the end token.
        ended: whether the end token was drawn before `max_new_tokens`.
        score: what it was best by.
    """

    tokens: tuple[int, ...]
    log_probability: float
    ended: bool
    score: float


class _Search(flax.struct.PyTreeNode):
    """What the loop carries; running and finished answers are sorted, best first."""

    drawn: Int[Array, ""]
    """Tokens of every running answer."""
    tokens: Int[Array, "B beams max_new"]
    """Of the running answers; the end token where none is drawn yet."""
    log_probabilities: Float[Array, "B beams"]
    """Of the running answers; -inf where there is none."""
    finished: Int[Array, "B beams max_new"]
    scores: Float[Array, "B beams"]
    """Of the finished answers; -inf where there is none."""
    open: Bool[Array, "B"]
    """Whether a running answer may yet displace a finished one."""


def _extend(
    options: BeamOptions, s: _Search, table: Float[Array, "B beams V"]
) -> tuple[_Search, Int[Array, "B beams"]]:
    """The search one token on, and which running answer each new one continues.

    Args:
        options: how to search.
        s: so far.
        table: log-probabilities of what may follow each running answer.
    """
    beams, vocabulary = table.shape[1:]
    totals = (s.log_probabilities[:, :, None] + table).reshape(table.shape[0], -1)
    totals, chosen = jax.lax.top_k(totals, 2 * beams)
    parents, last = chosen // vocabulary, (chosen % vocabulary).astype(jnp.int32)
    tokens = jax.lax.dynamic_update_slice(
        _pick(s.tokens, parents), last[:, :, None], (0, 0, s.drawn)
    )
    drawn = s.drawn + 1
    divisor = options.divisor(drawn.astype(jnp.float32))
    ends = (last == options.end) | (drawn == options.max_new_tokens)

    best_half = jnp.arange(2 * beams, dtype=jnp.int32)[None, :] < beams
    new = jnp.where(ends & best_half & s.open[:, None], totals / divisor, -jnp.inf)
    scores, kept = jax.lax.top_k(jnp.concatenate([s.scores, new], axis=1), beams)
    finished = _pick(jnp.concatenate([s.finished, tokens], axis=1), kept)

    totals, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, totals), beams)
    promising = totals[:, 0] / divisor > scores[:, -1]
    state = _Search(drawn, _pick(tokens, kept), totals, finished, scores, s.open & promising)
    return state, _pick(parents, kept)


def _pick(x: Array, indices: Int[Array, "B n"]) -> Array:
    """Entries of the second axis."""
    return jnp.take_along_axis(x, indices.reshape(*indices.shape, *[1] * (x.ndim - 2)), axis=1)


def _reordered(cache: KVCache, parents: Int[Array, "B beams"], prompt_slots: int) -> KVCache:
    """The cache where every row continues its parent.

    Beams of a prompt differ in their new slots alone, and in those by keys and values alone.
    """
    first = jnp.arange(parents.shape[0], dtype=jnp.int32) * parents.shape[1]
    rows = (first[:, None] + parents).reshape(-1)

    def move(x):
        new = x[:, :, :, prompt_slots:][:, rows]
        return jax.lax.dynamic_update_slice(x, new, (0, 0, 0, prompt_slots, 0))

    keys, values = jax.tree.map(move, (cache.keys, cache.values))
    return cache.replace(keys=keys, values=values)


def _for_each_beam(held: Any, beams: int) -> Any:
    """A cache, or what sources left, with every row repeated."""

    def repeat(x):
        rows = row_axis(x)
        return x if rows is None else jnp.repeat(x, beams, axis=rows)

    return jax.tree.map(repeat, held)


@partial(jax.jit, static_argnums=(0, 1))
def _search(
    model: nn.Module, options: BeamOptions, variables: Any, rows: Rows
) -> tuple[Int[Array, "B max_new"], Float[Array, "B"]]:
    """The best answer of each row, and its score."""
    batch, slots = rows.tokens.shape
    beams, new = options.beams, options.max_new_tokens

    def log_probabilities(hidden, adapter):
        logits: Any = model.apply(variables, hidden, adapter, method="logits")
        table = jax.nn.log_softmax(logits[:, 0], axis=-1)
        return table.reshape(batch, -1, table.shape[-1])

    # All beams start as one: the others are no answers until the first has been extended.
    none = jnp.full((batch, beams), -jnp.inf, jnp.float32)
    unwritten = jnp.full((batch, beams, new), options.end, jnp.int32)
    state = _Search(
        drawn=jnp.zeros((), jnp.int32),
        tokens=unwritten,
        log_probabilities=none.at[:, 0].set(0.0),
        finished=unwritten,
        scores=none,
        open=jnp.ones(batch, bool),
    )
    hidden, cache = prefill(model, variables, rows, new)
    table = log_probabilities(hidden, rows.adapter)
    state, _ = _extend(options, state, jnp.repeat(table, beams, axis=1))
    cache = _for_each_beam(cache, beams)
    rows = rows._replace(lengths=jnp.repeat(rows.lengths, beams))
    if rows.adapter is not None:
        rows = rows._replace(adapter=jnp.repeat(rows.adapter, beams))
    if not isinstance(rows.before, KVCache) or rows.adapter is not None:
        rows = rows._replace(before=_for_each_beam(rows.before, beams))

    def body(carry):
        s, cache = carry
        last = jax.lax.dynamic_index_in_dim(s.tokens, s.drawn - 1, axis=2, keepdims=False)
        positions = rows.offset + rows.lengths + s.drawn - 1
        hidden, cache = follow(
            *(model, variables, rows.before, rows.adapter),
            *(last.reshape(-1), positions, jnp.ones(positions.shape, bool), cache),
        )
        s, parents = _extend(options, s, log_probabilities(hidden, rows.adapter))
        return s, _reordered(cache, parents, slots)

    def unfinished(carry):
        s, _ = carry
        return (s.drawn < new) & s.open.any()

    state, _ = jax.lax.while_loop(unfinished, body, (state, cache))
    # Every process reads the answers of all.
    return constrain(state.finished[:, 0], (None, None)), constrain(state.scores[:, 0], (None,))


def beam_search(
    model: nn.Module,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    options: BeamOptions,
    on_done: Callable[[int], None] = lambda count: None,
    adapters: Sequence[int] | None = None,
) -> list[Found]:
    """The best answers to tokenized prompts, in their order.

    Arguments and errors are those of `generate`; a model may be an encoder-decoder, whose
    answers follow `options.start`.
    """
    # Compiled code depends on neither of these; a constant keeps it from being made anew.
    compiled = dataclasses.replace(options, batch_size=1, window=1)
    results: dict[int, Found] = {}
    for indices, rows in batches(model, variables, prompts, options, adapters):
        tokens, scores = jax.device_get(_search(model, compiled, variables, rows))
        for row, i in enumerate(indices):
            answer, ended = until((options.end,), tokens[row].tolist())
            score = float(scores[row])
            total = score * options.divisor(len(answer) + ended)
            results[i] = Found(answer, total, ended, score)
        on_done(len(set(indices)))
    return [results[i] for i in range(len(prompts))]
