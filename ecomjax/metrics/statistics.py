"""Bootstrap intervals and paired comparisons of metrics that are functions of sums.

Examples are resampled with replacement. Those whose statistics are equal are
interchangeable, so the number of times each *distinct* row is drawn is multinomial with
its share of the examples as probability: the same distribution as drawing examples one
by one, at a cost that does not grow with their number, and independent of their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float

Summarize = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Sums of statistics [..., S] to metrics [...]."""

PERCENTILES = (2.5, 97.5)

WEIGHTS_AT_ONCE = 2**22
"""Bound on the resample weights held in memory at once, in numbers."""


def bootstrap(
    stats: Float[np.ndarray, "n S"],
    summarize: Summarize,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % percentile interval of every metric.

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
