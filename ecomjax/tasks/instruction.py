"""Instructions: any rows of instruction, input and output, such as those of ECInstruct."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ecomjax.data.sources import Row
from ecomjax.errors import UserError
from ecomjax.metrics import classification, ner, text
from ecomjax.metrics.ratios import f1, ratio
from ecomjax.tasks import prompts
from ecomjax.tasks.base import Example, Invalid, Prompt, Task, bad_value, column, identity
from ecomjax.tasks.queryner import read_tuples

SCORES = ("label", "rouge", "ner")


class Instruction(Task):
    """Rows of `instruction`, `input` and `output`, each with an instruction of its own.

    The instruction is the system text of its example's prompt; where the input is blank it
    is the user's message, after the persona. A demonstration with another instruction than
    the example states it before its input.

    Args:
        data: the folder of the rows, as `ecinstruct/product_matching`; its last part is the
            name of the task.
        score: how outputs are scored. "label": one of a closed set, as in classification;
            "rouge": free text; "ner": entities, in the form of the row's own output, which
            is `(token, TAG)` tuples of BIO tags, as of `queryner`, or ECInstruct's JSON
            list of objects with attribute, value and source. These count where all three
            are equal, entities of tuples where type and place are.
        labels: the answers of "label", in the order of reports.
    """

    name = "instruction"
    system = prompts.PERSONA

    def __init__(self, data: str = "instruction", score: str = "rouge", labels: Sequence[Any] = ()):
        where = "task instruction"
        if not all(re.fullmatch(r"\w[\w.-]*", part) for part in data.split("/")):
            raise UserError(f"bad data name {data!r}", where, "name a folder as a/b")
        if score not in SCORES:
            known = ", ".join(SCORES)
            raise UserError(f"unknown score '{score}'", where, f"known: {known}")
        if (score == "label") != bool(labels):
            raise UserError(
                f"{len(labels)} labels for the score {score}", where, "give labels for label alone"
            )
        self.data, self.name = data, data.rpartition("/")[2]
        kinds: dict[str, _Answers] = {"rouge": _Texts(), "ner": _Entities()}
        self._answers = _Labels(tuple(labels)) if labels else kinds[score]
        self.headline = self._answers.headline
        self.labels = tuple(labels) or None

    def example(self, row: Row) -> Example:
        instruction, output = (column(row, name, str) for name in ("instruction", "output"))
        for name, given in (("instruction", instruction), ("output", output)):
            if not given.strip():
                raise bad_value(row, name, "must not be blank")
        given = column(row, "input", str, null=True) or ""
        target = self._answers.target(output.strip())
        if target is None:
            raise bad_value(row, "output", self._answers.wanted)
        inputs = {"instruction": instruction.strip(), "input": given.strip()}
        return Example(identity(row), inputs, target)

    def user(self, example: Example) -> str:
        return example.inputs["input"] or example.inputs["instruction"]

    def source(self, example: Example) -> str:
        return "\n".join(part for part in self._parts(example) if part)

    def pair(self, example: Example) -> tuple[str, str] | None:
        """Instruction and input, where answers are labels."""
        return self._parts(example) if self.labels else None

    def prompt(self, example: Example, demonstrations: Sequence[Example] = ()) -> Prompt:
        instruction, given = self._parts(example)
        turns = tuple(
            (
                self.user(shown) if self._parts(shown)[0] == instruction else self.source(shown),
                self.answer(shown),
            )
            for shown in demonstrations
        )
        return Prompt(instruction if given else self.system, turns, self.user(example))

    def content_free(
        self, example: Example, text: str, demonstrations: Sequence[Example] = ()
    ) -> Prompt:
        """The instruction stays; where it is all that there is, nothing could take its place."""
        if not example.inputs["input"]:
            raise UserError(
                "an instruction without input cannot be asked without its content",
                f"{self.name}, example {example.id}",
                "set label_score=sum or mean, or leave out the rows whose input is blank",
            )
        return replace(self.prompt(example, demonstrations), user=text)

    def answer(self, example: Example) -> str:
        return self._answers.text(example.target)

    def parse(self, text: str, example: Example) -> Any:
        return self._answers.parse(text, example)

    def statistics(self, predictions: Sequence[Any], examples: Sequence[Example]) -> np.ndarray:
        guesses = [None if isinstance(guess, Invalid) else guess for guess in predictions]
        targets = [example.target for example in examples]
        return self._answers.statistics(targets, guesses, [self.user(e) for e in examples])

    def summarize(self, totals: np.ndarray) -> dict[str, np.ndarray]:
        return self._answers.summarize(totals)

    def _parts(self, example: Example) -> tuple[str, str]:
        return example.inputs["instruction"], example.inputs["input"]


class _Answers(ABC):
    """A kind of answers: how they are read and scored."""

    headline: str
    wanted: str
    """What an output must be, for the remedy of an error."""

    @abstractmethod
    def target(self, output: str) -> Any:
        """The target in a row's output, None if there is none."""

    def text(self, target: Any) -> str:
        """The text of a target."""
        return target

    @abstractmethod
    def parse(self, text: str, example: Example) -> Any:
        """See `Task.parse`."""

    @abstractmethod
    def statistics(
        self, targets: Sequence[Any], guesses: Sequence[Any], sources: Sequence[str]
    ) -> np.ndarray:
        """Rows [n, S]; a guess is None where it is invalid."""

    @abstractmethod
    def summarize(self, totals: np.ndarray) -> dict[str, np.ndarray]:
        """See `Task.summarize`."""


