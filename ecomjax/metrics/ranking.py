"""nDCG of ranked queries; what is resampled is a query with everything ranked for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ecomjax.metrics.ratios import ratio


def statistics(
    gains: Sequence[float], scores: Sequence[float], queries: Sequence[str], k: int | None = None
) -> Float[np.ndarray, "q S"]:
    """nDCG of each query, by the linear gains given (Järvelin & Kekäläinen 2002).

    Products of equal score have no order: nDCG is the mean over all orders of them
    (McSherry & Najork 2008), so that it depends on no order of the input.

    Args:
        gains: what each product is worth to its query, at least 0.
        scores: what the products are ranked by, finite, higher first.
        queries: the query of each product; its products need not stand together.
        k: how many ranks count; None for all.

    Returns:
        [q, S = 3], queries in the order in which they first come: nDCG, 1 for a query none
        of whose products has a gain (its nDCG is 0, as in scikit-learn), 1. A query with a
        single product of some gain has an nDCG of 1.
    """
    if not len(gains) == len(scores) == len(queries):
        raise ValueError(f"{len(scores)} scores and {len(queries)} queries for {len(gains)} gains")
    if min(gains, default=0) < 0:
        raise ValueError(f"a gain of {min(gains)} is below 0")
    members: dict[str, list[int]] = {}
    for index, query in enumerate(queries):
        members.setdefault(query, []).append(index)
    worth, ranked = np.asarray(gains, float), np.asarray(scores, float)
    rows = [
        (_ndcg(worth[own], ranked[own], k), not worth[own].any(), 1) for own in members.values()
    ]
    return np.array(rows, float).reshape(-1, 3)


def _ndcg(gains: Float[np.ndarray, "m"], scores: Float[np.ndarray, "m"], k: int | None) -> float:
    from sklearn.metrics import ndcg_score

    if len(gains) == 1:  # scikit-learn refuses it.
        return float(gains[0] > 0)
    return float(ndcg_score(gains[None], scores[None], k=k))


def summarize(totals: Float[np.ndarray, "*r S"]) -> dict[str, np.ndarray]:
    """Metrics of summed statistics: ndcg (mean over the queries), no_gain_rate, each [*r]."""
    return {
        "ndcg": ratio(totals[..., 0], totals[..., 2]),
        "no_gain_rate": ratio(totals[..., 1], totals[..., 2]),
    }
