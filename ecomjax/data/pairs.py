"""Rows of what encoder-decoders read and write: sources side by side, and their targets."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from ecomjax.data.encoded import Encoded
from ecomjax.data.packing import Plan, Row
from ecomjax.data.pipeline import Assemble
from ecomjax.typing import PADDING_SEGMENT, PairBatch


def assemble_pairs(start: Sequence[int]) -> Assemble:
    """What writes rows of a plan out as arrays [B, T] of numpy, T slots for either side.

    A row holds as many pairs as have T tokens together, both sides counted.

    Args:
        start: tokens that targets open with; the last of them predicts the first token.
    """
    return functools.partial(_assemble, tuple(start))


def _assemble(
    start: tuple[int, ...], rows: Sequence[Row], sequences: Sequence[Encoded], plan: Plan
) -> PairBatch:
    shape = (len(rows), plan.row_length)
    tokens, positions, targets, sources, source_positions = (
        np.zeros(shape, np.int32) for _ in range(5)
    )
    segments, source_segments = (np.full(shape, PADDING_SEGMENT, np.int32) for _ in range(2))
    weights = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        read = written = 0
        for segment, index in enumerate(row, start=1):
            sequence = sequences[index]
            source, answer = sequence.tokens[: sequence.prompt], sequence.tokens[sequence.prompt :]
            begin, read = read, read + len(source)
            sources[b, begin:read] = source
            source_positions[b, begin:read] = np.arange(len(source))
            source_segments[b, begin:read] = segment
            # The end token is predicted and not read, as far as the start has more than one.
            shown = (*start, *answer[:-1])
            begin, written = written, written + len(shown)
            tokens[b, begin:written] = shown
            positions[b, begin:written] = np.arange(len(shown))
            segments[b, begin:written] = segment
            targets[b, written - len(answer) : written] = answer
            weights[b, written - len(answer) : written] = 1.0
    groups = np.array([plan.groups[row[0]] if row else 0 for row in rows], np.int32)
    own = (tokens, positions, segments, targets, weights, groups)
    arrays = (*own, sources, source_positions, source_segments)
    return PairBatch(*arrays)  # pyright: ignore[reportArgumentType]
