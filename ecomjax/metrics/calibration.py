"""How far the probabilities of labels can be believed: calibration error and Brier score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ecomjax.metrics.ratios import ratio

BINS = 15
"""Of equal width, as in Guo et al. (2017, arXiv 1706.04599): (0, 1/15], (1/15, 2/15], ..."""


def probabilities(loglikelihoods: Float[np.ndarray, "n C"]) -> Float[np.ndarray, "n C"]:
    """Softmax over the labels; -inf is a label that is ruled out.

    Times the gains of the labels, these are the expected gains by which to rank.

    Raises:
        ValueError: a row holds NaN or +inf, or rules out every label.
    """
    from scipy.special import softmax

    usable = (loglikelihoods < np.inf).all(-1) & (loglikelihoods.max(-1) > -np.inf)
    if not usable.all():
        raise ValueError(f"no probabilities in log-likelihoods {loglikelihoods[~usable][0]}")
    return softmax(loglikelihoods, axis=-1)


def contextual(
    loglikelihoods: Float[np.ndarray, "n C"], content_free: Float[np.ndarray, "n P C"]
) -> Float[np.ndarray, "n C"]:
    """log p(label | prompt) - log p(label | prompt without content), both among the labels.

    Contextual calibration (Zhao et al. 2021, arXiv 2102.09690, section 5): what a prompt
    favours whatever is asked is divided out. The second p is the mean over P prompts.
    """
    from scipy.special import log_softmax, logsumexp

    given = log_softmax(loglikelihoods, axis=-1)
    favoured = logsumexp(log_softmax(content_free, axis=-1), axis=1)
    return given - favoured + np.log(content_free.shape[1], dtype=given.dtype)


def statistics(
    loglikelihoods: Float[np.ndarray, "n C"], gold: Sequence[str], labels: Sequence[str]
) -> Float[np.ndarray, "n S"]:
    """Statistics of each example.

    Args:
        loglikelihoods: of every label as the answer; the predicted one is the first of the
            most likely.
        gold: the true labels, all of them in `labels`.
        labels: the C labels, in the order of the columns.

    Returns:
        [n, S = 2 * BINS + 2]: confidence (the predicted label's probability) in the
        column of its bin; 1 for a right prediction in the column of its bin; the squared
        error of the probabilities, summed over the labels; 1.
    """
    if loglikelihoods.shape != (len(gold), len(labels)):
        shape = "x".join(map(str, loglikelihoods.shape))
        raise ValueError(
            f"{shape} log-likelihoods for {len(gold)} examples of {len(labels)} labels"
        )
    place = {label: index for index, label in enumerate(labels)}
    true = np.array([place[label] for label in gold], np.int64)
    share = probabilities(loglikelihoods)
    confidence, examples = share.max(-1), np.arange(len(true))
    bins = np.searchsorted(np.arange(1, BINS) / BINS, confidence)
    rows = np.zeros((len(true), 2 * BINS + 2))
    rows[examples, bins] = confidence
    rows[examples, BINS + bins] = share.argmax(-1) == true
    rows[:, -2] = ((share - np.eye(len(labels))[true]) ** 2).sum(-1)
    rows[:, -1] = 1
    return rows


def summarize(totals: Float[np.ndarray, "*r S"]) -> dict[str, np.ndarray]:
    """Metrics of summed statistics.

    The expected calibration error is the mean distance of confidence from accuracy, over
    bins weighted by their examples (Guo et al. 2017, equation 5). It is biased upwards
    where bins hold few examples, and resamples are biased once more: its bootstrap
    interval lies too high. The Brier score (Brier 1950) is the mean squared error of the
    probabilities summed over the labels: 0 at best, 2 at worst; a proper score.

    Args:
        totals: sums of rows of `statistics`, with any leading axes.

    Returns:
        ece and brier, each [*r]; smaller is better.
    """
    confidence, right = totals[..., :BINS], totals[..., BINS : 2 * BINS]
    count = totals[..., -1]
    return {
        "ece": ratio(np.abs(right - confidence).sum(-1), count),
        "brier": ratio(totals[..., -2], count),
    }
