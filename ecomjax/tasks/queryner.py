"""QueryNER: a tag for every token of a search query (arXiv 2405.09507)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from ecomjax.data.forms import Edge, Form
from ecomjax.data.sources import Row
from ecomjax.metrics import ner
from ecomjax.tasks import prompts
from ecomjax.tasks.base import Example, Invalid, Task, bad_value, column, identity

TYPES = (
    "UoM",
    "color",
    "condition",
    "content",
    "core_product_type",
    "creator",
    "department",
    "material",
    "modifier",
    "occasion",
    "origin",
    "price",
    "product_name",
    "product_number",
    "quantity",
    "shape",
    "time",
)

TAGS = ("O", *(f"{prefix}-{name}" for name in TYPES for prefix in "BI"))

_TAG = r"(O|[BI]-[^\s,()'\"]+)"
_TUPLE_END = re.compile(rf",\s*['\"]?{_TAG}['\"]?\s*\)")
"""A tuple in an output is known by its end: comma, tag (quoted or not), parenthesis."""


def write_tuples(tokens: Iterable[str], tags: Iterable[str]) -> str:
    """The text of an answer: `(white, B-color), (duvet, B-core_product_type)`."""
    return ", ".join(f"({token}, {tag})" for token, tag in zip(tokens, tags, strict=True))


def read_tuples(text: str, tokens: Sequence[str]) -> tuple[str, ...]:
    """The tags of the tuples in an output, in their order and however many.

    A text in exactly the form of `write_tuples` is read along the tokens of the query, so
    that commas, quotes and parentheses in them (even whole tuples) do no harm. Any other
    text is searched for the ends of tuples: spaces, line breaks, brackets, quotes and
    words around them do not matter, nor what they call their token.
    """
    pattern = ", ".join(rf"\({re.escape(token)}, {_TAG}\)" for token in tokens)
    exact = re.fullmatch(pattern, text.strip())
    return exact.groups() if exact else tuple(_TUPLE_END.findall(text))


class QueryNer(Task):
    """Tokens of a query to BIO tags of 17 types.

    Args:
        repair: mend a gold I- that continues no entity of its type by making it a B-, as
            conlleval and seqeval's default mode read it; such examples are counted. By
            default it is an error, as unknown tags and other numbers of tags always are.
    """

    name = "queryner"
    headline = "entity_f1"
    tags = TAGS
    prefix = "tag: "
    system = (
        f"{prompts.PERSONA} Tag every token of the search query: B-TYPE begins an entity, "
        f"I-TYPE continues it, O is outside. The types are {', '.join(TYPES)}. Answer with one "
        "(token, TAG) tuple for each token. For example, white duvet cover gives "
        + write_tuples(
            ("white", "duvet", "cover"),
            ("B-color", "B-core_product_type", "I-core_product_type"),
        )
    )

    def __init__(self, repair: bool = False):
        self.repair = repair

    def example(self, row: Row) -> Example:
        tokens, tags = (tuple(column(row, name, list)) for name in ("tokens", "ner_tags"))
        if not tokens or not all(isinstance(token, str) and token.strip() for token in tokens):
            raise bad_value(row, "tokens", "must be a list of texts that are not blank")
        unknown = [tag for tag in tags if tag not in TAGS]
        if unknown:
            raise bad_value(row, "ner_tags", f"holds {unknown[0]!r}, none of {', '.join(TAGS)}")
        if len(tokens) != len(tags):
            raise bad_value(row, "ner_tags", f"holds {len(tags)} tags for {len(tokens)} tokens")
        orphans = [
            place
            for place, (before, tag) in enumerate(zip(("O", *tags), tags, strict=False))
            if tag.startswith("I-") and before[2:] != tag[2:]
        ]
        if orphans and not self.repair:
            found = tags[orphans[0]]
            raise bad_value(row, "ner_tags", f"holds {found!r} that continues no entity")
        mended = tuple(f"B{tag[1:]}" if i in orphans else tag for i, tag in enumerate(tags))
        return Example(identity(row), {"tokens": tokens}, mended, repaired=bool(orphans))

    def user(self, example: Example) -> str:
        return " ".join(example.inputs["tokens"])

    def words(self, example: Example) -> tuple[str, ...]:
        return example.inputs["tokens"]

    def answer(self, example: Example) -> str:
        return write_tuples(example.inputs["tokens"], example.target)

    def form(self, example: Example) -> Form:
        """One tag for every token in order, I- only where it continues an entity of its type."""
        tokens, states = example.inputs["tokens"], []
        last = len(tokens) - 1

        def piece(place: int, tag: str) -> str:
            separator = ", " if place < last else ""
            return write_tuples(tokens[place : place + 1], [tag]) + separator

        def before(place: int, kind: int | None) -> int:
            """The state before a token, where an entity of a type, or none, may go on."""
            # Each token but the first has a state for every type, and then one for none.
            open_state = place * (len(TYPES) + 1)
            if place > last:
                return last * (len(TYPES) + 1) + 1
            return open_state if kind is None else open_state - len(TYPES) + kind

        for place in range(len(tokens)):
            if place > 0:
                for kind, name in enumerate(TYPES):
                    inside = Edge(piece(place, f"I-{name}"), before(place + 1, kind))
                    states.append((Edge("", before(place, None)), inside))
            begins = (
                Edge(piece(place, f"B-{name}"), before(place + 1, kind))
                for kind, name in enumerate(TYPES)
            )
            states.append((Edge(piece(place, "O"), before(place + 1, None)), *begins))
        return Form((*states, ()))

    def parse(self, text: str, example: Example) -> tuple[str, ...] | Invalid:
        """The tags of `read_tuples`, if they are as many as the tokens and all known.

        Tuples are taken by position: one that spells its token otherwise still tags it.
        """
        tokens = example.inputs["tokens"]
        tags = read_tuples(text, tokens)
        if len(tags) != len(tokens):
            return Invalid(text, f"{len(tags)} tuples for {len(tokens)} tokens")
        unknown = [tag for tag in tags if tag not in TAGS]
        return Invalid(text, f"unknown tag {unknown[0][:40]}") if unknown else tags

    def statistics(
        self, predictions: Sequence[tuple[str, ...] | Invalid], examples: Sequence[Example]
    ) -> np.ndarray:
        tags, tuples = [], []
        for guess, example in zip(predictions, examples, strict=True):
            invalid = isinstance(guess, Invalid)
            tags.append(None if invalid else guess)
            tuples.append(read_tuples(guess.text, example.inputs["tokens"]) if invalid else guess)
        return ner.statistics([e.target for e in examples], tags, tuples, TYPES)

    def summarize(self, totals: np.ndarray) -> dict[str, np.ndarray]:
        return ner.summarize(totals, TYPES)
