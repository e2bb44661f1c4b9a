"""Which sequences share a row: a pure function of lengths, groups and order.

Every optimizer step takes the next examples of a given order, whatever the packing, so that
packed, plain and padded runs see the same examples in the same steps, and every host
computes the same plan. The examples of a row are of one group (a task). A row opens with
the longest token prefix that all examples of its group share (the instruction), held once;
its examples attend to it and to themselves only, and stand at the positions they would
have alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from ecomjax.data.encoded import Encoded
from ecomjax.typing import PADDING_SEGMENT, SHARED_SEGMENT, Batch

Packing = Literal["shared_prefix", "plain", "pad"]
Row = tuple[int, ...]
"""Indices of the examples of one row; an empty row holds nothing."""

AT_ONCE = 2**22
"""Bound on the numbers held in memory at once while a plan is made."""


def first_fit(lengths: Int[np.ndarray, "s n"], capacity: int) -> Int[np.ndarray, "s n"]:
    """Row of each item, in s independent steps: longest first into the first row with room.

    Args:
        lengths: of n items a step, at most `capacity`; negative where there is no item.
        capacity: sum of lengths that a row can hold.

    Returns:
        Numbers of rows, from 0 in each step; -1 where there is no item.
    """
    steps, items = lengths.shape
    order = np.argsort(-lengths, axis=1, kind="stable")
    room = np.full((steps, items), capacity, np.int64)
    rows = np.full((steps, items), -1, np.int64)
    every = np.arange(steps)
    for column in order.T:
        length = lengths[every, column]
        row = (room >= length[:, None]).argmax(axis=1)
        present = length >= 0
        rows[every[present], column[present]] = row[present]
        room[every[present], row[present]] -= length[present]
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The rows of every optimizer step of a run.

    Attributes:
        order: examples of all steps, one step after the other.
        row_of: the row that each of them is put into, counted from 0 in its step.
        starts: where each step begins in `order`, and where the last one ends.
        epoch_ends: for each epoch, the number of steps when it is over.
        rows: rows of every step; the last ones may be empty.
        row_length: T.
        groups: group of each example.
        prefixes: for each group, the number of tokens that open its rows for all examples.
    """

    order: Int[np.ndarray, "draws"]
    row_of: Int[np.ndarray, "draws"]
    starts: Int[np.ndarray, "ends"]
    epoch_ends: tuple[int, ...]
    rows: int
    row_length: int
    groups: Int[np.ndarray, "n"]
    prefixes: tuple[int, ...]

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.starts) - 1

    def step(self, index: int) -> tuple[Row, ...]:
        """The rows of a step."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        span = slice(int(self.starts[index]), int(self.starts[index + 1]))
        rows: list[list[int]] = [[] for _ in range(self.rows)]
        for example, row in zip(self.order[span].tolist(), self.row_of[span].tolist(), strict=True):
            rows[row].append(example)
        return tuple(map(tuple, rows))


def make_plan(
    lengths: Int[np.ndarray, "n"],
    orders: Sequence[Int[np.ndarray, "_"]],
    *,
    prefixes: Sequence[int],
    packing: Packing,
    row_length: int,
    batch_size: int,
    rows_multiple: int = 1,
    groups: Int[np.ndarray, "n"] | None = None,
) -> Plan:
    """Plans an epoch for each of `orders`, `batch_size` examples a step.

    Args:
        lengths: tokens of each example, none longer than `row_length`.
        orders: for each epoch, the examples in the order in which they are taken.
        prefixes: for each group, tokens common to all its examples; held once a row under
            "shared_prefix".
        packing: "shared_prefix", "plain" (examples side by side) or "pad" (one a row).
        row_length: T.
        batch_size: examples a step; the last step of an epoch may hold fewer.
        rows_multiple: rows a step are rounded up to a multiple of this.
        groups: group of each example; without, all are of group 0.
    """
    groups = np.zeros(len(lengths), np.int64) if groups is None else groups
    if packing != "shared_prefix":
        prefixes = [0] * len(prefixes)
    own = np.asarray(lengths, np.int64) - np.asarray(prefixes, np.int64)[groups]
    capacity = [row_length - prefix for prefix in prefixes]

    starts, ends, row_of = [np.zeros(1, np.int64)], [], []
    at_once = max(1, AT_ONCE // batch_size**2) * batch_size
    for order in orders:
        for at in range(0, len(order), at_once):
            chosen = order[at : at + at_once]
            slots = -(-len(chosen) // batch_size) * batch_size
            pad = np.full(slots - len(chosen), -1)
            steps = np.concatenate([chosen, pad]).reshape(-1, batch_size)
            rows = _rows_of(steps, own, groups, capacity, one_each=packing == "pad")
            row_of.append(rows.reshape(-1)[: len(chosen)])
            counts = (steps >= 0).sum(axis=1)
            starts.append(starts[-1][-1] + np.cumsum(counts))
        ends.append(sum(map(len, starts)) - 1)
    most = max((int(rows.max(initial=-1)) + 1 for rows in row_of), default=0)
    return Plan(
        order=np.concatenate([np.zeros(0, np.int64), *orders]).astype(np.int64),
        row_of=np.concatenate([np.zeros(0, np.int64), *row_of]),
        starts=np.concatenate(starts),
        epoch_ends=tuple(ends),
        rows=-(-most // rows_multiple) * rows_multiple,
        row_length=row_length,
        groups=groups,
        prefixes=tuple(prefixes),
    )


def _rows_of(
    steps: Int[np.ndarray, "s n"],
    own: Int[np.ndarray, "all"],
    groups: Int[np.ndarray, "all"],
    capacity: Sequence[int],
    one_each: bool,
) -> Int[np.ndarray, "s n"]:
    """Row of each example of some steps, -1 where there is no example (index -1)."""
    if one_each:
        return np.where(steps >= 0, np.arange(steps.shape[1]), -1)
    rows = np.full(steps.shape, -1, np.int64)
    for group, room in enumerate(capacity):
        member = (steps >= 0) & (groups[steps] == group)
        if member.any():
            found = first_fit(np.where(member, own[steps], -1), room)
            # The rows of a group follow those of the groups before it.
            found += rows.max(axis=1, keepdims=True) + 1
            rows = np.where(member, found, rows)
    return rows


def assemble(rows: Sequence[Row], sequences: Sequence[Encoded], plan: Plan) -> Batch:
    """Writes rows of a plan out as arrays [B, T] of numpy."""
    groups = [int(plan.groups[row[0]]) if row else 0 for row in rows]
    prefixes = [plan.prefixes[group] for group in groups]
    batch = write_rows(rows, sequences, plan.row_length, prefixes)
    return batch.replace(groups=np.array(groups, np.int32))


def write_rows(
    rows: Sequence[Row], sequences: Sequence[Encoded], row_length: int, prefixes: Sequence[int]
) -> Batch:
    """Rows as arrays [B, T] of numpy, each opened by as many shared tokens as `prefixes` says."""
    shape = (len(rows), row_length)
    tokens, positions, targets = (np.zeros(shape, np.int32) for _ in range(3))
    segments = np.full(shape, PADDING_SEGMENT, np.int32)
    weights = np.zeros(shape, np.float32)
    for b, (row, prefix) in enumerate(zip(rows, prefixes, strict=True)):
        slot = prefix if row else 0
        for segment, index in enumerate(row, start=1):
            sequence = sequences[index]
            whole = np.asarray(sequence.tokens, np.int32)
            if segment == 1:
                tokens[b, :slot] = whole[:slot]
                positions[b, :slot] = np.arange(slot)
                segments[b, :slot] = SHARED_SEGMENT
            own = whole[prefix:]
            end = slot + len(own)
            tokens[b, slot:end] = own
            positions[b, slot:end] = prefix + np.arange(len(own))
            segments[b, slot:end] = segment
            targets[b, slot : end - 1] = own[1:]
            weights[b, slot + sequence.prompt - prefix - 1 : end - 1] = 1.0
            slot = end
    return Batch(tokens, positions, segments, targets, weights)  # pyright: ignore[reportArgumentType]
