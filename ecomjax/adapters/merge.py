"""Several adapters merged into one, on their deltas scale * a @ b, matrix by matrix.

Every method is a row of `METHODS`: what is dropped from each delta, how the deltas are put
together, what the sum is divided by, where that happens, and the laws that then hold. Adapters
may differ in rank, alpha and kernels; a kernel that an adapter lacks is a delta of zero.

What lies between the adapters of one task (shards, seeds) and those of several is the same: a
list of adapters.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ecomjax import trees
from ecomjax.adapters import consensus
from ecomjax.adapters.lowrank import (
    Factors,
    add,
    approximate,
    factors_of,
    inner,
    refactor,
    row_blocks,
    shapes_of,
)
from ecomjax.adapters.sparsify import sparsify
from ecomjax.adapters.weights import Weight, resolve
from ecomjax.errors import UserError
from ecomjax.typing import Adapter, LowRank


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of `METHODS`.

    Attributes:
        sparsify: which entries are dropped first, see `sparsify.sparsify`; None for none.
        consensus: "sum", Σ w Δ; "sign", the same over the deltas that have the elected sign,
            entry by entry (see `elect`); "slerp", see `spherical`.
        normalise: what the sum is divided by: "weights", those of what was summed; "count",
            their number; "none".
        space: "factors", the sum is a concatenation of factors and exact; "aligned", on the
            coordinates in a joint basis (see `align`); "dense", on the deltas themselves, one
            matrix at a time, brought back to factors by `lowrank.approximate`.
        rank: of the result by default: "sum" of the ranks, exact unless the space is dense, or
            the "largest" of them.
        laws: names from `LAWS`.
    """

    sparsify: str | None
    consensus: str
    normalise: str
    space: str
    rank: str
    laws: frozenset[str]


LAWS = {
    "identity": "merge([a], [1]) == a",
    "undropped": "merge([a], [1]) == a at density 1",
    "repeat": "merge([a, a], [1/2, 1/2]) == a",
    "permutation": "the order of adapters (with their weights) does not matter",
    "linear": "the delta is a sum of the deltas, by factors that do not depend on them",
}

_LINEAR = frozenset({"identity", "repeat", "permutation", "linear"})
_SURE = frozenset({"undropped", "permutation"})
_DRAWN = frozenset({"undropped"})

METHODS = {
    # Σ w Δ / Σ w, the weighted average.
    "linear": Method(None, "sum", "weights", "factors", "sum", _LINEAR),
    # Σ w Δ (Ilharco et al. 2022, arXiv 2212.04089, section 2).
    "task_arithmetic": Method(None, "sum", "none", "factors", "sum", _LINEAR),
    # The same, and a rank cannot be asked for: the factors stay those of the adapters.
    "concatenation": Method(None, "sum", "none", "factors", "sum", _LINEAR),
    # The same, nearest of the largest rank.
    "svd": Method(None, "sum", "none", "factors", "largest", _LINEAR - {"linear"}),
    # Along the great circle (Shoemake 1985); two adapters.
    "slerp": Method(None, "slerp", "none", "factors", "sum", frozenset({"repeat", "permutation"})),
    "magnitude_prune": Method("magnitude", "sum", "none", "dense", "largest", _SURE),
    # Trim, elect sign, disjoint mean (Yadav et al. 2023, arXiv 2306.01708, algorithm 1).
    "ties": Method("magnitude", "sign", "weights", "dense", "largest", _SURE),
    # Drop and rescale (Yu et al. 2023, arXiv 2311.03099), then as task arithmetic or as TIES.
    "dare_linear": Method("random", "sum", "none", "dense", "largest", _DRAWN),
    "dare_ties": Method("random", "sign", "weights", "dense", "largest", _DRAWN),
    # Neither the largest nor the smallest (Davari and Belilovsky 2023, arXiv 2312.06795).
    "breadcrumbs": Method("outliers", "sum", "none", "dense", "largest", _SURE),
    "breadcrumbs_ties": Method("outliers", "sign", "none", "dense", "largest", _SURE),
    # Drop by rank, elect, fuse (Deep et al. 2024, arXiv 2406.11617).
    "della": Method("ranked", "sign", "weights", "dense", "largest", _DRAWN),
    "della_linear": Method("ranked", "sum", "none", "dense", "largest", _DRAWN),
    # TIES on coordinates in a joint basis (Stoica et al. 2024, arXiv 2410.19735, section 4).
    "knots_ties": Method("magnitude", "sign", "weights", "aligned", "sum", _SURE),
    "knots_dare_ties": Method("random", "sign", "weights", "aligned", "sum", _DRAWN),
}
"""The methods by name. What is dropped and divided follows the papers.

Where other packages differ, `Options` names it: PEFT's `ties_svd` is "ties" with
`elect="unweighted"` and `normalise="count"`, its `dare_ties_svd` likewise. mergekit's `ties` is
as here, its `dare_ties` has `normalise="none"`, and its newer versions can rescale by "l1".
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the methods leave open; each is read only by the methods that it concerns.

    Attributes:
        rank: of the result; None for the default of the method.
        density: share of entries kept, in (0, 1].
        gamma: share of largest entries that breadcrumbs drop.
        epsilon: width of the probabilities of DELLA.
        rescale: of what is kept, see `sparsify.sparsify`.
        elect: the sign is elected on "weighted" deltas (mergekit; an adapter of weight 0 has no
            say) or "unweighted" ones (the TIES paper, PEFT).
        votes: the sign is that of the "total" of the deltas (the TIES paper), or of most of
            them, their "frequency".
        normalise: in place of the method's own: "weights" (mergekit), "count" (PEFT, and the
            TIES paper, whose weights are one), "none".
    """

    rank: int | None = None
    density: float = 0.5
    gamma: float = 0.01
    epsilon: float = 0.1
    rescale: str = "expectation"
    elect: str = "weighted"
    votes: str = "total"
    normalise: str | None = None

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank {self.rank}", "merge options", "use a rank of 1 or more")
        for name, known in (
            ("elect", ("weighted", "unweighted")),
            ("votes", ("total", "frequency")),
            ("normalise", ("weights", "count", "none", None)),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} {getattr(self, name)!r}",
                    "merge options",
                    f"use one of {', '.join(str(value) for value in known)}",
                )


