"""Precision, recall and F1 as ratios of counts, with 0/0 = 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def ratio(part: ArrayLike, whole: ArrayLike) -> np.ndarray:
    """part / whole [*r], and 0 where whole is 0."""
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole != 0)


def f1(hits: ArrayLike, predicted: ArrayLike, gold: ArrayLike) -> np.ndarray:
    """Harmonic mean of hits/predicted and hits/gold [*r], as 2 hits / (predicted + gold)."""
    return ratio(2.0 * np.asarray(hits), np.asarray(predicted) + np.asarray(gold))
