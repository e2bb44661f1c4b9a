"""From a packing plan to batches: grain walks the steps and remembers where it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ecomjax.data.encoded import Encoded, EncodedSet, shared_prefix
from ecomjax.data.packing import Packing, Plan, Row, assemble, make_plan
from ecomjax.typing import Batch

Assemble = Callable[[Sequence[Row], Sequence[Encoded], Plan], Batch]
"""Writes rows of a plan out as arrays [B, T] of numpy."""


class StepSource:
    """Random access to the microbatches of each optimizer step: leaves [M, B, ...].

    Hosts slice rows, never examples: of every microbatch each host has an equal part, and
    the parts of all hosts side by side are the microbatch of a single one.
    """

    def __init__(
        self,
        plan: Plan,
        sequences: Sequence[Encoded],
        rows: int,
        host: int = 0,
        hosts: int = 1,
        assemble: Assemble = assemble,
    ):
        """Makes the source of one host.

        Args:
            plan: whose rows a step are a multiple of `rows`.
            sequences: the examples that the plan is of.
            rows: rows of a microbatch over all hosts, a multiple of `hosts`.
            host: number of this host.
            hosts: how many there are.
            assemble: makes the batches.
        """
        if rows % hosts:
            raise ValueError(f"{rows} rows of a microbatch do not divide over {hosts} hosts")
        self._plan, self._sequences = plan, sequences
        self._rows, self._host, self._hosts = rows, host, hosts
        self._assemble = assemble

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: Any) -> Batch:
        """The batch of step `index`, its rows cut into microbatches."""
        part = self._rows // self._hosts
        first = self._host * part
        rows = self._plan.step(int(index))
        mine = [
            row
            for at in range(0, len(rows), self._rows)
            for row in rows[at + first : at + first + part]
        ]
        batch = self._assemble(mine, self._sequences, self._plan)
        cut = {
            name: np.reshape(leaf, (-1, part, *leaf.shape[1:]))
            for name in batch.__dataclass_fields__
            if (leaf := getattr(batch, name)) is not None
        }
        return batch.replace(**cut)


def one_pass(
    sequences: EncodedSet,
    packing: Packing,
    row_length: int,
    batch_size: int,
    rows: int,
    assemble: Assemble = assemble,
) -> StepSource:
    """All sequences once, in their order: what a validation loss is taken over."""
    plan = make_plan(
        sequences.lengths,
        [np.arange(len(sequences))],
        prefixes=[shared_prefix(sequences)],
        packing=packing,
        row_length=row_length,
        batch_size=batch_size,
        rows_multiple=rows,
    )
    return StepSource(plan, sequences, rows, assemble=assemble)


def iterate(
    plan: Plan,
    sequences: Sequence[Encoded],
    rows: int,
    host: int = 0,
    hosts: int = 1,
    assemble: Assemble = assemble,
    place: Callable[[Batch], Batch] = lambda batch: batch,
) -> Any:
    """A checkpointable iterator (`get_state`, `set_state`) over the steps of a plan.

    Args:
        plan, sequences, rows, host, hosts, assemble: see `StepSource`.
        place: brings a batch to its devices, ahead of the step that uses it.
    """
    import grain

    source: Any = grain.MapDataset.source(StepSource(plan, sequences, rows, host, hosts, assemble))
    # Few batches ahead: they are made faster than used, and hundreds would fill the memory.
    ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    return iter(source.map(place).to_iter_dataset(ahead))
