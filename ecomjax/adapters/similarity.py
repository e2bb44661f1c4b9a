"""How alike adapters are, by their deltas and by what models with them compute.

Deltas are compared by cosines and by angles between the spaces they use, from their factors
and never formed. A kernel that an adapter lacks is a delta of zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ecomjax import trees
from ecomjax.adapters.lowrank import Factors, decompose, factors_of, inner, shapes_of
from ecomjax.errors import UserError
from ecomjax.typing import Adapter

NEGLIGIBLE = 1e-5
"""Singular values of a delta that span nothing, against the largest."""

PERMUTATIONS = 9999
"""Most that a test goes through; of seven adapters or fewer they are all of them."""


class Similarity(NamedTuple):
    """Each a symmetric table between adapters."""

    cosine: Float[np.ndarray, "A A"]
    """<Δ_i, Δ_j> / |Δ_i| |Δ_j|, over all matrices as one vector; 0 where a delta is zero."""
    inputs: Float[np.ndarray, "A A"]
    """Overlap of the spaces of inputs that the deltas read, see `overlap`."""
    outputs: Float[np.ndarray, "A A"]
    """Overlap of the spaces of outputs that they write."""
    input_distance: Float[np.ndarray, "A A"]
    """Grassmann distance of the spaces of inputs, see `grassmann`. Unlike overlaps it tells a
    space from one that holds it, and is a metric, as clustering wants."""
    output_distance: Float[np.ndarray, "A A"]
    """Grassmann distance of the spaces of outputs."""


def compare(adapters: Sequence[Adapter]) -> tuple[Similarity, dict[str, Similarity]]:
    """The similarity of all kernels together, and {path: that of one kernel}.

    Overlaps and distances are means over the matrices of the stack, and over all matrices.

    Raises:
        UserError: what `lowrank.shapes_of` refuses.
    """
    flat = [trees.flatten(adapter) for adapter in adapters]
    count = len(adapters)
    totals = np.zeros((5, count, count))
    matrices, by_kernel = 0, {}
    for path, shape in shapes_of(adapters).items():
        sums = np.zeros((5, count, count))
        for index in np.ndindex(shape.stack):
            terms = [factors_of(leaves.get(path), shape, index) for leaves in flat]
            spaces = [spans(term) for term in terms]
            for i, j in zip(*np.triu_indices(count), strict=True):
                sides = list(zip(spaces[i], spaces[j], strict=True))
                angles = [principal_angles(x, y) for x, y in sides]
                row = (
                    inner(terms[i], terms[j]),
                    *(overlap(of_side) for of_side in angles),
                    *(
                        grassmann(of_side, abs(x.shape[1] - y.shape[1]))
                        for of_side, (x, y) in zip(angles, sides, strict=True)
                    ),
                )
                sums[:, i, j] += row
                sums[:, j, i] = sums[:, i, j]
        size = math.prod(shape.stack)
        by_kernel[path] = _similarity(sums, size)
        totals, matrices = totals + sums, matrices + size
    return _similarity(totals, matrices), by_kernel


def _similarity(sums: Float[np.ndarray, "5 A A"], matrices: int) -> Similarity:
    return Similarity(_cosines(sums[0]), *(sums[1:] / matrices))


def _cosines(inner_products: Float[np.ndarray, "A A"]) -> Float[np.ndarray, "A A"]:
    """<i, j> / |i| |j|, 0 where a norm is."""
    norms = np.sqrt(np.diagonal(inner_products).clip(0.0))
    product = np.outer(norms, norms)
    return np.divide(inner_products, product, out=np.zeros_like(product), where=product > 0)


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


def grassmann(angles: Float[np.ndarray, "R"], beyond: int = 0) -> float:
    """sqrt(Σ θ^2 + beyond * (π/2)^2), the length of the geodesic between two spaces.

    Edelman, Arias and Smith 1998, arXiv physics/9806030, section 4.3. Where one space has
    `beyond` more dimensions than the other, each counts as a right angle: that makes it a
    metric of spaces of all dimensions (Ye and Lim 2016, arXiv 1407.0900, section 5).
    """
    return math.sqrt(float(np.sum(np.square(angles))) + beyond * (math.pi / 2) ** 2)


def cka(activations: Sequence[Float[np.ndarray, "_n _D"]]) -> Float[np.ndarray, "A A"]:
    """Linear centred kernel alignment of what models made of the same n inputs.

    |Y^T X|^2 / (|X^T X| |Y^T Y|) for columns less their means, in float64: equations 3 and 4
    of Kornblith et al. 2019, arXiv 1905.00414, for K = X X^T, without the matrices [n, n]. It
    is 1 for X and a rotation or a multiple of X, and 0 where activations do not vary. Give
    many more inputs than dimensions: with fewer it is high for unrelated activations too.

    Args:
        activations: row for row of the same inputs, by adapter; widths may differ.

    Raises:
        UserError: other than equal numbers of rows; NaN or infinity.
    """
    centred = []
    for number, values in enumerate(activations):
        whole = np.asarray(values, np.float64)
        if len(whole) != len(activations[0]):
            raise UserError(
                f"{len(whole)} rows, those before have {len(activations[0])}",
                f"activations of adapter {number}",
                "run all adapters over the same inputs",
            )
        if not np.isfinite(whole).all():
            raise UserError(
                "NaN or infinity", f"activations of adapter {number}", "leave the adapter out"
            )
        centred.append(whole - whole.mean(axis=0))
    table = np.zeros((len(centred), len(centred)))
    for i, j in itertools.combinations_with_replacement(range(len(centred)), 2):
        table[i, j] = table[j, i] = np.sum(np.square(centred[i].T @ centred[j]))
    return _cosines(table)


class Correlation(NamedTuple):
    """A rank correlation, and how often chance gives as strong a one."""

    rho: float
    p_value: float


def transfer_correlation(
    similarity: Float[np.ndarray, "A A"], transfer: Float[np.ndarray, "A A"], seed: int = 0
) -> Correlation:
    """Do adapters that are alike do well on each other's tasks? Spearman's rank correlation.

    It is over unordered pairs {i, j}, with the mean of transfer both ways: similarity is
    symmetric, so it can say nothing of i on j against j on i, and the two are no two pieces of
    evidence. The diagonal is left out.

    Pairs that share an adapter depend on each other, so what is permuted is whole adapters,
    rows and columns together (Mantel 1967): p is the share of permutations with as large a
    |rho|, over all of them where they are at most `PERMUTATIONS`, else over that many that are
    drawn, the one observed counted with them. Of three adapters p is never below 1/3, of four
    never below 1/24.

    Args:
        similarity: symmetric; a table of `Similarity`, or of `cka`. Of distances rho is
            negative.
        transfer: [i, j] is the score of adapter i on task j, relative to that of j's own.
        seed: of the permutations drawn.

    Raises:
        UserError: fewer than three adapters; NaN or infinity off the diagonal; pairs that are
            all alike in one of the tables.
    """
    from scipy.stats import rankdata

    count = len(similarity)
    if count < 3:
        raise UserError(
            f"{count} adapters", "correlation of similarity and transfer", "give three or more"
        )
    upper = np.triu_indices(count, 1)
    ranks = []
    for name, table in (("similarity", similarity), ("transfer", transfer)):
        pairs = ((table + table.T) / 2)[upper]
        if not np.isfinite(pairs).all() or np.ptp(pairs) == 0.0:
            raise UserError(
                "pairs without a finite value, or all of one",
                f"table of {name}",
                "give a value for each pair, or leave the correlation out",
            )
        ranks.append(rankdata(pairs) - (len(pairs) + 1) / 2)
    square = np.zeros((count, count))
    square[upper] = ranks[1]
    square += square.T
    exact = math.factorial(count) <= PERMUTATIONS
    rng = np.random.default_rng(seed)
    drawn = (rng.permutation(count) for _ in range(PERMUTATIONS))
    others = itertools.permutations(range(count)) if exact else drawn
    orders = np.array([np.arange(count), *others])
    permuted = square[orders[:, upper[0]], orders[:, upper[1]]]
    rho = permuted @ ranks[0] / math.prod(np.linalg.norm(rank) for rank in ranks)
    # Equal statistics differ in their last digits by the order of summation. All orders hold
    # the observed one; to drawn ones it is added.
    extreme = (np.abs(rho) >= abs(rho[0]) - 1e-9)[int(exact) :]
    return Correlation(float(rho[0]), float(extreme.mean()))