DEFAULTS = Options()


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What was done to one kernel; norms are of Frobenius, over all of its stack.

    Attributes:
        norms: of the delta of each adapter; 0 where it lacks the kernel.
        norm: of the merged delta, before it was brought to a rank.
        rank: of the result.
        relative_error: of bringing it to that rank, |merged - result| / |merged|.
        absent: numbers of the adapters that lack the kernel.
    """

    norms: tuple[float, ...]
    norm: float
    rank: int
    relative_error: float
    absent: tuple[int, ...]


class Merged(NamedTuple):
    """An adapter of numpy arrays, scale 1, and {path: report} of its kernels."""

    adapter: Adapter
    report: dict[str, KernelReport]


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    method: str,
    options: Options = DEFAULTS,
    seed: int = 0,
) -> Merged:
    """Merges adapters of one base.

    Args:
        adapters: trees of `LowRank`; layers stacked or not.
        weights: of each adapter, see `weights.Weight`.
        method: name of a row of `METHODS`.
        options: what that row leaves open.
        seed: of what is drawn. A matrix draws by its layer, its path and the number of the
            adapter, so that a stacked tree draws as its layers do one by one.

    Raises:
        UserError: see `merge_kernels`.
    """
    merged = list(merge_kernels(adapters, weights, method, options, seed))
    adapter = trees.unflatten({path: leaf for path, leaf, _ in merged})
    return Merged(adapter, {path: report for path, _, report in merged})


def overall_error(report: Mapping[str, KernelReport]) -> float:
    """|merged - result| / |merged| over all kernels together."""
    norm = math.hypot(*(kernel.norm for kernel in report.values()))
    rest = math.hypot(*(kernel.norm * kernel.relative_error for kernel in report.values()))
    return rest / norm if norm else 0.0


def merge_kernels(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    method: str,
    options: Options = DEFAULTS,
    seed: int = 0,
    on_matrix: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, LowRank, KernelReport]]:
    """`merge`, kernel by kernel; `on_matrix` is told the name of each matrix that is done.

    Beside the adapters and the result it holds one matrix densely for each adapter and two
    more, and none where the method works on factors.

    Raises:
        UserError: what `lowrank.shapes_of` and `weights.resolve` refuse; an unknown method; a
            rank for "concatenation"; "slerp" of other than two adapters that both have every
            kernel; weights that cannot be divided by.
    """
    row = _row(method, options)
    shapes = shapes_of(adapters)
    flat = [trees.flatten(adapter) for adapter in adapters]
    resolved = resolve(weights, len(adapters), shapes)
    for path, table in resolved.items():
        _check_weights(table, row, path)
    for path, shape in shapes.items():
        leaves = [leaf.get(path) for leaf in flat]
        ranks = [0 if leaf is None else leaf.a.shape[-1] for leaf in leaves]
        rank = options.rank or (sum(ranks) if row.rank == "sum" else max(ranks))
        a: Any = np.empty((*shape.stack, shape.d_in, rank), np.float32)
        b: Any = np.empty((*shape.stack, rank, shape.d_out), np.float32)
        scale: Any = np.ones(shape.stack, np.float32)
        squares, sizes = [], []
        for index in np.ndindex(shape.stack):
            name = matrix_name(path, index)
            terms = [factors_of(leaf, shape, index) for leaf in leaves]
            shares = [float(weight) for weight in resolved[path][(slice(None), *index)]]
            near, norm, error = _merge_matrix(terms, shares, row, options, rank, name, seed)
            a[index], b[index] = near
            squares.append((norm, norm * error))
            sizes.append([math.sqrt(max(0.0, inner(term, term))) for term in terms])
            if on_matrix:
                on_matrix(name)
        norm, rest = (math.hypot(*column) for column in zip(*squares, strict=True))
        report = KernelReport(
            norms=tuple(math.hypot(*column) for column in zip(*sizes, strict=True)),
            norm=norm,
            rank=rank,
            relative_error=rest / norm if norm else 0.0,
            absent=tuple(number for number, leaf in enumerate(leaves) if leaf is None),
        )
        yield path, LowRank(a=a, b=b, scale=scale), report


def matrix_name(path: str, index: tuple[int, ...]) -> str:
    """What one matrix is called, the same whether its layers are stacked or apart."""
    parts, rest = path.split("/"), index
    if trees.STACKED in parts and index:
        parts[parts.index(trees.STACKED)] = f"{trees.STACKED}_{index[0]}"
        rest = index[1:]
    return "/".join(parts) + "".join(f"[{i}]" for i in rest)


def _row(name: str, options: Options) -> Method:
    """The row of a method, with what the options put in its place."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}", "merge", f"use one of {', '.join(METHODS)}")
    if name == "concatenation" and options.rank is not None:
        raise UserError(
            f"rank {options.rank}",
            "method 'concatenation'",
            "leave the rank out, or use 'svd' to bring the sum to a rank",
        )
    row = METHODS[name]
    return dataclasses.replace(row, normalise=options.normalise or row.normalise)


