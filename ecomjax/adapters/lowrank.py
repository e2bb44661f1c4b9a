"""Matrices of low rank as pairs of factors: read from an adapter, added, brought to a rank.

Everything here is of one matrix at a time, in float32 on the host: a delta of a large model
is never held for all layers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ecomjax import trees
from ecomjax.adapters.blocks import BLOCK, in_threads, row_blocks
from ecomjax.errors import UserError
from ecomjax.typing import Adapter, LowRank

OVERSAMPLING = 10
"""Directions sketched beyond the rank, as Halko et al. advise."""


class Factors(NamedTuple):
    """The matrix a @ b."""

    a: Float[np.ndarray, "d_in R"]
    b: Float[np.ndarray, "R d_out"]


class Decomposition(NamedTuple):
    """The matrix (u * s) @ vt, with s falling; u and vt have orthonormal columns and rows."""

    u: Float[np.ndarray, "d_in R"]
    s: Float[np.ndarray, "R"]
    vt: Float[np.ndarray, "R d_out"]


class Shape(NamedTuple):
    """Of a kernel: its stacked axes, and the matrix in each place of the stack."""

    stack: tuple[int, ...]
    d_in: int
    d_out: int


def shapes_of(adapters: Sequence[Adapter], values: bool = True) -> dict[str, Shape]:
    """{path: shape} of the kernels that any of the adapters has, in the order of paths.

    Ranks and scales may differ. An adapter without a kernel adds nothing to it.

    Args:
        adapters: of one base.
        values: whether they are looked at too, which cannot be done under jit.

    Raises:
        UserError: no adapter; a leaf that is no plain LoRA; a kernel of another shape than in
            an adapter before; an adapter that shares no kernel with the others; NaN or
            infinity.
    """
    if not adapters:
        raise UserError("no adapter", "the list of adapters", "name at least one")
    found: dict[str, Shape] = {}
    for number, adapter in enumerate(adapters):
        flat = trees.flatten(adapter)
        if number and found.keys().isdisjoint(flat):
            raise UserError(
                f"adapter {number} has no kernel in common with those before it",
                f"it has {', '.join(sorted(flat)) or 'none'}",
                "use adapters of one base",
            )
        for path, leaf in flat.items():
            shape, where = _shape_of(leaf, number, path), f"kernel '{path}' of adapter {number}"
            if found.setdefault(path, shape) != shape:
                raise UserError(
                    f"shape {tuple(shape)}, that of an adapter before is {tuple(found[path])}",
                    where,
                    "use adapters of one base",
                )
            factors = (leaf.a, leaf.b, leaf.scale) if values else ()
            if not all(np.isfinite(np.asarray(x)).all() for x in factors):
                raise UserError("NaN or infinity", where, "train it again")
    return dict(sorted(found.items()))


def _shape_of(leaf: Any, number: int, path: str) -> Shape:
    """The shape of a leaf, whose type and factors are checked."""
    where = f"kernel '{path}' of adapter {number}"
    if type(leaf) is not LowRank:
        raise UserError(
            f"{type(leaf).__name__} is no plain LoRA", where, "fuse it into the base instead"
        )
    stack, (d_in, rank), d_out = leaf.a.shape[:-2], leaf.a.shape[-2:], leaf.b.shape[-1]
    if leaf.b.shape != (*stack, rank, d_out) or leaf.scale.shape != stack:
        raise UserError(
            f"factors {leaf.a.shape} and {leaf.b.shape} with scale {leaf.scale.shape}",
            where,
            "use factors of equal rank and stack",
        )
    return Shape(stack, d_in, d_out)


def factors_of(leaf: LowRank | None, shape: Shape, index: tuple[int, ...]) -> Factors:
    """The factors of one matrix of a stack, in float32, the scale multiplied into `a`.

    They are of rank 0 where an adapter has no such kernel.
    """
    if leaf is None:
        empty = np.zeros((shape.d_in, 0), np.float32), np.zeros((0, shape.d_out), np.float32)
        return Factors(*empty)
    a, b, scale = (np.asarray(x[index]).astype(np.float32) for x in (leaf.a, leaf.b, leaf.scale))
    return Factors(a * scale, b)


def add(terms: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """sum_i w_i a_i b_i = [w_1 a_1, w_2 a_2, ...] @ [b_1; b_2; ...]: exact, ranks add up."""
    a = [np.float32(weight) * term.a for term, weight in zip(terms, weights, strict=True)]
    return Factors(np.concatenate(a, axis=1), np.concatenate([term.b for term in terms]))


def inner(x: Factors, y: Factors) -> float:
    """<x, y> = sum((a_x^T a_y) * (b_x b_y^T)): the inner product of the matrices themselves."""
    return float(np.sum((x.a.T @ y.a) * (x.b @ y.b.T), dtype=np.float64))


def decompose(product: Factors) -> Decomposition:
    """The singular value decomposition of a @ b, without forming it.

    With a = Q_a R_a and b^T = Q_b R_b it is that of the small core R_a R_b^T, turned by Q_a
    and Q_b.
    """
    q_a, r_a = np.linalg.qr(product.a)
    q_b, r_b = np.linalg.qr(product.b.T)
    u, s, vt = np.linalg.svd(r_a @ r_b.T, full_matrices=False)
    return Decomposition(q_a @ u, s, vt @ q_b.T)


def truncate(whole: Decomposition, rank: int) -> tuple[Factors, float]:
    """Factors of the nearest matrix of a rank, and how far it is: |rest| / |whole|.

    The singular values are shared between the factors, a = u sqrt(s) and b = sqrt(s) vt. What
    has fewer of them is padded with zeros, so that the layers of a stack have one rank.
    """
    root = np.sqrt(whole.s[:rank])
    missing = rank - len(root)
    a = np.pad(whole.u[:, :rank] * root, ((0, 0), (0, missing)))
    b = np.pad(root[:, None] * whole.vt[:rank], ((0, missing), (0, 0)))
    norm = np.linalg.norm(whole.s)
    return Factors(a, b), float(np.linalg.norm(whole.s[rank:]) / norm) if norm else 0.0


def refactor(product: Factors, rank: int) -> tuple[Factors, float]:
    """`truncate` of `decompose`: the best factors of a rank (Eckart and Young 1936)."""
    return truncate(decompose(product), rank)


def approximate(
    matrix: Float[np.ndarray, "d_in d_out"],
    rank: int,
    rng: np.random.Generator,
    iterations: int = 2,
) -> tuple[Factors, float]:
    """Near-best factors of a dense matrix, and the relative error |matrix - a b| / |matrix|.

    Randomised: Q spans (M M^T)^iterations M G for a Gaussian G [d_out, rank + oversampling],
    orthonormalised at each step, and what is decomposed is Q^T M (Halko, Martinsson and Tropp
    2011, arXiv 0909.4061, algorithms 4.4 and 5.1). A matrix that is small against the rank is
    decomposed outright. The error is that of the factors returned, measured block by block.
    """
    width = rank + OVERSAMPLING
    if 2 * width >= min(matrix.shape):
        whole = Decomposition(*np.linalg.svd(matrix, full_matrices=False))
    else:
        sketch = rng.standard_normal((matrix.shape[1], width), np.float32)
        q = np.linalg.qr(_times(matrix, sketch))[0]
        for _ in range(iterations):
            q = np.linalg.qr(_times(matrix, np.linalg.qr(_turned_times(matrix, q))[0]))[0]
        u, s, vt = np.linalg.svd(_turned_times(matrix, q).T, full_matrices=False)
        whole = Decomposition(q @ u, s, vt)
    near, _ = truncate(whole, rank)
    return near, relative_error(matrix, near)


def relative_error(matrix: Float[np.ndarray, "d_in d_out"], near: Factors) -> float:
    """|matrix - a b| / |matrix| in the Frobenius norm; 0 for a matrix of zeros."""

    def squares(rows: slice) -> tuple[float, float]:
        rest = matrix[rows] - near.a[rows] @ near.b
        return float(np.linalg.norm(rest)) ** 2, float(np.linalg.norm(matrix[rows])) ** 2

    rest, norm = np.sum(list(in_threads(squares, _large_blocks(matrix))), axis=0)
    return float(np.sqrt(rest / norm)) if norm else 0.0


def _times(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    """matrix @ x, block by block."""
    return np.concatenate(list(in_threads(lambda rows: matrix[rows] @ x, _large_blocks(matrix))))


def _turned_times(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    """matrix.T @ x, block by block."""
    parts = in_threads(lambda rows: matrix[rows].T @ x[rows], _large_blocks(matrix))
    return np.sum(list(parts), axis=0)


def _large_blocks(matrix: np.ndarray) -> list[slice]:
    """Blocks large enough that products of them pay."""
    return row_blocks(matrix.shape, 16 * BLOCK)
