"""Scores of a closed set of labels, from the counts of the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ecomjax.metrics.ratios import f1, ratio


def statistics(
    gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]
) -> Float[np.ndarray, "n S"]:
    """One-hot confusion cell of each example.

    Args:
        gold: the true labels, all of them in `labels`.
        predicted: the predicted labels; None, or what is not in `labels`, is invalid.
        labels: the C labels of the task, in the order of the rows and columns.

    Returns:
        [n, S = C * (C + 1)]: gold label by predicted label, the last column invalid.
    """
    if len(gold) != len(predicted):
        raise ValueError(f"{len(predicted)} predictions for {len(gold)} examples")
    place: dict[str | None, int] = {label: index for index, label in enumerate(labels)}
    width = len(labels) + 1
    rows = np.array([place[label] for label in gold], np.int64)
    columns = np.array([place.get(label, width - 1) for label in predicted], np.int64)
    cells = np.zeros((len(gold), len(labels) * width))
    cells[np.arange(len(gold)), rows * width + columns] = 1.0
    return cells


def summarize(totals: Float[np.ndarray, "*r S"], labels: Sequence[str]) -> dict[str, np.ndarray]:
    """Metrics of summed statistics.

    F1 of a label is 2 tp / (predicted + gold), and 0 where that is 0/0. `macro_f1` is
    its mean over all labels of the task, also over one that occurs neither in the gold
    nor in the predicted labels (which counts 0); `weighted_f1` weighs it with the share of
    the label among the gold ones. `micro_f1` is F1 of the hits, predicted and gold of all
    labels together. An invalid output is wrong: it lowers accuracy and the recall of its
    gold label. It is no predicted label, so that micro_f1 is accuracy where no output is
    invalid and above it otherwise.

    Args:
        totals: sums of rows of `statistics`, with any leading axes.
        labels: the labels given to `statistics`.

    Returns:
        accuracy, macro_f1, micro_f1, weighted_f1, f1/<label>, precision/<label> and
        recall/<label> for each label and invalid_rate, each [*r].
    """
    counts = confusion(totals, labels)
    gold = counts.sum(-1)
    predicted = counts[..., :-1].sum(-2)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    scores = f1(hits, predicted, gold)
    count = gold.sum(-1)
    by_label = {"f1": scores, "precision": ratio(hits, predicted), "recall": ratio(hits, gold)}
    return {
        "accuracy": ratio(hits.sum(-1), count),
        "macro_f1": np.asarray(scores.mean(-1)),
        "micro_f1": f1(hits.sum(-1), predicted.sum(-1), count),
        "weighted_f1": ratio((scores * gold).sum(-1), count),
        **{
            f"{name}/{label}": values[..., index]
            for name, values in by_label.items()
            for index, label in enumerate(labels)
        },
        "invalid_rate": ratio(counts[..., -1].sum(-1), count),
    }


def confusion(
    totals: Float[np.ndarray, "*r S"], labels: Sequence[str]
) -> Float[np.ndarray, "*r C C+1"]:
    """Confusion matrix of summed statistics: gold by predicted label, last column invalid."""
    return totals.reshape(*totals.shape[:-1], len(labels), len(labels) + 1)
