"""Batched generation: one prefill, then one `while_loop` until every row has ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ecomjax.decoding.batches import Limits, Rows, batches, follow, prefill
from ecomjax.decoding.sampling import Sampling, sample
from ecomjax.sharding import constrain
from ecomjax.typing import KVCache


@dataclasses.dataclass(frozen=True)
class GenerateOptions(Sampling, Limits):
    """How to decode.

    Attributes:
        seed: of the draws; a prompt's draws depend on it and on the prompt's place alone.
    """

    seed: int = 0

    def __post_init__(self):
        Limits.__post_init__(self)
        Sampling.__post_init__(self)


class Decoding(flax.struct.PyTreeNode):
    """What the loop carries."""

    drawn: Int[Array, ""]
    """Tokens drawn so far for every row."""
    last: Int[Array, "B"]
    """The token drawn last, not yet in the cache."""
    ended: Bool[Array, "B"]
    tokens: Int[Array, "B max_new"]
    """Tokens drawn; the end token from a row's end on."""
    log_probabilities: Float[Array, "B max_new"]
    """Of the drawn tokens at temperature 1; 0 from a row's end on."""
    cache: KVCache
    seen: Bool[Array, "B V"] | None
    """Tokens of the prompts and those drawn, where there is a repetition penalty."""


def begin(
    model: nn.Module,
    options: GenerateOptions,
    variables: Any,
    rows: Rows,
    keys: Any,
    seen: Bool[Array, "B V"] | None = None,
) -> Decoding:
    """The prompts filled in, and the first token drawn."""
    batch = rows.tokens.shape[0]
    hidden, cache = prefill(model, variables, rows, options.max_new_tokens)
    first, log_probability = _draw(model, options, variables, rows, keys, hidden, seen, 0)
    return Decoding(
        drawn=jnp.ones((), jnp.int32),
        last=first,
        ended=first == options.end,
        tokens=_write(jnp.full((batch, options.max_new_tokens), options.end, jnp.int32), first, 0),
        log_probabilities=_write(
            jnp.zeros((batch, options.max_new_tokens), jnp.float32), log_probability, 0
        ),
        cache=cache,
        seen=_with(seen, first),
    )


def step(
    model: nn.Module, options: GenerateOptions, variables: Any, rows: Rows, keys: Any, s: Decoding
) -> Decoding:
    """One more token drawn for every row."""
    hidden, cache = follow(model, variables, rows, s.last, s.drawn, s.cache)
    token, log_probability = _draw(model, options, variables, rows, keys, hidden, s.seen, s.drawn)
    token = jnp.where(s.ended, options.end, token)
    log_probability = jnp.where(s.ended, 0.0, log_probability)
    return Decoding(
        drawn=s.drawn + 1,
        last=token,
        ended=s.ended | (token == options.end),
        tokens=_write(s.tokens, token, s.drawn),
        log_probabilities=_write(s.log_probabilities, log_probability, s.drawn),
        cache=cache,
        seen=_with(s.seen, token),
    )


def _draw(model, options, variables, rows, keys, hidden, seen, number):
    """Tokens and their log-probabilities."""
    logits: Any = model.apply(variables, hidden, rows.adapter, method="logits")
    row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    chosen = sample(logits[:, 0], row_keys, options, seen)
    picked = jnp.take_along_axis(logits[:, 0], chosen[:, None], axis=-1)[:, 0]
    return chosen, picked - jax.nn.logsumexp(logits[:, 0], axis=-1)


def _with(seen, tokens):
    """What is seen, where the tokens [B] are too."""
    if seen is None:
        return None
    return seen | jax.nn.one_hot(tokens, seen.shape[1], dtype=bool)


def _write(buffer, column, number):
    return jax.lax.dynamic_update_slice(buffer, column[:, None], (0, number))


@partial(jax.jit, static_argnums=(0, 1))
def _decode(
    model: nn.Module,
    options: GenerateOptions,
    variables: Any,
    rows: Rows,
    keys: Any,
    seen: Bool[Array, "B V"] | None,
) -> tuple[Int[Array, "B max_new"], Float[Array, "B max_new"]]:
    """Tokens drawn for each row, and their log-probabilities."""

    def unfinished(s: Decoding):
        return (s.drawn < options.max_new_tokens) & ~s.ended.all()

    state = begin(model, options, variables, rows, keys, seen)
    state = jax.lax.while_loop(
        unfinished, partial(step, model, options, variables, rows, keys), state
    )
    # Every process reads the answers of all.
    return constrain(state.tokens, (None, None)), constrain(state.log_probabilities, (None, None))


@dataclasses.dataclass(frozen=True)
class Generated:
    """One prompt's answer, its end token left out.

    Attributes:
        tokens: token ids.
        log_probability: of the tokens and, if there was one, the end token.
        ended: whether the end token was drawn before `max_new_tokens`.
    """

    tokens: tuple[int, ...]
    log_probability: float
    ended: bool


def generate(
    model: nn.Module,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    on_done: Callable[[int], None] = lambda count: None,
    adapters: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Generated]:
    """Answers to tokenized prompts, in their order.

    Prompts are sorted by length into batches; tokens that all of them open with are
    computed once.

    Args:
        model: see `models.likelihood.token_log_likelihood`; also has `new_cache`.
        variables: {"params": ..., "lora": ...}.
        prompts: token ids, each at least one.
        options: how to decode.
        on_done: called with the number of prompts just finished, for progress.
        adapters: which of several each prompt uses, where "lora" holds several; see
            `adapters.routing.hold_together`.
        numbers: below 2^32, one for each prompt, from which its draws are seeded, so that they do
            not depend on what else is asked; by default the places of the prompts.

    Raises:
        UserError: an empty prompt, or one that leaves no room for an answer.
    """
    root = jax.random.key(options.seed)
    # Compiled code depends on neither of these; a constant keeps it from being made anew.
    compiled = dataclasses.replace(options, batch_size=1, window=1, seed=0)
    results: dict[int, Generated] = {}
    for indices, rows in batches(model, variables, prompts, options, adapters):
        own = np.array([numbers[i] if numbers else i for i in indices], np.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, own)
        seen = _seen(model, options, [prompts[i] for i in indices])
        drawn, log_probabilities = jax.device_get(
            _decode(model, compiled, variables, rows, keys, seen)
        )
        for row, i in enumerate(indices):
            answer, ended = until(options.end, drawn[row].tolist())
            results[i] = Generated(answer, float(log_probabilities[row].sum()), ended)
        on_done(len(set(indices)))
    return [results[i] for i in range(len(prompts))]


def _seen(
    model: nn.Module, options: GenerateOptions, prompts: Sequence[Sequence[int]]
) -> Bool[Array, "B V"] | None:
    """Tokens that answers to the prompts follow, where there is a penalty on repeating them.

    Those of an encoder-decoder follow its start tokens, not its sources.
    """
    if options.repetition_penalty == 1.0:
        return None
    bound: Any = model
    seen = np.zeros((len(prompts), bound.config.vocab_size), bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[list(options.start or prompt)] = True
    return jnp.asarray(seen)


def until(end: int, tokens: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    """The tokens before the first `end`, and whether there is one."""
    ended = end in tokens
    return tuple(tokens[: tokens.index(end)] if ended else tokens), ended