class _Texts(_Answers):
    """Free text, of which a row has one reference."""

    headline = "rougeL"

    def target(self, output: str) -> tuple[str, ...]:
        return (output,)

    def text(self, target: tuple[str, ...]) -> str:
        return target[0]

    def parse(self, text: str, example: Example) -> str | Invalid:
        del example
        return text.strip() or Invalid(text, "no text")

    def statistics(self, targets, guesses, sources):
        return text.statistics(targets, guesses, sources)

    def summarize(self, totals):
        return text.summarize(totals)


class _Labels(_Answers):
    """One of a closed set."""

    headline = "macro_f1"

    def __init__(self, labels: tuple[Any, ...]):
        self.labels = labels
        texts = all(isinstance(label, str) and label.strip() for label in labels)
        if not texts or len(set(labels)) < len(labels):
            remedy = "give texts, none blank, none twice"
            raise UserError(f"bad labels {labels}", "task instruction", remedy)
        self.wanted = f"must be one of {', '.join(labels)}"
        # The longest first: one label may begin another.
        self.ordered = sorted(labels, key=len, reverse=True)
        choice = "|".join(f"({re.escape(label)})" for label in self.ordered)
        self.pattern = re.compile(rf"\W*?(?:{choice})[^\S\n]*(?:\Z|\n|[^\w\s])", re.IGNORECASE)

    def target(self, output: str) -> str | None:
        found = self.pattern.match(output)
        return self.ordered[found.lastindex - 1] if found and found.lastindex else None

    def parse(self, text: str, example: Example) -> str | Invalid:
        """The label that the output begins with, up to its end, its line's or a sign.

        Signs before it and the case of letters do not matter: `**Yes**, since ...` is yes,
        `No idea` is not no.
        """
        del example
        return self.target(text) or Invalid(text, "begins with no label")

    def statistics(self, targets, guesses, sources):
        del sources
        return classification.statistics(targets, guesses, self.labels)

    def summarize(self, totals):
        return classification.summarize(totals, self.labels)


class _Entities(_Answers):
    """Entities, kept as the text they are written in."""

    headline = "entity_f1"
    wanted = "must be (token, TAG) tuples or a JSON list of attribute, value and source"

    def target(self, output: str) -> str | None:
        return output if read_entities(output) is not None else None

    def parse(self, text: str, example: Example) -> str | Invalid:
        """The output, if it has entities in the form of the target, and as many tuples."""
        wanted, found = read_attributes(example.target), read_attributes(text)
        if wanted is not None:
            return Invalid(text, "no list of attributes") if found is None else text.strip()
        tuples, expected = (len(read_tuples(one, ())) for one in (text, example.target))
        if tuples != expected:
            return Invalid(text, f"{tuples} tuples for {expected}")
        return text.strip()

    def statistics(self, targets, guesses, sources):
        """[n, S = 5]: hits, predicted and true entities, 1 for an invalid output, 1."""
        del sources
        rows = np.zeros((len(targets), 5))
        for row, target, guess in zip(rows, targets, guesses, strict=True):
            true = read_entities(target) or set()
            found = read_entities(guess) or set() if guess is not None else set()
            row[:] = len(true & found), len(found), len(true), guess is None, 1
        return rows

    def summarize(self, totals):
        hits, predicted, true, invalid, count = np.moveaxis(totals, -1, 0)
        return {
            "entity_f1": f1(hits, predicted, true),
            "entity_precision": ratio(hits, predicted),
            "entity_recall": ratio(hits, true),
            "invalid_rate": ratio(invalid, count),
        }


def read_entities(text: str) -> set[tuple[Any, ...]] | None:
    """The entities of an output in either form, None if it has neither.

    Those of tuples are (type, first, last tuple) of well-formed BIO tags.
    """
    attributes = read_attributes(text)
    if attributes is not None:
        return attributes
    tags = read_tuples(text, ())
    return {*ner.strict_entities(tags)} if tags else None


def read_attributes(text: str) -> set[tuple[Any, ...]] | None:
    """The (attribute, value, source) of ECInstruct's form, None if the text is not in it."""
    names = ("attribute", "value", "source")
    try:
        found = json.loads(text)
        if not isinstance(found, list):
            return None
        return {tuple(json.dumps(one[name], sort_keys=True) for name in names) for one in found}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
