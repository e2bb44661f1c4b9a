"""Description generation: what a product is told to be, from its title, brand and bullets."""

from __future__ import annotations

import html
import re

from ecomjax.data.sources import Row
from ecomjax.tasks import prompts
from ecomjax.tasks.base import Example, Skipped, column, identity
from ecomjax.tasks.text import TextTask

SHOWN = {
    "title": "Title",
    "brand": "Brand",
    "color": "Color",
    "bullets": "Bullet points",
}
"""Inputs, and what they are called in the prompt."""

INLINE = frozenset("a abbr b big em font i mark s small span strong sub sup tt u".split())
"""Tags that do not part the words around them."""


class DescriptionGeneration(TextTask):
    """Product attributes to the product's description.

    Rows have the product columns of the Shopping Queries data, which may be those of
    `esci` rows. HTML is stripped from all fields, and every run of blanks is one space, so
    that the prompt is four lines; a brand or color that is not known has none.

    As in the study, rows are kept where description, title and bullet points are present,
    the description differs from both, the title has fewer words than it, and no example
    before had the same title; other rows are left out and counted, by the first of these
    that they fail.

    Args:
        bullets: whether bullet points are required, as in the study; where they are not, a
            row without them is kept and its prompt has no such line.
        locale: products of another one are left out; "" is every locale. Rows that do not
            tell theirs are kept.
    """

    name = "description_generation"
    once = "title"
    prefix = "describe: "
    system = (
        f"{prompts.PERSONA} Write the description of the product whose title, brand, color and "
        "bullet points are given."
    )

    def __init__(self, bullets: bool = True, locale: str = "us"):
        self.bullets, self.locale = bullets, locale

    def example(self, row: Row) -> Example | Skipped:
        columns = {
            "title": "product_title",
            "brand": "product_brand",
            "color": "product_color",
            "bullets": "product_bullet_point",
            "description": "product_description",
        }
        given = {
            name: plain_text(column(row, place, str, null=True) or "")
            for name, place in columns.items()
        }
        reason = self._left_out(row, given)
        if reason:
            return Skipped(reason)
        inputs = {name: given[name] for name in SHOWN if given[name]}
        name = identity(row, "product_id")
        if not self.locale and row.values.get("example_id") is None:
            name = f"{row.values.get('product_locale') or ''}-{name}"  # unique within a locale
        return Example(name, inputs, (given["description"],))

    def _left_out(self, row: Row, given: dict[str, str]) -> str | None:
        """Why the study would not use a product, None if it would."""
        description, title, bullets = (given[name] for name in ("description", "title", "bullets"))
        locale = row.values.get("product_locale")
        if self.locale and locale not in (None, self.locale):
            return f"locale is not {self.locale}"
        if not description:
            return "no description"
        if not title:
            return "no title"
        if self.bullets and not bullets:
            return "no bullet points"
        if description == title:
            return "description is the title"
        if description == bullets:
            return "description is the bullet points"
        if len(title.split()) >= len(description.split()):
            return "title is not shorter than the description"
        return None

    def user(self, example: Example) -> str:
        return "\n".join(
            f"{title}: {example.inputs[name]}"
            for name, title in SHOWN.items()
            if name in example.inputs
        )


def plain_text(text: str) -> str:
    """The text without HTML tags, comments, scripts and styles, on one line.

    Tags part words, but for `INLINE` ones. Character references are resolved, once. The
    parser of the standard library agrees on what is well formed, but takes quadratic time
    on tags that are not closed, and reads them otherwise from version to version.
    """
    return " ".join(html.unescape(_MARKUP.sub(_instead, text)).split())


def _instead(markup: re.Match[str]) -> str:
    """What a piece of markup leaves behind."""
    tag = markup["tag"] or markup["unread"]
    return " " if tag and tag.lower() not in INLINE else ""


_MARKUP = re.compile(
    r"<!--.*?(?:-->|\Z)"
    r"|<(?P<unread>script|style)\b[^<>]*>.*?(?:</(?P=unread)\s*>|\Z)"
    r"|</?(?P<tag>[a-z]\w*\b)[^<>]*>"
    r"|<[!?][^<>]*>",
    re.DOTALL | re.IGNORECASE,
)
