"""What a task is: data plus pure functions from rows to prompts and from outputs to scores."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from ecomjax.data.sources import Row, Source
from ecomjax.errors import UserError


@dataclass(frozen=True)
class Example:
    """One thing to be answered.

    Attributes:
        id: unique within its split.
        inputs: what the prompt is made of.
        target: the true answer, of the type that `Task.parse` returns.
    """

    id: str
    inputs: Mapping[str, Any]
    target: Any


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, before it is put into one text.

    Attributes:
        system: persona and instruction, equal for all examples of a task.
        turns: demonstrations, as (user text, answer text).
        user: the example's own input and nothing else, so that everything before it is a
            prefix shared by examples with the same demonstrations.
    """

    system: str
    turns: tuple[tuple[str, str], ...]
    user: str


@dataclass(frozen=True)
class Invalid:
    """An output that could not be read as an answer. It counts as wrong.

    Attributes:
        text: the output.
        reason: why it could not be read.
    """

    text: str
    reason: str


class Task(ABC):
    """A task. Predictions are of the type of `Example.target`, or `Invalid`.

    Attributes:
        name: the name of the task in the registry, data folders and reports.
        headline: key of its main metric; larger is better.
        labels: the closed set of answers, for scoring by likelihood; None if open.
        system: persona and instruction, see `Prompt`.
    """

    name: str
    headline: str
    labels: tuple[str, ...] | None = None
    system: str

    @abstractmethod
    def example(self, row: Row) -> Example:
        """The example in a row; UserError with row, column and value if there is none."""

    @abstractmethod
    def user(self, example: Example) -> str:
        """The example's input as the user's message."""

    @abstractmethod
    def answer(self, example: Example) -> str:
        """The target as the text a model should write."""

    @abstractmethod
    def parse(self, text: str, example: Example) -> Any:
        """The prediction in a model's output; never raises, but returns `Invalid`."""

    @abstractmethod
    def statistics(
        self, predictions: Sequence[Any], examples: Sequence[Example]
    ) -> Float[np.ndarray, "n S"]:
        """Additive sufficient statistics, a row for each example."""

    @abstractmethod
    def summarize(self, totals: Float[np.ndarray, "*r S"]) -> dict[str, np.ndarray]:
        """Metrics [*r] of summed statistics, with any leading axes."""

    def examples(self, rows: Iterable[Row]) -> list[Example]:
        """The examples of all rows; UserError where one is bad or an id is given twice."""
        found: dict[str, Example] = {}
        for row in rows:
            example = self.example(row)
            if example.id in found:
                if row.values["example_id"] is not None:
                    raise UserError(
                        f"example_id '{example.id}' comes twice", row.where, "make the ids unique"
                    )
                # A row of the same content as an earlier one: told apart by its place.
                example = replace(example, id=f"{example.id}-{row.where.rpartition(':')[2]}")
            found[example.id] = example
        return list(found.values())

    def load(self, source: Source, split: str) -> list[Example]:
        """The examples of a split."""
        return self.examples(source.rows(self.name, split))

    def prompt(self, example: Example, demonstrations: Sequence[Example] = ()) -> Prompt:
        """The prompt for an example after the given demonstrations, in their order."""
        turns = tuple((self.user(shown), self.answer(shown)) for shown in demonstrations)
        return Prompt(self.system, turns, self.user(example))

    def metrics(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """Metrics of predictions, one for each example."""
        totals = self.statistics(predictions, examples).sum(0)
        return {name: float(value) for name, value in self.summarize(totals).items()}


def overlap(task: Task, examples: Iterable[Example], others: Iterable[Example]) -> int:
    """How many of the examples have the same input text as one of the others."""
    texts = {task.user(other) for other in others}
    return sum(task.user(example) in texts for example in examples)


def column(row: Row, name: str, kinds: type | tuple[type, ...], null: bool = False) -> Any:
    """The value in a column of a row.

    Args:
        row: the row.
        name: the column.
        kinds: the types its value may have.
        null: whether it may be null.

    Raises:
        UserError: the column is missing, null or of another type.
    """
    if name not in row.values:
        present = ", ".join(sorted(row.values)) or "none"
        raise UserError(f"missing column '{name}'", row.where, f"columns present: {present}")
    value = row.values[name]
    if value is None and null:
        return None
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise bad_value(row, name, f"must be of type {wanted}")
    return value


def bad_value(row: Row, name: str, remedy: str) -> UserError:
    """The error of a column whose value is wrong."""
    shown = json.dumps(row.values[name], ensure_ascii=False, default=str)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return UserError(f"bad value {shown} in column '{name}'", row.where, f"it {remedy}")


def identity(row: Row) -> str:
    """The row's example_id, or where that is null a digest of its content."""
    given = column(row, "example_id", (int, str), null=True)
    if given is not None:
        return str(given)
    content = json.dumps(row.values, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
