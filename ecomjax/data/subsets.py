"""Parts of a split: seeded draws of some size, and what is held out where there is no validation.

Both are pure functions of what they are given, equal in every process and on every host.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Collection
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from ecomjax.data.rows import ChosenRows, LazyRows, Row, Rows
from ecomjax.errors import UserError

HELD_OUT = 10
"""One in so many rows of train is validation where there is no such split."""

HELD_OUT_LARGE = 1000
"""The same where values are kept whole and rows are many: the authors held out 0.1 %."""

LARGE = 100_000
"""Rows from which they are many."""

KEPT_WHOLE = {"esci": "query", "description_generation": "product_id"}
"""Column of which a value is held out in all of its rows or in none."""


def draw(n: int, size: int, seed: int, nested: bool = False) -> Int[np.ndarray, "m"]:
    """Which of n rows are drawn, without replacement: their indices in increasing order.

    Args:
        n: number of rows.
        size: number to draw; 0, or more than there are, draws all.
        seed: another seed is another draw.
        nested: whether a smaller draw of the same seed is part of each larger one. Otherwise
            draws of different sizes have nothing to do with each other.
    """
    if not 0 < size < n:
        return np.arange(n)
    if nested:
        rng = random.Random(f"{seed}/nested")
        order = np.argsort([rng.random() for _ in range(n)], kind="stable")
        return np.sort(order[:size])
    return np.sort(random.Random(f"{seed}/{size}").sample(range(n), size))


def held_out(rows: Rows, column: str | None = None) -> Bool[np.ndarray, "n"]:
    """Which rows of train are validation, chosen by a hash of their content.

    Equal rows go together, and rows that cannot be read stay in train, whose reader counts
    them.

    Args:
        rows: all rows of train.
        column: the column to hash in place of the whole row, see `KEPT_WHOLE`.
    """
    one_in = HELD_OUT_LARGE if column and len(rows) >= LARGE else HELD_OUT
    found = rows.encoded(column) if column and isinstance(rows, LazyRows) else None
    if found is not None:
        codes, values = found
        return np.array([_falls_out(value, one_in) for value in values], bool)[codes]
    held = np.zeros(len(rows), bool)
    for place in range(len(rows)):
        with contextlib.suppress(UserError):
            held[place] = _falls_out(_key(rows[place], column), one_in)
    return held


def _key(row: Row, column: str | None) -> bytes:
    if column and (value := row.values.get(column)) is not None:
        return str(value).encode("utf-8", "replace")
    return json.dumps(row.values, sort_keys=True, default=str).encode()


def _falls_out(key: bytes, one_in: int) -> bool:
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % one_in == 0


@runtime_checkable
class DataSet(Protocol):
    """The splits of one data set, each read when asked for."""

    @property
    def splits(self) -> Collection[str]: ...

    def rows(self, split: str) -> Rows: ...

    def digest(self, split: str) -> str: ...


def rows(data: DataSet, name: str, split: str) -> Rows:
    """The rows of a split; where there is no validation, the rest or the held out part of train.

    Raises:
        UserError: too few rows to hold one out, and those of `data`.
    """
    if not _is_part(data, split):
        return data.rows(split)
    train = data.rows("train")
    held = held_out(train, KEPT_WHOLE.get(name))
    places = np.flatnonzero(held == (split == "validation"))
    if not len(places):
        raise UserError(
            f"no row of train is held out for {split}"
            if split == "validation"
            else "all rows of train are held out for validation",
            f"{name}: {len(train)} rows",
            "give a validation split, or more rows",
        )
    return ChosenRows(train, places)


def digest(data: DataSet, name: str, split: str) -> str:
    """sha256 (hex) of what `rows` depends on."""
    if not _is_part(data, split):
        return data.digest(split)
    rule = [name, split, HELD_OUT, HELD_OUT_LARGE, LARGE, KEPT_WHOLE.get(name)]
    return hashlib.sha256(json.dumps([data.digest("train"), *rule]).encode()).hexdigest()


def _is_part(data: DataSet, split: str) -> bool:
    missing = "train" in data.splits and "validation" not in data.splits
    return missing and split in ("train", "validation")
