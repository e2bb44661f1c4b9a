"""Dropping entries of a delta before several are merged; always of one matrix at a time.

A threshold or a ranking over a whole stack would keep nothing of some layers and nearly all of
others.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float

from ecomjax.adapters.blocks import row_blocks
from ecomjax.errors import UserError

KINDS = ("magnitude", "random", "outliers", "ranked")
RESCALES = ("expectation", "l1", "none")

SAMPLE = 2**18
"""Entries by which the place of one among all is guessed."""


def sparsify(
    matrix: Float[np.ndarray, "d_in d_out"],
    kind: str,
    density: float,
    rng: np.random.Generator,
    gamma: float = 0.01,
    epsilon: float = 0.1,
    rescale: str = "expectation",
) -> Float[np.ndarray, "d_in d_out"]:
    """Sets all but about a share `density` of the entries of a matrix to zero, where it lies.

    Args:
        matrix: a delta [d_in, d_out], which is also returned.
        kind: "magnitude", see `largest`; "random", an entry stays with probability `density`
            (DARE, Yu et al. 2023, arXiv 2311.03099); "outliers", see `middle`; "ranked", it
            stays with a probability of its rank (DELLA), see `ranked`.
        density: share kept, in (0, 1]; at 1 the matrix stays as it is.
        rng: draws what stays; not used where nothing is random.
        gamma: share of largest entries dropped by "outliers".
        epsilon: width of the probabilities of "ranked".
        rescale: "expectation" divides what stays by the probability that it did, which leaves
            the expected matrix as it was (DARE and DELLA: 1 / (1 - p); PEFT: 1 / density;
            nothing for kinds that draw nothing); "l1" gives back the sum of magnitudes
            (mergekit); "none" leaves what stays as it is.

    Raises:
        UserError: a kind, density or rescale that there is not.
    """
    for value, known in ((kind, KINDS), (rescale, RESCALES)):
        if value not in known:
            raise UserError(f"unknown {value!r}", "sparsify", f"use one of {', '.join(known)}")
    if not 0.0 < density <= 1.0:
        raise UserError(f"density {density}", "sparsify", "keep a share above 0, at most 1")
    if density == 1.0:
        return matrix
    before = _total(matrix) if rescale == "l1" else 0.0
    if kind in ("magnitude", "outliers"):
        low, high = bounds(matrix, density, gamma if kind == "outliers" else 0.0)
        for rows in row_blocks(matrix.shape):
            keep = _within(matrix[rows], low, high)
            np.copyto(matrix[rows], np.float32(0.0), where=~keep)
    else:
        whole, by_rank = slice(None), kind == "ranked"
        # The ranks of an entry are among those of its column.
        parts = row_blocks(matrix.shape[::-1] if by_rank else matrix.shape)
        for part in parts:
            block = matrix[(whole, part) if by_rank else (part, whole)]
            chance = ranked(block, density, epsilon) if by_rank else np.float32(density)
            keep = rng.random(block.shape, np.float32) < chance
            np.copyto(block, np.float32(0.0), where=~keep)
            if rescale == "expectation":
                block /= chance
    if rescale == "l1" and (after := _total(matrix)) > 0:
        matrix *= np.float32(before / after)
    return matrix


def largest(matrix: Float[np.ndarray, "d_in d_out"], density: float) -> Bool[np.ndarray, "..."]:
    """The int(density * size) entries of largest magnitude (TIES, arXiv 2306.01708, step 1).

    Where several are equal to the smallest of them, all are kept: which entries stay does not
    depend on where they stand.
    """
    return middle(matrix, density, 0.0)


def middle(
    matrix: Float[np.ndarray, "d_in d_out"], density: float, gamma: float
) -> Bool[np.ndarray, "..."]:
    """A share `density` below the largest share `gamma` (breadcrumbs, arXiv 2312.06795).

    The smallest entries go too. Where the shares do not fit together, fewer of the largest go,
    as in mergekit.
    """
    return _within(matrix, *bounds(matrix, density, gamma))


def bounds(
    matrix: Float[np.ndarray, "d_in d_out"], density: float, gamma: float
) -> tuple[float, float]:
    """The smallest and the largest magnitude that `middle` keeps."""
    size = matrix.size
    count = int(density * size)
    top = min(int(gamma * size), size - count)
    if count == 0:
        return math.inf, math.inf
    lowest = smallest(matrix, size - top - count)
    return lowest, smallest(matrix, size - top - 1) if top else math.inf


def smallest(matrix: Float[np.ndarray, "d_in d_out"], number: int) -> float:
    """The magnitude that stands at a place, from 0, when all are sorted.

    A sample tells between which two it almost surely lies; only those within are sorted.
    """
    flat = matrix.reshape(-1)
    places = np.random.default_rng(0).integers(matrix.size, size=SAMPLE)
    sample = np.sort(np.abs(flat[places]))
    # Five standard deviations of the place in the sample, at the median where they are widest.
    middle, margin = number / matrix.size * SAMPLE, 2.5 * math.sqrt(SAMPLE)
    first, last = math.floor(middle - margin), math.ceil(middle + margin)
    low = sample[first] if first > 0 else np.float32(0.0)
    high = sample[last] if last < SAMPLE else np.float32(np.inf)
    below, count, within = 0, 0, []
    for rows in row_blocks(matrix.shape):
        magnitudes = np.abs(matrix[rows])
        inside = magnitudes >= low
        below += magnitudes.size - int(np.count_nonzero(inside))
        inside &= magnitudes <= high
        count += int(np.count_nonzero(inside))
        if low < high:
            within.append(magnitudes[inside])
    if not 0 <= number - below < count:
        within, below = [np.abs(flat)], 0
    elif low == high:
        return float(low)
    between = np.concatenate(within)
    between.partition(number - below)
    return float(between[number - below])


def _total(matrix: np.ndarray) -> float:
    """The sum of all magnitudes."""
    blocks = (np.abs(matrix[rows]) for rows in row_blocks(matrix.shape))
    return float(sum(block.sum(dtype=np.float64) for block in blocks))


def _within(matrix: np.ndarray, low: float, high: float) -> np.ndarray:
    magnitudes = np.abs(matrix)
    keep = magnitudes >= np.float32(low)
    return keep if high == math.inf else keep & (magnitudes <= np.float32(high))


def ranked(
    matrix: Float[np.ndarray, "d_in d_out"], density: float, epsilon: float
) -> Float[np.ndarray, "d_in d_out"]:
    """The probabilities of DELLA to keep an entry (Deep et al. 2024, arXiv 2406.11617).

    They rise evenly with the rank of the magnitude among the inputs of an output, from
    density - epsilon / 2 to density + epsilon / 2. mergekit's epsilon is half of this one.

    Raises:
        UserError: probabilities below 0 or above 1.
    """
    if epsilon < 0 or not epsilon / 2 < density <= 1 - epsilon / 2:
        raise UserError(
            f"epsilon {epsilon} with density {density}",
            "DELLA",
            "keep density - epsilon / 2 above 0 and density + epsilon / 2 at most 1",
        )
    d_in = matrix.shape[0]
    steps = np.linspace(density - epsilon / 2, density + epsilon / 2, d_in, dtype=np.float32)
    probability = np.empty(matrix.shape, np.float32)
    order = np.argsort(np.abs(matrix), axis=0)
    np.put_along_axis(probability, order, np.broadcast_to(steps[:, None], matrix.shape), axis=0)
    return probability
