"""What a row is, what hands rows out, and rows that are read only when asked for."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
from jaxtyping import Int

from ecomjax.errors import UserError

SPLITS = ("train", "validation", "test")

STAND_INS = {"description_generation": "esci"}
"""Whose rows are read where a data set is not there: products are described in esci too."""

LONGEST_ROW = 2**24
"""Bytes of the longest row that is read: 1e6 characters of any script, escaped, are fewer."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        values: column name to value.
        where: where the row stands, e.g. `data/esci/train.jsonl:12`.
    """

    values: Mapping[str, Any]
    where: str


@runtime_checkable
class Rows(Protocol):
    """A sequence of rows. A check of types may ask for its length, never for a row."""

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int, /) -> Row: ...
    @overload
    def __getitem__(self, index: slice, /) -> Sequence[Row]: ...
    def __iter__(self) -> Iterator[Row]: ...


@runtime_checkable
class Source(Protocol):
    """A place that holds the rows of data sets.

    Rows are a sequence that reads a row when it is asked for. A row that cannot be read
    raises `UserError` when it is indexed, and no other row is the worse for it: who wants to
    leave bad rows out walks `range(len(rows))` and catches. (A `for row in rows` ends with
    the first error.)

    Attributes:
        name: short name for reports.
    """

    name: str

    def rows(self, name: str, split: str) -> Rows:
        """All rows of one of `SPLITS`, in a fixed order; UserError if there are none.

        `name` is that of the data, such as `Task.data`; it may hold a slash.
        """
        ...

    def fingerprint(self, name: str, split: str) -> str:
        """sha256 (hex) of the content of a split."""
        ...


class LazyRows(Sequence):
    """Rows of which each is made by `row`; they are indexed, sliced and walked as a list is."""

    @abstractmethod
    def row(self, index: int) -> Row:
        """Row `index`, from 0 to the length; UserError where it cannot be read."""

    def encoded(self, column: str) -> tuple[Int[np.ndarray, "n"], list[bytes]] | None:
        """The texts or numbers of a column as indices [n] into a list of the different ones.

        None where there is no such column, or no quicker way to it than reading the rows.
        """
        del column

    @overload
    def __getitem__(self, index: int, /) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.row(place) for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.row(int(index) % len(self))


class ChosenRows(LazyRows):
    """The rows at some places of others.

    Args:
        rows: the others.
        places: indices into them, in the order to be handed out.
    """

    def __init__(self, rows: Rows, places: Int[np.ndarray, "n"]):
        self._rows, self._places = rows, places

    def __len__(self) -> int:
        return len(self._places)

    def row(self, index: int) -> Row:
        return self._rows[int(self._places[index])]


def digest(rows: Iterable[Row]) -> str:
    """sha256 (hex) of the values of rows, as JSON lines."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row.values, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()


def check_split(split: str, known: Iterable[str], where: str) -> None:
    """UserError where a split is none of those known."""
    if split not in known:
        raise UserError(f"unknown split '{split}'", where, f"known: {listed(known)}")


def listed(names: Iterable[str]) -> str:
    """Names in one line, for the remedy of an error."""
    return ", ".join(sorted(set(names)))
