"""How alike adapters are, by their deltas: cosines, and angles between the spaces they use.

Deltas are compared from their factors and never formed. A kernel that an adapter lacks is a
delta of zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ecomjax import trees
from ecomjax.adapters.lowrank import Factors, decompose, factors_of, inner, shapes_of
from ecomjax.typing import Adapter

NEGLIGIBLE = 1e-5
"""Singular values of a delta that span nothing, against the largest."""


class Similarity(NamedTuple):
    """Each a symmetric table between adapters."""

    cosine: Float[np.ndarray, "A A"]
    """<Δ_i, Δ_j> / |Δ_i| |Δ_j|, over all matrices as one vector; 0 where a delta is zero."""
    inputs: Float[np.ndarray, "A A"]
    """Overlap of the spaces of inputs that the deltas read, see `overlap`."""
    outputs: Float[np.ndarray, "A A"]
    """Overlap of the spaces of outputs that they write."""


def compare(adapters: Sequence[Adapter]) -> tuple[Similarity, dict[str, Similarity]]:
    """The similarity of all kernels together, and {path: that of one kernel}.

    Overlaps are means over the matrices of the stack, and then over all matrices.

    Raises:
        UserError: what `lowrank.shapes_of` refuses.
    """
    flat = [trees.flatten(adapter) for adapter in adapters]
    count = len(adapters)
    totals = np.zeros((3, count, count))
    matrices, by_kernel = 0, {}
    for path, shape in shapes_of(adapters).items():
        sums = np.zeros((3, count, count))
        for index in np.ndindex(shape.stack):
            terms = [factors_of(leaves.get(path), shape, index) for leaves in flat]
            spaces = [spans(term) for term in terms]
            for i, j in zip(*np.triu_indices(count), strict=True):
                row = (
                    inner(terms[i], terms[j]),
                    overlap(principal_angles(spaces[i][0], spaces[j][0])),
                    overlap(principal_angles(spaces[i][1], spaces[j][1])),
                )
                sums[:, i, j] += row
                sums[:, j, i] = sums[:, i, j]
        size = math.prod(shape.stack)
        by_kernel[path] = _similarity(sums, size)
        totals, matrices = totals + sums, matrices + size
    return _similarity(totals, matrices), by_kernel


def _similarity(sums: Float[np.ndarray, "3 A A"], matrices: int) -> Similarity:
    norms = np.sqrt(np.diagonal(sums[0]).clip(0.0))
    product = np.outer(norms, norms)
    cosine = np.divide(sums[0], product, out=np.zeros_like(product), where=product > 0)
    return Similarity(cosine, sums[1] / matrices, sums[2] / matrices)


def spans(delta: Factors) -> tuple[Float[np.ndarray, "d_in R"], Float[np.ndarray, "d_out R"]]:
    """Orthonormal bases of the column space of a delta [d_in, d_out] and of its row space.

    The columns span the inputs that it reads, the rows the outputs that it writes; in torch,
    whose weights are transposed, it is the other way round. Factors of zeros span nothing.
    """
    whole = decompose(delta)
    rank = int((whole.s > NEGLIGIBLE * whole.s.max(initial=0.0)).sum())
    return whole.u[:, :rank], whole.vt[:rank].T


def principal_angles(
    x: Float[np.ndarray, "d R1"], y: Float[np.ndarray, "d R2"]
) -> Float[np.ndarray, "R"]:
    """The angles between two spaces in radians, rising, as many as the smaller has dimensions.

    cos θ are the singular values of x^T y for orthonormal x and y; small angles come from their
    sines, which is exact (Björck and Golub 1973; Knyazev and Argentati 2002).
    """
    import scipy.linalg

    if not (x.shape[1] and y.shape[1]):
        return np.zeros(0)
    angles = scipy.linalg.subspace_angles(x.astype(np.float64), y.astype(np.float64))
    return angles[::-1]


def overlap(angles: Float[np.ndarray, "R"]) -> float:
    """The mean of cos^2 θ, in [0, 1]: 1 where the smaller space lies in the larger.

    |x^T y|^2 / min(R1, R2), the similarity of the LoRA paper (Hu et al. 2021, arXiv 2106.09685,
    equation 4). 0 where a space is empty.
    """
    return float(np.mean(np.cos(angles) ** 2)) if len(angles) else 0.0
