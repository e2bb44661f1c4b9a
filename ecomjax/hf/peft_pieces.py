"""Leaves of ours cut into what PEFT holds one by one, and put together again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ecomjax.errors import UserError
from ecomjax.hf.peft_targets import Target, tensor_names, tensor_shapes, to_tensors
from ecomjax.hf.rules import FLOATS
from ecomjax.typing import DoRA, LowRank


class Piece(NamedTuple):
    """What a target holds in one place of its stack."""

    a: np.ndarray
    """[d_in, R], of experts [E, d_in, R]"""
    b: np.ndarray
    """[R, d_out], of experts [E, R, d_out]"""
    scale: float
    magnitude: np.ndarray | None = None
    """[d_out], of DoRA"""

    @property
    def rank(self) -> int:
        return self.a.shape[-1]


def cut(
    target: Target,
    index: tuple[int, ...],
    leaves: Mapping[str, LowRank | DoRA],
    where: str,
) -> list[Piece | None]:
    """What each part of a target has in one place of its stack, at its true rank.

    Raises:
        UserError: experts of one layer, or parts of one target, that differ in what PEFT has
            once for all of them.
    """
    pieces: list[Piece | None] = []
    for part in target.parts:
        leaf: Any = leaves.get(part.path)
        if leaf is None:
            pieces.append(None)
            continue
        a, b = leaf.a[index], leaf.b[index]
        rank = rank_in(leaf, index, part.path, where)
        scale = float(_one(leaf.scale[index], "scale", part.path, where))
        if not 1 <= rank <= a.shape[-1] or a[..., rank:].any() or b[..., rank:, :].any():
            raise UserError(
                f"'{part.path}' is of rank {rank} in factors of {a.shape[-1]}",
                where,
                "pad factors with zeros beyond a rank of 1 or more",
            )
        magnitude: Any = leaf.magnitude[index] if isinstance(leaf, DoRA) else None
        pieces.append(Piece(a[..., :rank], b[..., :rank, :], scale, magnitude))
    scales = {piece.scale for piece in pieces if piece is not None}
    if len(scales) > 1:
        paths = " and ".join(f"'{part.path}'" for part in target.parts)
        raise UserError(
            f"{paths} differ in scale",
            where,
            "use one rank and alpha for both: to PEFT they are one parameter",
        )
    return pieces


def rank_in(leaf: LowRank | DoRA, index: tuple[int, ...], path: str, where: str) -> int:
    """The true rank in one place of the stack, that of all experts there."""
    ranks = leaf.a.shape[-1] if leaf.ranks is None else np.asarray(leaf.ranks)[index]
    return int(_one(ranks, "rank", path, where))


def _one(values: Any, what: str, path: str, where: str) -> Any:
    """The value that all experts have."""
    found = np.unique(values)
    if len(found) > 1:
        raise UserError(
            f"experts of one layer of '{path}' differ in {what}",
            where,
            "use one rank and alpha for all experts of a layer, as PEFT does",
        )
    return found[0]


def join(target: Target, pieces: Sequence[Piece | None]) -> Piece:
    """What a target holds, from what each of its parts has, if that is adapted.

    For outputs [y_1, y_2] of one input it is a = [a_1, a_2] with b block-diagonal, whose rank
    is the sum of those of the parts.
    """
    held = [piece for piece in pieces if piece is not None]
    if len(pieces) == 1:
        return held[0]
    a = np.concatenate([piece.a for piece in held], axis=-1)
    b = np.zeros((*a.shape[:-2], a.shape[-1], target.d_out), held[0].b.dtype)
    row = column = 0
    for part, piece in zip(target.parts, pieces, strict=True):
        if piece is not None:
            b[..., row : row + piece.rank, column : column + part.d_out] = piece.b
            row += piece.rank
        column += part.d_out
    return Piece(a, b, held[0].scale)


def split(target: Target, piece: Piece, ranks: Sequence[int] | None) -> list[Piece]:
    """The inverse of `join`, for the ranks of the parts; that of one that is not adapted is 0.

    What is not so joined, as when PEFT trained it, is read as a with those columns of b that
    are of the part, for each part at the whole rank. The deltas are the same.
    """
    if len(target.parts) == 1:
        return [piece]
    columns = _slices([part.d_out for part in target.parts])
    if ranks is not None and sum(ranks) == piece.rank:
        rows = _slices(ranks)
        between = piece.b.copy()
        for row, column in zip(rows, columns, strict=True):
            between[..., row, column] = 0
        if not between.any():
            return [
                piece._replace(a=piece.a[..., row], b=piece.b[..., row, column])
                for row, column in zip(rows, columns, strict=True)
            ]
    return [piece._replace(b=piece.b[..., column]) for column in columns]


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = itertools.accumulate(sizes, initial=0)
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def stack(
    pieces: Mapping[tuple[int, ...], Piece], sizes: tuple[int, ...], dropout: float
) -> LowRank | DoRA:
    """A leaf from its pieces by their places; where ranks differ, padded to the largest."""
    first = next(iter(pieces.values()))
    rank = max(piece.rank for piece in pieces.values())
    whole = (*sizes, *first.a.shape[:-2])
    a: Any = np.zeros((*whole, first.a.shape[-2], rank), first.a.dtype)
    b: Any = np.zeros((*whole, rank, first.b.shape[-1]), first.b.dtype)
    scale: Any = np.empty(whole, np.float32)
    ranks: Any = np.empty(whole, np.int32)
    for index, piece in pieces.items():
        a[index][..., : piece.rank] = piece.a
        b[index][..., : piece.rank, :] = piece.b
        scale[index], ranks[index] = piece.scale, piece.rank
    given: Any = {"dropout": dropout, "ranks": None if (ranks == rank).all() else ranks}
    if first.magnitude is None:
        return LowRank(a, b, scale, **given)
    magnitude: Any = np.empty((*whole, first.b.shape[-1]), first.magnitude.dtype)
    for index, piece in pieces.items():
        magnitude[index] = piece.magnitude
    return DoRA(a, b, scale, magnitude, **given)


def in_common(leaves: Mapping[str, LowRank | DoRA], where: str) -> tuple[float, bool]:
    """What all leaves have in common: the dropout, and whether they are DoRA."""
    dropouts = {leaf.dropout for leaf in leaves.values()}
    if len(dropouts) != 1:
        raise UserError(
            f"adapter has the dropout rates {sorted(dropouts)}",
            where,
            "use one rate for all kernels, as PEFT does",
        )
    by_kind = {isinstance(leaf, DoRA): path for path, leaf in leaves.items()}
    if len(by_kind) != 1:
        raise UserError(
            f"'{by_kind[True]}' has DoRA and '{by_kind[False]}' plain LoRA",
            where,
            "use one of them for all kernels, as PEFT does",
        )
    return dropouts.pop(), True in by_kind


def shapes_of(
    target: Target,
    start: str,
    index: tuple[int, ...],
    expected: Mapping[str, LowRank | DoRA],
    where: str,
) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: shape and dtype} of the tensors of a target in one place of its stack."""
    own = {part.path: expected[part.path] for part in target.parts if part.path in expected}
    rank = sum(rank_in(leaf, index, path, where) for path, leaf in own.items())
    first = next(iter(own.values()))
    arrays = (first.a, first.b, getattr(first, "magnitude", None))
    return {
        name: jax.ShapeDtypeStruct(shape, array.dtype)
        for name, shape, array in zip(
            tensor_names(target, start), tensor_shapes(target, rank), arrays, strict=True
        )
        if array is not None
    }


def tensors_of(target: Target, start: str, piece: Piece, where: str) -> dict[str, np.ndarray]:
    """{name: tensor} of a piece."""
    arrays = (*to_tensors(target, piece.a, piece.b), piece.magnitude)
    shapes, found = tensor_shapes(target, piece.rank), {}
    for name, shape, array in zip(tensor_names(target, start), shapes, arrays, strict=True):
        if array is not None:
            check_tensor(array, name, shape, where)
            found[name] = np.ascontiguousarray(array)
    return found


def check_tensor(tensor: np.ndarray, name: str, shape: tuple[int, ...], where: str) -> None:
    """UserError unless the tensor has the shape and holds finite floats."""
    if tensor.shape != shape:
        raise UserError(
            f"tensor {name!r} has shape {list(tensor.shape)}, config and base say {list(shape)}",
            where,
            "correct the ranks in the config, or use the adapter's own base",
        )
    if tensor.dtype not in FLOATS:
        raise UserError(f"tensor {name!r} has dtype {tensor.dtype}", where, "save it as float32")
    if not np.isfinite(tensor).all():
        raise UserError(f"tensor {name!r} holds NaN or infinity", where, "train it again")
