"""Generation: prompts go to rows of a batch, each to the first that is free, see `continuous`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ecomjax.decoding import continuous
from ecomjax.decoding import prefix as prefixes
from ecomjax.decoding.batches import Limits, Prepared, prepare, rows_of
from ecomjax.decoding.regular import NEVER, TokenTable
from ecomjax.decoding.sampling import Sampling
from ecomjax.decoding.stopping import STRIDE, StopStrings
from ecomjax.errors import UserError
from ecomjax.sharding import row_parts

REFILLS = 4
"""Parts that a batch is refilled in."""


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
        if self.samples > 1 and self.temperature == 0.0:
            remedy = "set a temperature, or ask for 1"
            raise UserError(f"{self.samples} greedy answers, all the same", "decoding", remedy)
        if isinstance(self.stop, str):
            raise UserError(f"stop strings {self.stop!r}", "decoding", "give them as a tuple")
        if not all(self.stop):
            raise UserError(f"stop strings {list(self.stop)}", "decoding", "leave the empty out")

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end an answer."""
        return (self.end, *self.stop_ids)


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
    table: TokenTable | None = None,
) -> list[Generated]:
    """Answers to tokenized prompts, in their order; all samples of one before those of the next.

    Prompts are taken by length, short ones first, each by the first of `batch_size` rows that
    is free; tokens that all of them open with are computed once. Answers do not depend on the
    batch size, nor on the other prompts.

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
        table: what tokens may follow, see `regular.from_regex`; every answer then matches and
            ends. Log-probabilities are those of the model without it.

    Raises:
        UserError: an empty prompt, or one that leaves no room for an answer; stop strings
            without `decode`; a table and other ends than its own, or one whose shortest match
            has more than `max_new_tokens`.
    """
    if options.stop and decode is None:
        raise UserError(
            f"stop strings {list(options.stop)} but no decoder",
            "decoding",
            "say how tokens are decoded to text",
        )
    if numbers is not None and len(numbers) != len(prompts):
        remedy = "give one number for each prompt"
        raise UserError(f"{len(numbers)} numbers, {len(prompts)} prompts", "decoding", remedy)
    if table is not None:
        table = _checked(table, model, options)
    if not prompts:
        return []
    prepared = prepare(model, variables, prompts, options, adapters)
    strings = None if decode is None else StopStrings(options.stop, decode)
    results: dict[tuple[int, int], Generated] = {}
    left = [options.samples] * len(prompts)
    for (prompt, sample), answer in _answers(prepared, options, strings, numbers, table):
        results[prompt, sample] = answer
        left[prompt] -= 1
        if not left[prompt]:
            on_done(1)
    return [results[asked] for asked in sorted(results)]


def _checked(table: TokenTable, model: Any, options: GenerateOptions) -> TokenTable:
    """The table, as wide as the model's logits."""
    shortest = int(table.needed[0])
    if shortest > options.max_new_tokens:
        raise UserError(
            f"the shortest match has {shortest} tokens, its end included, and "
            f"{options.max_new_tokens} are allowed",
            "decoding",
            "allow more new tokens",
        )
    if options.stop or options.stop_ids:
        raise UserError(
            "a pattern with stop strings or stop ids",
            "decoding",
            "leave them out: an answer ends where its match does",
        )
    padding = model.config.vocab_size - table.targets.shape[1]
    widened = jnp.pad(table.targets, ((0, 0), (0, padding)), constant_values=NEVER)
    return table.replace(targets=widened)


