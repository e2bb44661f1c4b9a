"""Likelihood of given continuations, such as the labels of a classification task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Float

from ecomjax.decoding import prefix as prefixes
from ecomjax.decoding.batches import adapters_of, count_adapters, rows_of
from ecomjax.errors import UserError
from ecomjax.models.likelihood import HEAD_CHUNK, token_log_likelihood
from ecomjax.sharding import constrain, row_parts
from ecomjax.typing import BRANCHES, Batch, KVCache

ROW = 256
"""Slots of a row that several short prompts fill; of one prompt it has what that needs."""
TARGETS = 16
"""The head is applied to a multiple of so many slots of a row, so that few shapes are compiled."""


def chunk_of(targets: int) -> int:
    """Slots of a row that the head is applied to at once, where no row has more targets."""
    return min(targets + -targets % TARGETS, HEAD_CHUNK)


@partial(jax.jit, static_argnums=(0, 1))
def score_rows(
    model: nn.Module, chunk: int, variables: Any, start: KVCache, batch: Batch, adapter: Any
) -> Float[jax.Array, "B T"]:
    """Log-likelihood of each target; the head is applied to `chunk` slots of a row at once."""
    seen = prefixes.of_rows(start, adapter)
    likelihood = token_log_likelihood(
        model, variables, batch, seen, adapter_index=adapter, chunk=chunk
    )
    return constrain(likelihood, (None, None))


def label_log_likelihoods(
    model: nn.Module,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    batch_size: int,
    window: int,
    on_done: Callable[[int], None] = lambda count: None,
    adapters: Sequence[int] | None = None,
) -> Float[np.ndarray, "n labels"]:
    """log p(label | prompt), summed over the label's tokens and not normalised by length.

    Labels should end with the end token: then none is a prefix of another, and the values
    compare complete answers. A prompt is computed once for all its labels, and what all prompts
    open with once for all of them.

    Args:
        model: see `models.likelihood.token_log_likelihood`; also has `new_cache`.
        variables: {"params": ..., "lora": ...}.
        prompts: token ids, each at least one.
        labels: token ids of each label, each at least one.
        batch_size: rows scored together, each of one prompt or of several short ones; results do
            not depend on it.
        window: most tokens a prompt and one label may take together.
        on_done: called with the number of prompts just finished, for progress.
        adapters: which of several each prompt uses, see `generate`.

    Raises:
        UserError: an empty prompt or label, or a prompt too long for the window; what
            `count_adapters` refuses.
    """
    if not prompts:
        return np.zeros((0, len(labels)), np.float32)
    if not all(prompts) or not all(labels):
        raise UserError("empty prompt or label", "label scoring", "give at least one token")
    longest = max(map(len, labels))
    for i, prompt in enumerate(prompts):
        if len(prompt) + longest > window:
            raise UserError(
                f"prompt of {len(prompt)} tokens and a label of {longest} exceed the window "
                f"of {window}",
                f"prompt {i}",
                "use fewer demonstrations or shorter inputs",
            )
    offset = prefixes.common_prefix(prompts)
    count = count_adapters(variables, len(prompts), adapters)
    start = prefixes.fill_prefix(model, variables, prompts[0][:offset], count)
    tails = [prompt[offset:] for prompt in prompts]
    own = [0] * len(prompts) if adapters is None else adapters
    used = [len(tail) - 1 + sum(1 + len(label) for label in labels) for tail in tails]
    scores = np.zeros((len(prompts), len(labels)), np.float32)
    for rows, slots in in_rows(used, own, batch_size):
        batch = _write(rows, slots, tails, labels, offset)
        adapter = adapters_of([row[0] if row else 0 for row in rows], adapters)
        chunk = chunk_of(int((batch.weights > 0).sum(axis=1).max()))
        found = jax.device_get(score_rows(model, chunk, variables, start, batch, adapter))
        row, slot = np.nonzero(batch.weights)
        stem, label = np.divmod(batch.segment_ids[row, slot], BRANCHES)
        prompt = [rows[i][number - 1] for i, number in zip(row, stem, strict=True)]
        np.add.at(scores, (prompt, label), found[row, slot])
        on_done(sum(map(len, rows)))
    return scores


def in_rows(
    lengths: Sequence[int], adapters: Sequence[int], batch_size: int
) -> Iterator[tuple[list[list[int]], int]]:
    """Rows of prompts for each batch, long prompts first, and how many slots the rows have.

    A prompt goes into the first row with room whose adapter is its own. The last batch of a
    length is of half as many rows, or of half of that, if these hold the rest: few shapes are
    compiled, and on the mesh in use rows divide.

    Args:
        lengths: slots that each prompt takes with its labels.
        adapters: which one each uses.
        batch_size: rows of a batch.
    """
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    most, parts = rows_of(len(lengths), batch_size), row_parts()
    while left:
        together = Counter[int]()
        for i in left:
            together[adapters[i]] += lengths[i]
        slots = prefixes.bucketed(max(lengths[left[0]], min(ROW, max(together.values()))))
        rows: list[list[int]] = []
        room: list[int] = []
        later: list[int] = []
        for place, i in enumerate(left):
            if len(rows) == most and max(room) < lengths[left[-1]]:
                later += left[place:]
                break
            row = next(
                (
                    number
                    for number, held in enumerate(rows)
                    if room[number] >= lengths[i] and adapters[held[0]] == adapters[i]
                ),
                len(rows),
            )
            if row == most:
                later.append(i)
                continue
            if row == len(rows):
                rows.append([])
                room.append(slots)
            rows[row].append(i)
            room[row] -= lengths[i]
        count = most
        while (count > parts) and (half := -(-count // (2 * parts)) * parts) >= len(rows):
            count = half
        yield rows + [[]] * (count - len(rows)), slots
        left = later


def _write(
    rows: Sequence[Sequence[int]],
    slots: int,
    tails: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    offset: int,
) -> Batch:
    """Rows of prompt tails, each followed by all labels, which branch from it.

    Every label repeats the last prompt token, which predicts its first one.

    Args:
        rows: indices of the prompts in each.
        slots: T.
        tails: of prompts, behind the tokens that all of them open with.
        labels: token ids.
        offset: position of the first token of a tail.
    """
    shape = (len(rows), slots)
    tokens, positions, segments, targets = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        slot = 0
        for stem, index in enumerate(row, start=1):
            *inside, last = tails[index]
            branches = [(stem * BRANCHES + i, (last, *label)) for i, label in enumerate(labels)]
            for segment, own in [(stem, inside), *branches]:
                end, first = slot + len(own), 0 if segment == stem else len(inside)
                tokens[b, slot:end] = own
                positions[b, slot:end] = offset + first + np.arange(len(own))
                segments[b, slot:end] = segment
                if segment != stem:
                    targets[b, slot : end - 1] = own[1:]
                    weights[b, slot : end - 1] = 1.0
                slot = end
    return Batch(tokens, positions, segments, targets, weights)  # pyright: ignore[reportArgumentType]
