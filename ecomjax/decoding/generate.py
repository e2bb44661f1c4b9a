"""Batched generation: one prefill, then one `while_loop` until every row has ended."""

from __future__ import annotations

import dataclasses
import itertools
import math
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
from ecomjax.decoding.stopping import StopStrings
from ecomjax.errors import UserError
from ecomjax.sharding import constrain
from ecomjax.typing import KVCache


@dataclasses.dataclass(frozen=True)
class GenerateOptions(Sampling, Limits):
    """How to decode.

    Attributes:
        seed: of the draws; a prompt's draws depend on it and on the prompt's place alone.
        samples: answers to each prompt, each with draws of its own.
        stop_ids: further tokens that end an answer as `end` does.
        stop: strings that end an answer where one of them first appears in its text.
    """

    seed: int = 0
    samples: int = 1
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        Limits.__post_init__(self)
        Sampling.__post_init__(self)
        if self.samples < 1:
            raise UserError(f"samples {self.samples}", "decoding", "ask for 1 answer or more")
        if not all(self.stop):
            raise UserError(f"stop strings {list(self.stop)}", "decoding", "leave the empty out")

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end an answer."""
        return (self.end, *self.stop_ids)


class Decoding(flax.struct.PyTreeNode):
    """What the loop carries."""

    drawn: Int[Array, ""]
    """Tokens drawn so far for every row."""
    last: Int[Array, "B"]
    """The token drawn last, not yet in the cache."""
    ended: Bool[Array, "B"]
    tokens: Int[Array, "B max_new"]
    """Tokens drawn; what follows a row's end counts for nothing."""
    log_probabilities: Float[Array, "B max_new"]
    """Of the tokens at temperature 1, before any penalty."""
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
        ended=_ends(options, first),
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
    return Decoding(
        drawn=s.drawn + 1,
        last=token,
        ended=s.ended | _ends(options, token),
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


def _ends(options, tokens):
    return jnp.isin(tokens, jnp.asarray(options.ends, jnp.int32))


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
    """An answer, what ended it left out.

    Attributes:
        tokens: token ids; where a stop string ended the answer, those whose text ends before it.
        log_probabilities: of the tokens and, if the answer has ended, of the next one, which is
            the end token or the one that the stop string begins in; by the model as it is, at
            temperature 1.
        ended: whether an end token or a stop string came before `max_new_tokens` were drawn.
        text: what the answer reads, up to the stop string; None where there is no decoder.
    """

    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    ended: bool
    text: str | None = None

    @property
    def log_probability(self) -> float:
        """Of the tokens together, what ended them included."""
        return math.fsum(self.log_probabilities)


def generate(
    model: nn.Module,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    on_done: Callable[[int], None] = lambda count: None,
    adapters: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> list[Generated]:
    """Answers to tokenized prompts, in their order; all samples of one before those of the next.

    Prompts are sorted by length into batches; tokens that all of them open with are
    computed once. Answers do not depend on the batch size, nor on the other prompts.

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
        decode: from token ids to text, where stop strings are given or text is wanted.

    Raises:
        UserError: an empty prompt, or one that leaves no room for an answer; stop strings
            without `decode`.
    """
    if options.stop and decode is None:
        raise UserError(
            f"stop strings {list(options.stop)} but no decoder",
            "decoding",
            "say how tokens are decoded to text",
        )
    strings = None if decode is None else StopStrings(options.stop, decode)
    root = jax.random.key(options.seed)
    # Compiled code depends on none of these; a constant keeps it from being made anew.
    compiled = dataclasses.replace(options, batch_size=1, window=1, seed=0, samples=1, stop=())
    asked = [prompt for prompt in prompts for _ in range(options.samples)]
    if adapters is not None:
        adapters = [adapter for adapter in adapters for _ in range(options.samples)]
    results: dict[int, Generated] = {}
    left = [options.samples] * len(prompts)
    for indices, rows in batches(model, variables, asked, options, adapters):
        prompt, sample = np.divmod(np.array(indices, np.uint32), np.uint32(options.samples))
        own = np.array([numbers[i] if numbers else i for i in prompt], np.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, own)
        keys = jax.vmap(jax.random.fold_in)(keys, sample)
        seen = _seen(model, options, [asked[i] for i in indices])
        drawn, log_probabilities = jax.device_get(
            _decode(model, compiled, variables, rows, keys, seen)
        )
        for row, i in enumerate(indices):
            results[i] = answer_of(
                options, drawn[row].tolist(), log_probabilities[row].tolist(), strings
            )
        for i in set(indices):
            left[i // options.samples] -= 1
        on_done(sum(left[i] == 0 for i in {i // options.samples for i in indices}))
    return [results[i] for i in range(len(asked))]


def answer_of(
    options: GenerateOptions,
    tokens: Sequence[int],
    log_probabilities: Sequence[float],
    strings: StopStrings | None,
) -> Generated:
    """The answer that drawn tokens are, cut where it ends."""
    kept, ended = until(options.ends, tokens)
    text = None if strings is None else strings.decode(kept)
    stopped = None if strings is None else strings.find(kept, 0, finished=True)
    if stopped is not None:
        kept, ended, text = kept[: stopped.kept], True, stopped.text
    return Generated(kept, tuple(log_probabilities[: len(kept) + ended]), ended, text)


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


def until(ends: Sequence[int], tokens: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    """The tokens before the first that ends an answer, and whether there is one."""
    before = tuple(itertools.takewhile(lambda token: token not in ends, tokens))
    return before, len(before) < len(tokens)
