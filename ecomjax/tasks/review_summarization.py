"""Review summarization: a product's verdict, pros or cons from a few of its reviews."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ecomjax.data.sources import Row
from ecomjax.errors import UserError
from ecomjax.tasks import prompts
from ecomjax.tasks.base import Example, Skipped, bad_value, column, identity
from ecomjax.tasks.text import TextTask

ASKED = {
    "verdict": "Sum up what the reviews say of the product in a short verdict.",
    "pros": "List what the reviews praise about the product, one point a line.",
    "cons": "List what the reviews criticise about the product, one point a line.",
}
"""Instruction by target."""

RATED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "pros": ("above 3", lambda rating: rating > 3),
    "cons": ("below 3", lambda rating: rating < 3),
}
"""Which reviews tell of pros and of cons."""


class ReviewSummarization(TextTask):
    """The most helpful reviews of a product to a summary of them.

    Rows have one of two forms. AmaSum's own (Brazinskas et al. 2021, arXiv 2109.04325) has
    `website_summaries` (objects of verdict, pros, cons), of which the first is the target,
    and `customer_reviews` (objects of text, rating, helpful_votes), of which those with
    most votes are shown, the earlier one first among equals. The other has `reviews` and
    `summaries`, lists of texts: no votes are known, so the first reviews are shown, and
    every summary is a reference. Titles and ratings are not shown.

    A product without pros (cons), or without a review rated above (below) 3, is left out
    where these are the target.

    Args:
        target: "verdict", "pros" or "cons"; the last two as lines.
        reviews: how many are shown.
    """

    name = "review_summarization"
    prefix = "summarize: "

    def __init__(self, target: str = "verdict", reviews: int = 4):
        where = f"task {self.name}"
        if target not in ASKED:
            known = ", ".join(ASKED)
            raise UserError(f"unknown target '{target}'", where, f"known: {known}")
        if reviews < 1:
            raise UserError(f"{reviews} reviews", where, "show at least one")
        self.target, self.reviews = target, reviews
        self.system = f"{prompts.PERSONA} {ASKED[target]}"

    def example(self, row: Row) -> Example | Skipped:
        given = self._rated(row) if "website_summaries" in row.values else self._plain(row)
        if isinstance(given, Skipped):
            return given
        reviews, references = given
        return Example(identity(row, "product_id"), {"reviews": reviews}, references)

    def user(self, example: Example) -> str:
        shown = enumerate(example.inputs["reviews"], start=1)
        return "\n".join(f"Review {number}: {text}" for number, text in shown)

    def _plain(self, row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Reviews and references of a row of texts alone."""
        if self.target != "verdict":
            raise UserError(
                f"a row without {self.target}", row.where, "use the target verdict or AmaSum's rows"
            )
        reviews = _texts(row, "reviews", column(row, "reviews", list))
        summaries = _texts(row, "summaries", column(row, "summaries", list))
        for name, texts in (("reviews", reviews), ("summaries", summaries)):
            if not texts:
                raise bad_value(row, name, "must hold a text that is not blank")
        return tuple(reviews[: self.reviews]), tuple(summaries)

    def _rated(self, row: Row) -> tuple[tuple[str, ...], tuple[str, ...]] | Skipped:
        """Reviews and reference of a row in AmaSum's form."""
        summary = _objects(row, "website_summaries")[0]
        reviews = _objects(row, "customer_reviews")
        if self.target == "verdict":
            reference = " ".join(_texts(row, "website_summaries", [summary.get("verdict")]))
            if not reference:
                raise bad_value(row, "website_summaries", "must hold a verdict that is not blank")
        else:
            rated, fits = RATED[self.target]
            points = summary.get(self.target) or []
            if not isinstance(points, list):
                raise bad_value(row, "website_summaries", f"must hold {self.target} as a list")
            reference = "\n".join(_texts(row, "website_summaries", points))
            reviews = [one for one in reviews if fits(_number(row, one, "rating"))]
            if not reference:
                return Skipped(f"no {self.target}")
            if not reviews:
                return Skipped(f"no review rated {rated}")
        reviews.sort(key=lambda one: -_number(row, one, "helpful_votes"))
        shown = _texts(row, "customer_reviews", [one.get("text") for one in reviews])
        if not shown:
            raise bad_value(row, "customer_reviews", "must hold a text that is not blank")
        return tuple(shown[: self.reviews]), (reference,)


def _objects(row: Row, name: str) -> list[Mapping[str, Any]]:
    """The objects in a column, at least one."""
    given = column(row, name, list)
    if not given or not all(isinstance(one, Mapping) for one in given):
        raise bad_value(row, name, "must be a list of objects, at least one")
    return list(given)


def _texts(row: Row, name: str, given: list[Any]) -> list[str]:
    """Texts of a column, without the blanks around them and without those that are blank."""
    if not all(isinstance(text, str | None) for text in given):
        raise bad_value(row, name, "must hold texts")
    return [text.strip() for text in given if text and text.strip()]


def _number(row: Row, review: Mapping[str, Any], name: str) -> float:
    """A number of a review; none is 0 votes, and a rating that tells nothing."""
    value = review.get(name)
    if value is None:
        return 0.0 if name == "helpful_votes" else 3.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_value(row, "customer_reviews", f"must hold {name} as a number")
    return float(value)
