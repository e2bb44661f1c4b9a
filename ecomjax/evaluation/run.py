"""Scores of one system on one split, and the records they were computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ecomjax.evaluation.predict import Prediction
from ecomjax.metrics.statistics import bootstrap
from ecomjax.tasks.base import Example, Invalid, Task


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def score(
    task: Task,
    statistics: Float[np.ndarray, "n S"],
    resamples: int,
    seed: int,
) -> dict[str, Score]:
    """Every metric of the task with its interval.

    Args:
        task: whose statistics these are.
        statistics: one row an example, of `task.statistics`.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    values = task.summarize(statistics.sum(0))
    intervals = bootstrap(statistics, task.summarize, resamples, seed)
    return {name: Score(float(value), *intervals[name]) for name, value in values.items()}


def to_record(example: Example, prediction: Prediction) -> dict[str, Any]:
    """What is kept of a prediction: enough to read it, and to score it again."""
    value = prediction.value
    invalid = isinstance(value, Invalid)
    return {
        "id": example.id,
        "inputs": dict(example.inputs),
        "target": example.target,
        "prediction": None if invalid else value,
        "invalid": value.reason if invalid else None,
        "text": prediction.text,
        "scores": prediction.scores,
    }


def statistics_of_records(
    task: Task, records: Sequence[Mapping[str, Any]], examples: Sequence[Example]
) -> Float[np.ndarray, "n S"]:
    """Statistics of kept predictions; records and examples go by pairs."""
    values: list[Any] = []
    for record in records:
        value = record["prediction"]
        if record["invalid"] is not None:
            value = Invalid(record["text"], record["invalid"])
        values.append(tuple(value) if isinstance(value, list) else value)
    return task.statistics(values, examples)
