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

from ecomjax.decoding import prefix as prefixes
from ecomjax.decoding import sampling
from ecomjax.errors import UserError
from ecomjax.typing import PADDING_SEGMENT, KVCache

OWN_SEGMENT = 1


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """How to decode.

    Attributes:
        max_new_tokens: tokens a row may get, end token included.
        end: id of the token that ends a row.
        batch_size: prompts decoded together; results do not depend on it.
        window: most slots a prompt and its answer may take together.
        temperature: 0 is greedy.
        top_p: nucleus, see `sampling.sample`.
        seed: of the draws; a prompt's draws depend on it and on the prompt's place alone.
    """

    max_new_tokens: int
    end: int
    batch_size: int = 16
    window: int = 2048
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        sampling.check(self.temperature, self.top_p)
        if self.max_new_tokens < 1:
            raise UserError(
                f"max_new_tokens {self.max_new_tokens}", "decoding", "ask for 1 token or more"
            )


class _Decoding(flax.struct.PyTreeNode):
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


@partial(jax.jit, static_argnums=(0, 1))
def _decode(
    model: nn.Module,
    options: GenerateOptions,
    variables: Any,
    start: KVCache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    offset: Int[Array, ""],
    keys: Any,
) -> tuple[Int[Array, "B max_new"], Float[Array, "B max_new"]]:
    """Decodes rows of prompt tails that follow a cached prefix of `offset` tokens."""
    rows, slots = tokens.shape
    bound: Any = model
    apply = bound.apply
    cache = bound.new_cache(rows, slots + options.max_new_tokens)
    inside = jnp.arange(slots, dtype=jnp.int32)[None, :] < lengths[:, None]
    segments = jnp.where(inside, OWN_SEGMENT, PADDING_SEGMENT)
    positions = jnp.broadcast_to(offset + jnp.arange(slots, dtype=jnp.int32), tokens.shape)
    hidden, cache = apply(variables, tokens, positions, segments, cache, start)
    hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)

    def draw(hidden, number):
        logits = apply(variables, hidden, method="logits")[:, 0]
        row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        chosen = sampling.sample(logits, row_keys, options.temperature, options.top_p)
        picked = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
        return chosen, picked - jax.nn.logsumexp(logits, axis=-1)

    def write(buffer, column, number):
        return jax.lax.dynamic_update_slice(buffer, column[:, None], (0, number))

    first, log_probability = draw(hidden, 0)
    state = _Decoding(
        drawn=jnp.ones((), jnp.int32),
        last=first,
        ended=first == options.end,
        tokens=write(jnp.full((rows, options.max_new_tokens), options.end, jnp.int32), first, 0),
        log_probabilities=write(
            jnp.zeros((rows, options.max_new_tokens), jnp.float32), log_probability, 0
        ),
        cache=cache,
    )

    def body(s: _Decoding) -> _Decoding:
        position = (offset + lengths + s.drawn - 1)[:, None]
        segment = jnp.full((rows, 1), OWN_SEGMENT, jnp.int32)
        hidden, cache = apply(variables, s.last[:, None], position, segment, s.cache, start)
        token, log_probability = draw(hidden, s.drawn)
        token = jnp.where(s.ended, options.end, token)
        log_probability = jnp.where(s.ended, 0.0, log_probability)
        return _Decoding(
            drawn=s.drawn + 1,
            last=token,
            ended=s.ended | (token == options.end),
            tokens=write(s.tokens, token, s.drawn),
            log_probabilities=write(s.log_probabilities, log_probability, s.drawn),
            cache=cache,
        )

    def unfinished(s: _Decoding):
        return (s.drawn < options.max_new_tokens) & ~s.ended.all()

    state = jax.lax.while_loop(unfinished, body, state)
    return state.tokens, state.log_probabilities


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

    Raises:
        UserError: an empty prompt, or one that leaves no room for an answer.
    """
    if not prompts:
        return []
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError("empty prompt", f"prompt {i}", "give at least one token")
        if len(prompt) + options.max_new_tokens > options.window:
            raise UserError(
                f"prompt of {len(prompt)} tokens and {options.max_new_tokens} new ones exceed "
                f"the window of {options.window}",
                f"prompt {i}",
                "use fewer demonstrations, shorter inputs or a smaller max_new_tokens",
            )
    offset = prefixes.common_prefix(prompts)
    start = prefixes.fill_prefix(model, variables, prompts[0][:offset])
    root = jax.random.key(options.seed)
    # Compiled code depends on neither of these; a constant keeps it from being made anew.
    compiled = dataclasses.replace(options, batch_size=1, window=1, seed=0)
    results: dict[int, Generated] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    rows = min(options.batch_size, len(prompts))
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        # A short last batch repeats its last prompt, so that no new shape is compiled.
        filled = chosen + [chosen[-1]] * (rows - len(chosen))
        lengths = np.array([len(prompts[i]) - offset for i in filled], np.int32)
        tokens = np.zeros((rows, prefixes.bucketed(int(lengths.max()))), np.int32)
        for row, i in enumerate(filled):
            tokens[row, : lengths[row]] = prompts[i][offset:]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(root, np.array(filled, np.uint32))
        drawn, log_probabilities = jax.device_get(
            _decode(model, compiled, variables, start, tokens, lengths, np.int32(offset), keys)
        )
        for row, i in enumerate(chosen):
            answer = drawn[row].tolist()
            ended = options.end in answer
            cut = answer.index(options.end) if ended else len(answer)
            total = float(log_probabilities[row].sum())
            results[i] = Generated(tuple(answer[:cut]), total, ended)
        on_done(len(chosen))
    return [results[i] for i in range(len(prompts))]
