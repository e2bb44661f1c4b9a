"""ESCI: how a product matches a search query (Shopping Queries data, task 2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import MappingProxyType

import numpy as np

from ecomjax.data.sources import Row
from ecomjax.metrics import classification
from ecomjax.tasks import prompts
from ecomjax.tasks.base import Example, Invalid, Task, bad_value, column, group, identity

LABELS = ("Exact", "Substitute", "Complement", "Irrelevant")

_BY_SPELLING = {spelling: label for label in LABELS for spelling in (label, label[0])}
_BY_WORD = {label.lower(): label for label in LABELS}
_FIRST_WORD = re.compile(r"\W*([^\W\d_]+)")


class Esci(Task):
    """Query and product to Exact, Substitute, Complement or Irrelevant.

    The product is shown by title, brand and colour, each left out where it is null or
    blank; a product of which nothing is known is an error. The locale is not shown. The
    products of a query are ranked together: of a `query_id`, or where that is not known of
    the query's text.

    Args:
        description: show the description too.
        bullets: show the bullet points too.
    """

    name = "esci"
    headline = "macro_f1"
    labels = LABELS
    gains = MappingProxyType(dict(zip(LABELS, (1.0, 0.1, 0.01, 0.0), strict=True)))
    prefix = "classify: "
    system = (
        f"{prompts.PERSONA} Judge how the product matches the search query. Answer with one "
        "word: Exact if it satisfies the whole query, Substitute if it only partly does but "
        "could be used instead, Complement if it is used together with what is asked for, "
        "Irrelevant otherwise."
    )

    def __init__(self, description: bool = False, bullets: bool = False):
        self.shown = {
            "product_title": "Product",
            "product_brand": "Brand",
            "product_color": "Color",
            **({"product_description": "Description"} if description else {}),
            **({"product_bullet_point": "Features"} if bullets else {}),
        }
        """Columns of the product that are shown, and what they are called in the prompt."""

    def example(self, row: Row) -> Example:
        query = column(row, "query", str)
        if not query.strip():
            raise bad_value(row, "query", "must not be blank")
        product = {name: column(row, name, str, null=True) for name in self.shown}
        inputs = {name: text for name, text in product.items() if text and text.strip()}
        if not inputs:
            raise bad_value(row, "product_title", "must not be blank if nothing else is known")
        label = column(row, "esci_label", str)
        if label not in _BY_SPELLING:
            raise bad_value(row, "esci_label", f"must be one of {', '.join(LABELS)}, E, S, C, I")
        together = group(row, "query_id") or query.strip()
        return Example(identity(row), {"query": query, **inputs}, _BY_SPELLING[label], together)

    def user(self, example: Example) -> str:
        query, product = self.pair(example)
        return f"Query: {query}\n{product}"

    def pair(self, example: Example) -> tuple[str, str]:
        """The query, and the lines of the product."""
        lines = [
            f"{title}: {example.inputs[name].strip()}"
            for name, title in self.shown.items()
            if name in example.inputs
        ]
        return example.inputs["query"].strip(), "\n".join(lines)

    def answer(self, example: Example) -> str:
        return example.target

    def parse(self, text: str, example: Example) -> str | Invalid:
        """The label that the output begins with.

        Signs before the first word, the case of its letters and everything after it are
        ignored; another first word is invalid, a label later in the text or not.
        """
        del example
        first = _FIRST_WORD.match(text)
        if first is None:
            return Invalid(text, "no word")
        label = _BY_WORD.get(first[1].lower())
        return label or Invalid(text, f"first word is no label: {first[1][:40]}")

    def statistics(
        self, predictions: Sequence[str | Invalid], examples: Sequence[Example]
    ) -> np.ndarray:
        guesses = [None if isinstance(guess, Invalid) else guess for guess in predictions]
        return classification.statistics([e.target for e in examples], guesses, LABELS)

    def summarize(self, totals: np.ndarray) -> dict[str, np.ndarray]:
        return classification.summarize(totals, LABELS)
