"""Which sequences share a row: a pure function of lengths, seed and epoch.

Every optimizer step takes its examples from a seeded permutation, whatever the packing, so
that packed, plain and padded runs see the same examples in the same steps, and every host
computes the same plan. A row opens with the longest token prefix that all examples share
(the instruction), held once; its examples attend to it and to themselves only, and stand
at the positions they would have alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from ecomjax.errors import UserError
from ecomjax.typing import PADDING_SEGMENT, SHARED_SEGMENT, Batch

Packing = Literal["shared_prefix", "plain", "pad"]
Row = tuple[int, ...]
"""Indices of the examples of one row; an empty row holds nothing."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A tokenized example: `tokens[prompt:]` is what the model learns to say.

    Attributes:
        id: the example's id.
        tokens: prompt, answer and end token.
        prompt: number of prompt tokens, at least 1.
    """

    id: str
    tokens: tuple[int, ...]
    prompt: int


def shared_prefix(sequences: Sequence[Encoded]) -> int:
    """Length of the longest token prefix common to all prompts, short of their last token.

    The last prompt token predicts the first answer token, which differs between examples,
    so it stays in each example's own segment.
    """
    if not sequences:
        return 0
    first = sequences[0].tokens
    common = min(s.prompt for s in sequences) - 1
    for s in sequences:
        while first[:common] != s.tokens[:common]:
            common -= 1
    return common


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths sum to at most `capacity`, longest first into the first fit."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of every optimizer step of a run.

    Attributes:
        steps: for each step, its rows; all steps have as many, the last ones empty.
        row_length: T.
        prefix: number of tokens that open every row for all its examples.
        epoch_ends: for each epoch, the number of steps when it is over.
    """

    steps: tuple[tuple[Row, ...], ...]
    row_length: int
    prefix: int
    epoch_ends: tuple[int, ...]


def make_plan(
    lengths: Int[np.ndarray, "n"],
    *,
    prefix: int,
    packing: Packing,
    row_length: int,
    batch_size: int,
    epochs: int,
    rows_multiple: int = 1,
    seed: int | None,
) -> Plan:
    """Plans `epochs` passes of `batch_size` examples a step, every pass in another order.

    Args:
        lengths: tokens of each example, none longer than `row_length`.
        prefix: tokens common to all examples; held once a row under "shared_prefix".
        packing: "shared_prefix", "plain" (examples side by side) or "pad" (one a row).
        row_length: T.
        batch_size: examples a step; the last step of an epoch may hold fewer.
        epochs: number of passes.
        rows_multiple: rows a step are rounded up to a multiple of this.
        seed: of the permutations; None keeps the examples in order.
    """
    if packing != "shared_prefix":
        prefix = 0
    own = np.asarray(lengths, np.int64) - prefix
    steps: list[list[Row]] = []
    ends: list[int] = []
    for epoch in range(epochs):
        order = np.arange(len(own))
        if seed is not None:
            order = np.random.default_rng([seed, epoch]).permutation(len(own))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            if packing == "pad":
                rows = [[i] for i in range(len(chosen))]
            else:
                rows = first_fit(own[chosen].tolist(), row_length - prefix)
            steps.append([tuple(int(chosen[i]) for i in row) for row in rows])
        ends.append(len(steps))
    most = max((len(rows) for rows in steps), default=0)
    most = -(-most // rows_multiple) * rows_multiple
    padded = tuple((*rows, *[()] * (most - len(rows))) for rows in steps)
    return Plan(padded, row_length, prefix, tuple(ends))


def assemble(rows: Sequence[Row], sequences: Sequence[Encoded], plan: Plan) -> Batch:
    """Writes rows of a plan out as arrays [B, T] of numpy."""
    shape = (len(rows), plan.row_length)
    tokens, positions, targets = (np.zeros(shape, np.int32) for _ in range(3))
    segments = np.full(shape, PADDING_SEGMENT, np.int32)
    weights = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        slot = plan.prefix if row else 0
        if row:
            tokens[b, :slot] = sequences[row[0]].tokens[:slot]
            positions[b, :slot] = np.arange(slot)
            segments[b, :slot] = SHARED_SEGMENT
        for segment, index in enumerate(row, start=1):
            sequence = sequences[index]
            own = np.asarray(sequence.tokens[plan.prefix :], np.int32)
            end = slot + len(own)
            tokens[b, slot:end] = own
            positions[b, slot:end] = plan.prefix + np.arange(len(own))
            segments[b, slot:end] = segment
            targets[b, slot : end - 1] = own[1:]
            weights[b, slot + sequence.prompt - plan.prefix - 1 : end - 1] = 1.0
            slot = end
    return Batch(tokens, positions, segments, targets, weights)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is left of a data set after the window, and what was not."""

    sequences: tuple[Encoded, ...]
    too_long: tuple[str, ...]
    """Ids of the examples longer than the window."""


def fit_window(
    sequences: Sequence[Encoded], window: int, policy: Literal["drop", "raise"], where: str
) -> Kept:
    """Drops the examples longer than `window` tokens, or refuses them; never cuts one.

    Raises:
        UserError: the policy is "raise" and an example is too long, or none is left.
    """
    long = tuple(s.id for s in sequences if len(s.tokens) > window)
    if long and policy == "raise":
        raise UserError(
            f"{len(long)} of {len(sequences)} examples longer than the window of {window} tokens",
            f"{where}, first id {long[0]}",
            "raise training.row_length or set training.too_long=drop",
        )
    kept = tuple(s for s in sequences if len(s.tokens) <= window)
    if not kept:
        raise UserError(
            f"no example fits the window of {window} tokens",
            where,
            "raise training.row_length or give non-empty data",
        )
    return Kept(kept, long)
