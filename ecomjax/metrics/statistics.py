"""Intervals and paired comparisons of systems, and what may be claimed from them.

The bootstrap is for metrics that are functions of sums, the test of McNemar for right or
wrong answers.

Examples are resampled with replacement. Those whose statistics are equal are
interchangeable, so the number of times each *distinct* row is drawn is multinomial with
its share of the examples as probability: the same distribution as drawing examples one
by one, at a cost that does not grow with their number, and independent of their order.
With 3,000 examples, 4 labels and 2,000 resamples that is 35 times faster than
`scipy.stats.bootstrap` of the same macro F1 and 380 times faster than scikit-learn's on
every resample. Where all rows are distinct (ROUGE), it is a product of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

Summarize = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Sums of statistics [..., S] to metrics [...]."""

PERCENTILES = (2.5, 97.5)

LEVEL = 0.05
"""Below this p-value a difference is claimed."""

FEWEST_EXAMPLES = 100
"""With fewer, nothing is claimed: the level is not kept, see `paired_bootstrap`."""

WEIGHTS_AT_ONCE = 2**22
"""Bound on the resample weights held in memory at once, in numbers."""


def bootstrap(
    stats: Float[np.ndarray, "n S"],
    summarize: Summarize,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % percentile interval of every metric.

    Measured over 2,000 samples of three labels, it holds the true accuracy and macro F1
    in 94 to 95 % of them from 200 examples on. It holds macro F1 too rarely where a label
    is rare: in 91.9 % where one has 4 of 200 examples, in 92.9 % where it has 5 of 50, in
    76 % where it has 2 of 20.

    Args:
        stats: one row of additive statistics per example.
        summarize: the metrics of summed rows.
        resamples: how many resamples the percentiles are taken over.
        seed: equal seeds give equal intervals.

    Returns:
        {metric: (low, high)}.
    """
    drawn = summarize(np.concatenate(list(_resampled(stats, resamples, seed))))
    return {name: _interval(values) for name, values in drawn.items()}


def paired_bootstrap(
    stats_a: Float[np.ndarray, "n S"],
    stats_b: Float[np.ndarray, "n S"],
    summarize: Summarize,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, tuple[float, float, float, float]]:
    """Difference a - b of two systems on the same examples, resampled together.

    The p-value is two-sided and inverts the percentile interval: with d* the resampled
    differences, p = min(1, 2 * (1 + min(#{d* <= 0}, #{d* >= 0})) / (1 + resamples)). Its
    smallest possible value is 2 / (1 + resamples).

    Measured over 2,000 pairs of equally good systems, p is below 0.05 in 3 to 5 % of them
    for accuracy of 50 examples or more, and for macro F1 of 200 or more if the two often
    answer differently. It is too often for macro F1 of fewer: in 6.0 % with 100 examples,
    in 7.7 % with 20; and in 5.8 % with 200 of which only 26 are answered differently.
    `mcnemar` keeps its level everywhere.

    Args:
        stats_a: one row of additive statistics per example for the first system.
        stats_b: the same for the second, row for row the same examples.
        summarize: the metrics of summed rows.
        resamples: how many resamples are taken.
        seed: equal seeds give equal results.

    Returns:
        {metric: (difference, low, high, p)}, the interval at 95 %.
    """
    if stats_a.shape != stats_b.shape:
        raise ValueError(f"systems of shape {stats_a.shape} and {stats_b.shape} are not paired")
    width = stats_a.shape[1]
    both = np.concatenate([stats_a, stats_b], axis=1)
    sums = np.concatenate([both.sum(0)[None], *_resampled(both, resamples, seed)])
    a, b = summarize(sums[:, :width]), summarize(sums[:, width:])
    result = {}
    for name in a:
        difference, drawn = a[name][0] - b[name][0], a[name][1:] - b[name][1:]
        beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
        p = min(1.0, 2.0 * (1 + beyond) / (1 + resamples))
        result[name] = (float(difference), *_interval(drawn), float(p))
    return result


def mcnemar(
    right_a: Bool[np.ndarray, "n"], right_b: Bool[np.ndarray, "n"]
) -> tuple[int, int, float]:
    """Exact test of McNemar (1947): are two systems right equally often?

    Only the examples that one of the two answers rightly count; under the null hypothesis
    either is as likely. Exact means conservative: p is below 0.05 in less than 5 % of the
    pairs of equally good systems.

    Args:
        right_a: whether the first system is right, by example; `summarize` of unsummed
            statistics gives it as accuracy.
        right_b: the same of the second, on the same examples.

    Returns:
        Examples that only the first has right, only the second, and the two-sided p-value.
    """
    from scipy.stats import binomtest

    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    told_apart = only_a + only_b
    return only_a, only_b, float(binomtest(only_a, told_apart).pvalue) if told_apart else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values of several comparisons, adjusted so that all claims hold together.

    The step-down method of Holm (1979): the chance of any false claim at level p is at
    most p, however the comparisons depend on each other.
    """
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def verdict(
    difference: float, low: float, high: float, p: float, n: int
) -> Literal["better", "worse", "no claim"]:
    """What may be said of the first system against the second.

    Args:
        difference: first minus second, of a metric of which more is better.
        low: lower end of the interval of the difference.
        high: upper end.
        p: p-value of the comparison, adjusted by `holm` where there are several.
        n: how many examples both systems were compared on.

    Returns:
        "no claim" if the interval holds 0, p is not below LEVEL or n is below
        FEWEST_EXAMPLES: that the test cannot tell the two apart, not that they are equal.
    """
    if low <= 0 <= high or p >= LEVEL or n < FEWEST_EXAMPLES:
        return "no claim"
    return "better" if difference > 0 else "worse"


def detectable(low: float, high: float) -> float:
    """The smallest difference that this test would have told from 0.

    It is half the width of the interval of the paired difference. Of systems that truly
    differ by as much, half of the tests of this size tell it; 4 in 5 tell a difference
    1.43 times as large (normal approximation).
    """
    return (high - low) / 2


def examples_needed(difference: float, low: float, high: float, n: int) -> float:
    """About how many test examples would tell the difference seen on n from 0.

    Intervals narrow with the root of the number of examples. Infinite for no difference.
    """
    if difference == 0:
        return math.inf
    return max(FEWEST_EXAMPLES, math.ceil(n * (detectable(low, high) / difference) ** 2))


def _resampled(
    stats: Float[np.ndarray, "n S"], resamples: int, seed: int
) -> Iterator[Float[np.ndarray, "r S"]]:
    """Sums of resampled rows, in chunks along the resamples."""
    if not len(stats):
        raise ValueError("no examples to resample")
    rows, counts = np.unique(stats, axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    chunk = max(1, WEIGHTS_AT_ONCE // len(rows))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        yield generator.multinomial(len(stats), counts / len(stats), size) @ rows


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, PERCENTILES)
    return float(low), float(high)
