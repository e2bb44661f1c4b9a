"""Dropping entries of a delta before several are merged; always of one matrix at a time.

A threshold or a ranking over a whole stack would keep nothing of some layers and nearly all of
others.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from ecomjax.errors import UserError

KINDS = ("magnitude", "random", "outliers", "ranked")
RESCALES = ("expectation", "l1", "none")


def sparsify(
    matrix: Float[np.ndarray, "d_in d_out"],
    kind: str,
    density: float,
    rng: np.random.Generator,
    gamma: float = 0.01,
    epsilon: float = 0.1,
    rescale: str = "expectation",
) -> Float[np.ndarray, "d_in d_out"]:
    """The matrix with all but about a share `density` of its entries set to zero.

    Args:
        matrix: a delta [d_in, d_out].
        kind: "magnitude", see `largest`; "random", an entry stays with probability `density`
            (DARE, Yu et al. 2023, arXiv 2311.03099); "outliers", see `middle`; "ranked", it
            stays with a probability of its rank (DELLA), see `ranked`.
        density: share kept, in (0, 1]; at 1 the matrix comes back as it is.
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
    probability = np.float32(1.0)
    if kind == "magnitude":
        keep = largest(matrix, density)
    elif kind == "outliers":
        keep = middle(matrix, density, gamma)
    else:
        probability = ranked(matrix, density, epsilon) if kind == "ranked" else np.float32(density)
        keep = rng.random(matrix.shape, np.float32) < probability
    kept = np.where(keep, matrix, np.float32(0.0))
    if rescale == "expectation":
        kept /= probability
    elif rescale == "l1" and (total := np.abs(kept).sum()) > 0:
        kept *= np.abs(matrix).sum() / total
    return kept


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
    size = matrix.size
    count = int(density * size)
    top = min(int(gamma * size), size - count)
    if count == 0:
        return np.zeros(matrix.shape, bool)
    lowest, highest = size - top - count, size - top - 1
    magnitudes = np.abs(matrix).reshape(-1)
    magnitudes.partition(sorted({lowest, highest}))
    low, high = magnitudes[lowest], magnitudes[highest]
    del magnitudes
    keep = np.abs(matrix) >= low
    return keep & (np.abs(matrix) <= high) if top else keep


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
    order = np.argsort(np.abs(matrix), axis=0)
    steps = np.linspace(density - epsilon / 2, density + epsilon / 2, d_in, dtype=np.float32)
    probability = np.empty(matrix.shape, np.float32)
    np.put_along_axis(probability, order, np.broadcast_to(steps[:, None], matrix.shape), axis=0)
    return probability
