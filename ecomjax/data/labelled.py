"""Rows of what encoders read: examples side by side, each with the classes of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ecomjax.data.encoded import NO_CLASS, Encoded
from ecomjax.data.packing import Plan, Row
from ecomjax.typing import PADDING_SEGMENT, LabelledBatch


def assemble_labelled(
    rows: Sequence[Row], sequences: Sequence[Encoded], plan: Plan
) -> LabelledBatch:
    """Writes rows of a plan out as arrays [B, T] of numpy.

    Args:
        rows: of the plan.
        sequences: with marks.
        plan: one without shared prefixes.
    """
    shape = (len(rows), plan.row_length)
    tokens, positions, types, targets = (np.zeros(shape, np.int32) for _ in range(4))
    segments = np.full(shape, PADDING_SEGMENT, np.int32)
    weights = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        end = 0
        for segment, index in enumerate(row, start=1):
            sequence = sequences[index]
            marks = np.asarray(sequence.marks, np.int32)
            start, end = end, end + len(sequence.tokens)
            tokens[b, start:end] = sequence.tokens
            positions[b, start:end] = np.arange(end - start)
            segments[b, start:end] = segment
            types[b, start:end] = marks[:, 0]
            targets[b, start:end] = np.maximum(marks[:, 1], 0)
            weights[b, start:end] = marks[:, 1] != NO_CLASS
    groups = np.array([plan.groups[row[0]] if row else 0 for row in rows], np.int32)
    arrays = (tokens, positions, segments, targets, weights, groups, types)
    return LabelledBatch(*arrays)  # pyright: ignore[reportArgumentType]
