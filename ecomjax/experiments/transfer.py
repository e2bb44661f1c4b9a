"""How alike the adapters of two tasks are, against what merging these two gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ecomjax.experiments.files import read_json
from ecomjax.experiments.grid import Run
from ecomjax.experiments.results import TaskResults
from ecomjax.experiments.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A pair of tasks, merged by one method.

    Attributes:
        tasks: the two.
        method: what the merge is called in tables.
        cosine: of the two adapters' deltas.
        change: of the main metric, merged minus alone, in the mean of the two tasks.
    """

    tasks: tuple[str, str]
    method: str
    cosine: float
    change: float


def transfers(
    found: Sequence[TaskResults], runs: Sequence[Run], study: Workdir
) -> tuple[Transfer, ...]:
    """Of every pair of tasks that was merged and scored; empty where none was."""
    by_task = {results.task.name: results for results in found}
    known = []
    for run in runs:
        if run.system != "merged" or len(run.tasks) != 2 or run.scored:
            continue
        changes = []
        for results in (by_task[task] for task in run.tasks):
            alone = results.of("lora", run.train_size, run.seed)
            together = [
                one
                for one in results.of("merged", run.train_size, run.seed)
                if one.system == run.label
            ]
            changes += [
                ours.metrics[results.headline].value - theirs.metrics[results.headline].value
                for ours, theirs in zip(together, alone, strict=False)
            ]
        if len(changes) == 2:
            cosine = float(similarity(study.subrun(run.name))[0, 1])
            first, second = run.tasks
            known.append(Transfer((first, second), run.label, cosine, float(np.mean(changes))))
    return tuple(known)


def similarity(merged: Workdir) -> Float[np.ndarray, "A A"]:
    """Cosines of the deltas of the adapters that a run has merged; NaN where there is none."""
    return np.array(read_json(merged.similarity)["overall"]["cosine"], np.float64)