def _answers(
    prepared: Prepared,
    options: GenerateOptions,
    strings: StopStrings | None,
    numbers: Sequence[int] | None,
    table: TokenTable | None,
) -> Iterator[tuple[tuple[int, int], Generated]]:
    """Numbers of prompt and sample, and the answer, as it is finished."""
    model, variables = prepared.model, prepared.variables
    # Compiled code depends on none of these; a constant keeps it from being made anew.
    compiled = dataclasses.replace(options, batch_size=1, window=1, seed=0, samples=1, stop=())
    asked = itertools.product(range(len(prepared.own)), range(options.samples))
    pending = deque(sorted(asked, key=lambda one: len(prepared.own[one[0]])))
    batch, parts = rows_of(len(pending), options.batch_size), row_parts()
    # So many rows are refilled at a time: more of them would wait longer for each other.
    together = parts * max(batch // parts // REFILLS, 1)
    held: list[tuple[int, int] | None] = [None] * batch
    looked = [0] * batch
    state, slots = None, 0
    while pending or any(held):
        free = [row for row, one in enumerate(held) if one is None]
        while pending and len(free) >= min(together, len(pending)):
            chosen = [pending.popleft() for _ in range(min(together, len(pending)))]
            places, free = free[: len(chosen)], free[len(chosen) :]
            for row, one in zip(places, chosen, strict=True):
                held[row], looked[row] = one, 0
            # What is left over repeats the last prompt, and goes nowhere.
            spare = together - len(chosen)
            needed = prefixes.size_class(len(prepared.own[chosen[-1][0]]))
            asked = chosen + [chosen[-1]] * spare
            prompted = _prompted(prepared, options, asked, needed, numbers)
            if table is not None:
                prompted = prompted._replace(matched=jnp.zeros(len(asked), jnp.int32))
            if state is None:
                state = continuous.idle(model, compiled, prompted, batch)
            elif needed > slots:
                state = continuous.grow(state, needed - slots)
            slots = needed
            to = jnp.asarray(places + [batch] * spare, jnp.int32)
            state = continuous.refill(model, compiled, variables, state, prompted, to, table)
        assert state is not None, "there is a prompt, and at first every row is free"
        state, drawn = continuous.run(
            *(model, compiled, variables, prepared.shared, state),
            jnp.asarray([one is None for one in held]),
            jnp.int32(min(together, len(pending)) or batch),
            jnp.int32(STRIDE if options.stop else options.max_new_tokens),
            table,
        )
        drawn = jax.device_get(drawn)
        for row, one in enumerate(held):
            if one is None:
                continue
            count, done = int(drawn.count[row]), bool(drawn.done[row])
            own = drawn.tokens[row, :count].tolist(), drawn.log_probabilities[row, :count].tolist()
            answer = _read(options, strings, *own, looked[row], done)
            looked[row] = count // STRIDE * STRIDE
            if answer is not None:
                held[row] = None
                yield one, answer


def _prompted(
    prepared: Prepared,
    options: GenerateOptions,
    asked: Sequence[tuple[int, int]],
    slots: int,
    numbers: Sequence[int] | None,
) -> continuous.Prompted:
    """Prompts for some rows, by numbers of prompt and sample, in so many slots."""
    indices, samples = zip(*asked, strict=True)
    root, fold_in = jax.random.key(options.seed), jax.random.fold_in
    own = [numbers[i] if numbers else i for i in indices]
    keys = jax.vmap(fold_in, (None, 0))(root, np.array(own, np.uint32))
    keys = jax.vmap(fold_in)(keys, np.array(samples, np.uint32))
    seen = None
    if options.repetition_penalty != 1.0:
        bound: Any = prepared.model
        seen = np.zeros((len(indices), bound.config.vocab_size), bool)
        for row, i in zip(seen, indices, strict=True):
            # Answers of an encoder-decoder follow its start tokens, not its sources.
            row[list(options.start or (*prepared.opening, *prepared.own[i]))] = True
        seen = jnp.asarray(seen)
    return continuous.Prompted(prepared.rows(indices, slots), keys, seen)


def _read(
    options: GenerateOptions,
    strings: StopStrings | None,
    tokens: Sequence[int],
    log_probabilities: Sequence[float],
    looked: int,
    done: bool,
) -> Generated | None:
    """The answer that drawn tokens are, cut where it ends; None if it may go on."""
    kept, ended = until(options.ends, tokens)
    stopped = None
    if strings is not None and strings.strings:
        stopped = strings.find(kept, looked, done)
    if stopped is not None:
        kept, ended, text = kept[: stopped.kept], True, stopped.text
    elif done:
        text = None if strings is None else strings.decode(kept)
    else:
        return None
    return Generated(kept, tuple(log_probabilities[: len(kept) + ended]), ended, text)


def until(ends: Sequence[int], tokens: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    """The tokens before the first that ends an answer, and whether there is one."""
    before = tuple(itertools.takewhile(lambda token: token not in ends, tokens))
    return before, len(before) < len(tokens)
