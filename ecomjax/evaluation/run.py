"""Scores of one system on one split, and the records they were computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ecomjax.evaluation.labels import LabelScore
from ecomjax.evaluation.predict import Prediction
from ecomjax.metrics import calibration, ranking
from ecomjax.metrics.statistics import Summarize, bootstrap
from ecomjax.tasks.base import Example, Invalid, Task


@dataclasses.dataclass(frozen=True)
class Score:
    """A metric with its 95 % bootstrap interval.

    Attributes:
        value: of all examples.
        low, high: ends of the interval.
        n: what was resampled: examples, or for ranking metrics queries.
    """

    value: float
    low: float
    high: float
    n: int


def score(
    task: Task,
    predictions: Sequence[Prediction],
    examples: Sequence[Example],
    resamples: int,
    seed: int,
    label_score: LabelScore = "sum",
) -> dict[str, Score]:
    """Every metric of the task with its interval.

    Where labels were scored, calibration is told too; and where they have gains and
    examples belong to queries, how well expected gains rank the examples of a query. Both need
    the probabilities of labels, which means over tokens say nothing of.

    Args:
        task: what was asked.
        predictions: one for each example.
        examples: with their targets.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        label_score: what the scores of labels are.
    """
    found = _scored(
        task.statistics([p.value for p in predictions], examples), task.summarize, resamples, seed
    )
    labels = task.labels
    if (
        label_score == "mean"
        or labels is None
        or not all(p.scores.keys() >= set(labels) for p in predictions)
    ):
        return found
    table = np.array([[p.scores[label] for label in labels] for p in predictions])
    gold = [example.target for example in examples]
    reliability = calibration.statistics(table, gold, labels)
    found |= _scored(reliability, calibration.summarize, resamples, seed)
    if task.gains and all(example.group for example in examples):
        worth = np.array([task.gains[label] for label in labels])
        expected = (calibration.probabilities(table) * worth).sum(-1)
        gains = [task.gains[label] for label in gold]
        by_query = ranking.statistics(gains, expected.tolist(), [e.group for e in examples])
        found |= _scored(by_query, ranking.summarize, resamples, seed)
    return found


def _scored(
    statistics: Float[np.ndarray, "n S"], summarize: Summarize, resamples: int, seed: int
) -> dict[str, Score]:
    values = summarize(statistics.sum(0))
    intervals = bootstrap(statistics, summarize, resamples, seed)
    return {
        name: Score(float(value), *intervals[name], len(statistics))
        for name, value in values.items()
    }


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
        "lost": prediction.lost,
        "dropped": prediction.dropped,
    }


def predictions_of_records(records: Iterable[Mapping[str, Any]]) -> list[Prediction]:
    """The predictions that were kept."""
    predictions = []
    for record in records:
        value = record["prediction"]
        if record["invalid"] is not None:
            value = Invalid(record["text"], record["invalid"])
        elif isinstance(value, list):
            value = tuple(value)
        rest = (record[name] for name in ("text", "scores", "lost", "dropped"))
        predictions.append(Prediction(value, *rest))
    return predictions
