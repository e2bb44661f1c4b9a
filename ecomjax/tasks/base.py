"""What a task is: data plus pure functions from rows to prompts and from outputs to scores."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from ecomjax.data.forms import Form, one_of
from ecomjax.data.sources import Row, Rows, Source
from ecomjax.errors import UserError

OnBadRow = Literal["raise", "drop"]


@dataclass(frozen=True)
class Example:
    """One thing to be answered.

    Attributes:
        id: unique within its split.
        inputs: what the prompt is made of.
        target: the true answer, of the type that `Task.parse` returns; for answers in free
            text all references (`tuple[str, ...]`), of which the first is trained on.
        group: what it is ranked together with, such as its query; "" for nothing.
        repaired: whether its row was mended by a rule of the task.
    """

    id: str
    inputs: Mapping[str, Any]
    target: Any
    group: str = ""
    repaired: bool = False


@dataclass(frozen=True)
class Skipped:
    """A row that the task's own filter leaves out; no mistake, but counted.

    Attributes:
        reason: why, in words that rows left out for the same reason share.
    """

    reason: str


@dataclass
class Reading:
    """What became of the rows of a reading; nothing is left out without being counted.

    Attributes:
        kept: rows that gave an example.
        repaired: how many of these were mended by a rule of the task.
        skipped: rows that the task's filter left out, by reason.
        bad: rows with a mistake, by its kind.
        first_bad: the first mistake in full.
    """

    kept: int = 0
    repaired: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""

    def __str__(self) -> str:
        parts = [f"{self.kept} examples"]
        if self.repaired:
            parts.append(f"{self.repaired} of them repaired")
        for what, counts in (("skipped", self.skipped), ("bad", self.bad)):
            if counts:
                reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
                parts.append(f"{counts.total()} rows {what} ({reasons})")
        return "; ".join([*parts, *([f"first: {self.first_bad}"] if self.first_bad else [])])


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
    """A task. Predictions are of the type of `Example.target`, or `Invalid`; of answers in
    free text, whose target is all references, they are texts.

    What it asks is defined once, by `user` and `answer`, and rendered for every kind of
    model: `prompt` for decoders, `source` for encoder-decoders, `pair` and `words` for
    encoders. The last two are None where a task is no such classification.

    Attributes:
        name: the name of the task in the registry and reports.
        headline: key of its main metric; larger is better.
        labels: the closed set of answers, for scoring by likelihood and for classifiers;
            None if open.
        tags: the closed set of tags of `words`; None if it has none.
        gains: gain of each label where examples of a group are ranked (nDCG).
        system: persona and instruction, see `Prompt`.
        prefix: what an encoder-decoder reads before the input.
        data: the name its rows are read under; `name` unless a task says otherwise.
        once: an input that only the first example of a reading may have; "" for none.
    """

    name: str
    headline: str
    labels: tuple[str, ...] | None = None
    tags: tuple[str, ...] | None = None
    gains: Mapping[str, float] | None = None
    system: str
    prefix: str = ""
    data: str
    once: str = ""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "name" in vars(cls) and "data" not in vars(cls):
            cls.data = cls.name

    @abstractmethod
    def example(self, row: Row) -> Example | Skipped:
        """The example in a row; UserError with row, column and value if it is bad."""

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

    def source(self, example: Example) -> str:
        """What an encoder-decoder reads; it writes `answer`."""
        return self.prefix + self.user(example)

    def pair(self, example: Example) -> tuple[str, str] | None:
        """The two texts that an encoder classifies into `labels`; the second may be empty."""
        del example
        return None

    def words(self, example: Example) -> tuple[str, ...] | None:
        """The words that an encoder gives `tags`; the target is their tags."""
        del example
        return None

    @property
    def has_form(self) -> bool:
        """Whether `form` says what answers an example allows."""
        return self.labels is not None or type(self).form is not Task.form

    def form(self, example: Example) -> Form | None:
        """The answers that an example allows: one of the labels; None where answers are open."""
        del example
        return one_of(self.labels) if self.labels is not None else None

    def prompt(self, example: Example, demonstrations: Sequence[Example] = ()) -> Prompt:
        """What a decoder is asked, after the given demonstrations in their order."""
        turns = tuple((self.user(shown), self.answer(shown)) for shown in demonstrations)
        return Prompt(self.system, turns, self.user(example))

    def content_free(
        self, example: Example, text: str, demonstrations: Sequence[Example] = ()
    ) -> Prompt:
        """`prompt` with `text` in place of each text of the example's own inputs.

        What frames them stays. Texts that say nothing show which answers a prompt favours by
        itself (Zhao et al. 2021, arXiv 2102.09690).

        Raises:
            UserError: the example has nothing but its instruction.
        """
        inputs = {
            name: text if isinstance(value, str) else value
            for name, value in example.inputs.items()
        }
        return self.prompt(replace(example, inputs=inputs), demonstrations)

    def read(
        self,
        rows: Rows,
        report: Reading,
        on_bad_row: OnBadRow = "raise",
        on_row: Callable[[int], None] = lambda count: None,
    ) -> Iterator[Example]:
        """The examples of rows, one after the other.

        Rows of equal content and without an id of their own are told apart by their place.
        Held in memory are 64 bits of every id, and of every `once` input.

        Args:
            rows: of one split.
            report: counts what becomes of them.
            on_bad_row: "raise", or "drop" to leave bad rows out; they are counted.
            on_row: called with 1 before each row, for progress.

        Raises:
            UserError: a row is bad, or an id is given twice.
        """
        ids: set[int] = set()
        values: set[int] = set()
        for place in range(len(rows)):
            on_row(1)
            try:
                # Not every row can be read, and an iterator would end at one that cannot.
                row = rows[place]
                example = self.example(row)
                if isinstance(example, Example):
                    example = _told_apart(example, row, ids)
            except UserError as error:
                report.bad[_kind(error)] += 1
                report.first_bad = report.first_bad or str(error)
                if on_bad_row == "raise":
                    raise
                continue
            if isinstance(example, Example) and self.once:
                number = _number(str(example.inputs[self.once]))
                if number in values:
                    example = Skipped(f"{self.once} seen before")
                values.add(number)
            if isinstance(example, Skipped):
                report.skipped[example.reason] += 1
                continue
            report.kept += 1
            report.repaired += example.repaired
            yield example

    def examples(
        self,
        rows: Rows,
        on_bad_row: OnBadRow = "raise",
        report: Reading | None = None,
    ) -> list[Example]:
        """The examples of all rows, see `read`."""
        return list(self.read(rows, Reading() if report is None else report, on_bad_row))

    def load(
        self,
        source: Source,
        split: str,
        on_bad_row: OnBadRow = "raise",
        report: Reading | None = None,
    ) -> list[Example]:
        """The examples of a split, see `read`; UserError where no row gives one."""
        report = Reading() if report is None else report
        examples = self.examples(source.rows(self.data, split), on_bad_row, report)
        if not examples:
            where = f"{source.name} source, {self.data} {split}"
            raise UserError("no row gives an example", where, str(report))
        return examples

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


def identity(row: Row, *others: str) -> str:
    """The row's example_id, else the first of the other columns given, else a digest of it."""
    for name in ("example_id", *others):
        if row.values.get(name) is not None:
            return str(column(row, name, (int, str)))
    return _digest(row)


def group(row: Row, name: str) -> str:
    """What a row is ranked together with, by a column that it need not have."""
    return "" if row.values.get(name) is None else str(column(row, name, (int, str)))


def _digest(row: Row) -> str:
    content = json.dumps(row.values, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _number(text: str) -> int:
    """64 bits of a text; two of ten million are alike with a chance of 1 in 370,000."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def _told_apart(example: Example, row: Row, ids: set[int]) -> Example:
    """The example with an id that is not among `ids`; it is put there."""
    number = _number(example.id)
    if number in ids:
        if example.id != _digest(row):
            raise UserError(
                f"example_id '{example.id}' comes twice", row.where, "make the ids unique"
            )
        example = replace(example, id=f"{example.id}-{row.where.rpartition(':')[2]}")
        number = _number(example.id)
    ids.add(number)
    return example


_VALUES = re.compile(r"(?<=bad value ).*(?= in column)|(?<=example_id) '.*'| \(.*\)", re.DOTALL)


def _kind(error: UserError) -> str:
    """What is wrong, without the value that is."""
    return _VALUES.sub("", error.what).replace("value  in", "value in")
