"""From a packing plan to batches: grain walks the steps and remembers where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ecomjax.data.packing import Encoded, Plan, assemble
from ecomjax.typing import Batch


class StepSource:
    """Random access to the microbatches of each optimizer step: leaves [M, B, T]."""

    def __init__(self, plan: Plan, sequences: Sequence[Encoded], rows: int):
        self._plan, self._sequences, self._rows = plan, sequences, rows

    def __len__(self) -> int:
        return len(self._plan.steps)

    def __getitem__(self, index: Any) -> Batch:
        """The batch of step `index`, its rows cut into microbatches of `rows`."""
        batch = assemble(self._plan.steps[int(index)], self._sequences, self._plan)
        return batch.replace(
            **{
                name: np.reshape(getattr(batch, name), (-1, self._rows, self._plan.row_length))
                for name in batch.__dataclass_fields__
            }
        )


def iterate(plan: Plan, sequences: Sequence[Encoded], rows: int) -> Any:
    """A checkpointable iterator (`get_state`, `set_state`) over the steps of a plan."""
    import grain

    source: Any = StepSource(plan, sequences, rows)
    return iter(grain.MapDataset.source(source).to_iter_dataset())
