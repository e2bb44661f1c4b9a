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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from ecomjax import trees
from ecomjax.adapters import consensus
from ecomjax.adapters.blocks import in_threads, one_core_each, row_blocks
from ecomjax.adapters.lowrank import (
    Factors,
    Shape,
    add,
    approximate,
    factors_of,
    inner,
    refactor,
    shapes_of,
)
from ecomjax.adapters.methods import DEFAULTS, Method, Options, row_of
from ecomjax.adapters.sparsify import sparsify
from ecomjax.adapters.weights import Weight, resolve
from ecomjax.errors import UserError
from ecomjax.typing import Adapter, LowRank


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
        UserError: see `plan` and `Plan.kernel`.
    """
    planned = plan(adapters, weights, method, options, seed)
    merged = {path: planned.kernel(path) for path in planned.shapes}
    adapter = trees.unflatten({path: leaf for path, (leaf, _) in merged.items()})
    return Merged(adapter, {path: report for path, (_, report) in merged.items()})


def overall_error(report: Mapping[str, KernelReport]) -> float:
    """|merged - result| / |merged| over all kernels together."""
    norm = math.hypot(*(kernel.norm for kernel in report.values()))
    rest = math.hypot(*(kernel.norm * kernel.relative_error for kernel in report.values()))
    return rest / norm if norm else 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """A merge that was checked, of which each kernel can be made on its own.

    Attributes:
        row: of the method, see `methods.METHODS`.
        options: what that row leaves open.
        seed: see `merge`.
        shapes: of the kernels by path.
        weights: [A, *stack] by path.
        leaves: {path: leaf} of each adapter.
    """

    row: Method
    options: Options
    seed: int
    shapes: Mapping[str, Shape]
    weights: Mapping[str, np.ndarray]
    leaves: Sequence[Mapping[str, LowRank]]

    def result(self, path: str) -> LowRank:
        """Shapes and dtypes of a merged kernel."""
        stack, d_in, d_out = self.shapes[path]
        ranks = [leaf[path].a.shape[-1] for leaf in self.leaves if path in leaf]
        rank = self.options.rank or (sum(ranks) if self.row.rank == "sum" else max(ranks))
        shapes = (*stack, d_in, rank), (*stack, rank, d_out), stack
        a, b, scale = (cast(Any, jax.ShapeDtypeStruct(shape, np.float32)) for shape in shapes)
        return LowRank(a=a, b=b, scale=scale)

    def kernel(
        self, path: str, on_matrix: Callable[[str], None] | None = None
    ) -> tuple[LowRank, KernelReport]:
        """Merges a kernel; `on_matrix` is told the name of each of its matrices that is done.

        Beside the adapters and the result it holds one matrix densely for each adapter and
        two more, and none where the method works on factors.

        Raises:
            UserError: "slerp" of a delta of zero.
        """
        shape, wanted = self.shapes[path], self.result(path)
        leaves = [leaf.get(path) for leaf in self.leaves]
        a: Any = np.empty(wanted.a.shape, np.float32)
        b: Any = np.empty(wanted.b.shape, np.float32)
        scale: Any = np.ones(shape.stack, np.float32)
        rank, squares, sizes = a.shape[-1], [], []

        def merge_one(index: tuple[int, ...]) -> tuple[Factors, float, float, list[float]]:
            terms = [factors_of(leaf, shape, index) for leaf in leaves]
            shares = [float(weight) for weight in self.weights[path][(slice(None), *index)]]
            name = matrix_name(path, index)
            merged = _merge_matrix(terms, shares, self.row, self.options, rank, name, self.seed)
            return *merged, [math.sqrt(max(0.0, inner(term, term))) for term in terms]

        # What is dense fills all cores with one matrix.
        threads, places = 1 if self.row.space == "dense" else None, list(np.ndindex(shape.stack))
        with one_core_each():
            for index, found in zip(places, in_threads(merge_one, places, threads), strict=True):
                (a[index], b[index]), norm, error, own = found
                squares.append((norm, norm * error))
                sizes.append(own)
                if on_matrix:
                    on_matrix(matrix_name(path, index))
        norm, rest = (math.hypot(*column) for column in zip(*squares, strict=True))
        report = KernelReport(
            norms=tuple(math.hypot(*column) for column in zip(*sizes, strict=True)),
            norm=norm,
            rank=rank,
            relative_error=rest / norm if norm else 0.0,
            absent=tuple(number for number, leaf in enumerate(leaves) if leaf is None),
        )
        return LowRank(a=a, b=b, scale=scale), report


def plan(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    method: str,
    options: Options = DEFAULTS,
    seed: int = 0,
) -> Plan:
    """What `merge` does, checked and not yet done.

    Raises:
        UserError: what `lowrank.shapes_of` and `weights.resolve` refuse; an unknown method; a
            rank for "concatenation"; "slerp" of other than two adapters that both have every
            kernel; weights that cannot be divided by.
    """
    row, shapes = row_of(method, options), shapes_of(adapters)
    resolved = resolve(weights, len(adapters), shapes)
    for path, own in resolved.items():
        _check_weights(own, row, path)
    leaves = [trees.flatten(adapter) for adapter in adapters]
    for path in shapes if row.consensus == "slerp" else ():
        absent = [number for number, own in enumerate(leaves) if path not in own]
        if absent:
            raise UserError(
                f"adapter {absent[0]} lacks kernel '{path}'",
                "method 'slerp'",
                "use adapters that both change every kernel, or another method",
            )
    return Plan(row, options, seed, shapes, resolved, leaves)


def matrix_name(path: str, index: tuple[int, ...]) -> str:
    """What one matrix is called, the same whether its layers are stacked or apart."""
    parts, rest = path.split("/"), index
    if trees.STACKED in parts and index:
        parts[parts.index(trees.STACKED)] = f"{trees.STACKED}_{index[0]}"
        rest = index[1:]
    return "/".join(parts) + "".join(f"[{i}]" for i in rest)


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

    if row.space == "dense":
        merged = _mix(lambda i: terms[i].a @ terms[i].b, weights, row, options, draw)
        near, error = approximate(merged, rank, draw(len(terms)))
        return near, float(np.linalg.norm(merged)), error
    if row.space == "aligned":
        coordinates, basis = consensus.align(terms)
        product = Factors(_mix(coordinates.__getitem__, weights, row, options, draw), basis)
    elif row.consensus == "slerp":
        product = add(terms, consensus.spherical(terms, weights, name))
    else:
        divisor = consensus.divisor(weights, row.normalise)
        product = add(terms, [weight / divisor for weight in weights])
    norm = math.sqrt(max(0.0, inner(product, product)))
    kept = product.a.shape[1] == rank
    near, error = (product, 0.0) if kept else refactor(product, rank)
    return near, norm, error


def _mix(
    matrix: Callable[[int], np.ndarray],
    weights: Sequence[float],
    row: Method,
    options: Options,
    draw: Callable[[int], np.random.Generator],
) -> np.ndarray:
    """Drops entries of matrices and puts the rest together, all in their own memory.

    Args:
        matrix: the matrix of the adapter of a number.
        weights, row, options: see `_merge_matrix`.
        draw: the generator of a number.
    """

    def drop(number: int) -> np.ndarray:
        assert row.sparsify is not None
        return sparsify(
            matrix(number),
            row.sparsify,
            options.density,
            draw(number),
            options.gamma,
            options.epsilon,
            options.rescale,
        )

    dropped = list(in_threads(drop, range(len(weights))))

    def mix(rows: slice) -> None:
        blocks = [one[rows] for one in dropped]
        if row.consensus == "sign":
            blocks[0][:] = consensus.elect(
                blocks, weights, row.normalise, options.elect, options.votes
            )
        else:
            blocks[0][:] = consensus.weighted_sum(blocks, weights, row.normalise)

    list(in_threads(mix, row_blocks(dropped[0].shape)))
    return dropped[0]