def _check_weights(table: np.ndarray, row: Method, path: str) -> None:
    """Raises where a division by weights [A, *stack] would turn or lose the sign."""
    where = f"kernel '{path}'"
    if row.consensus == "slerp" and len(table) != 2:
        raise UserError(f"{len(table)} adapters", "method 'slerp'", "use two adapters")
    divided = row.normalise == "weights" or row.consensus == "slerp"
    if divided and (table.sum(axis=0) <= 0).any():
        raise UserError(
            f"weights add up to {float(table.sum(axis=0).min())}",
            where,
            "use weights with a sum above 0, or a method that does not divide by them",
        )
    if (row.consensus == "slerp" or (divided and row.consensus == "sign")) and (table < 0).any():
        raise UserError(
            f"weight {float(table.min())}", where, "use weights of 0 or more with this method"
        )


def _merge_matrix(
    terms: Sequence[Factors],
    weights: Sequence[float],
    row: Method,
    options: Options,
    rank: int,
    name: str,
    seed: int,
) -> tuple[Factors, float, float]:
    """Factors of one merged matrix, the norm of what they stand for, and their relative error."""

    def draw(number: int) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(name.encode()), number])

    def mix(matrices: list[np.ndarray]) -> np.ndarray:
        """The merged matrix, in the memory of the first."""
        for rows in row_blocks(matrices[0].shape):
            blocks = [matrix[rows] for matrix in matrices]
            if row.consensus == "sign":
                blocks[0][:] = consensus.elect(
                    blocks, weights, row.normalise, options.elect, options.votes
                )
            else:
                blocks[0][:] = consensus.weighted_sum(blocks, weights, row.normalise)
        return matrices[0]

    def dropped(matrix: np.ndarray, number: int) -> np.ndarray:
        assert row.sparsify is not None
        return sparsify(
            matrix,
            row.sparsify,
            options.density,
            draw(number),
            options.gamma,
            options.epsilon,
            options.rescale,
        )

    if row.space == "dense":
        merged = mix([dropped(term.a @ term.b, number) for number, term in enumerate(terms)])
        near, error = approximate(merged, rank, draw(len(terms)))
        return near, float(np.linalg.norm(merged)), error
    if row.space == "aligned":
        coordinates, basis = consensus.align(terms)
        product = Factors(mix([dropped(x, number) for number, x in enumerate(coordinates)]), basis)
    elif row.consensus == "slerp":
        product = add(terms, consensus.spherical(terms, weights, name))
    else:
        divisor = consensus.divisor(weights, row.normalise)
        product = add(terms, [weight / divisor for weight in weights])
    norm = math.sqrt(max(0.0, inner(product, product)))
    kept = product.a.shape[1] == rank
    near, error = (product, 0.0) if kept else refactor(product, rank)
    return near, norm, error
