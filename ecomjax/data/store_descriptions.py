"""Products of the synthetic shop with a description that follows from their other columns.

The values of a product stand in its title, its bullet points or columns of their own. The
description puts all of them in the order and the words of the shop's style: it opens as the
section does, spells out units and small numbers, turns each praised aspect into a sentence, and
leaves out what sellers merely add.
"""

from __future__ import annotations

import functools
import random
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from ecomjax.data import catalogue, store_aspects, store_items
from ecomjax.data.catalogue import as_list, home_by_place
from ecomjax.data.store_aspects import Aspect
from ecomjax.data.store_description_words import (
    CLAIMS,
    DETAILS,
    LABELS,
    NOISE,
    NUMBERS,
    OPENINGS,
    UNITS,
)
from ecomjax.data.store_items import Item, capitalized, joined
from ecomjax.data.store_words import SPLITS

TASK = "description_generation"

STATED_SHARE = 0.45
"""How often a product has a value on an axis other than the brand."""

TITLE_SHARE = 0.5
"""How often a title states a value that it need not state."""

REPEATED_SHARE = 0.25
"""How often bullet points repeat a value of the title."""

MODELS = range(400, 3300)


def rows(split: str, seed: int, size: int) -> list[dict[str, Any]]:
    """Products in the columns of the Shopping Queries data, with an id."""
    first, titles = store_items.first_id(split), set()
    made = []
    for row_id in range(first, first + size):
        rng = store_items.generator(TASK, split, seed, row_id - first)
        draw = functools.partial(_columns, rng, split)
        columns = store_items.fresh(draw, titles, lambda columns: columns["product_title"])
        identity = {"example_id": row_id, "product_id": store_items.product_id(row_id)}
        made.append({**identity, "product_locale": "us", **columns})
    return made


def gold_description(row: Mapping[str, Any]) -> str:
    """The description of a row, from its other texts, by someone who knows the shop's words.

    That this finds the description of every row shows that the other texts determine it.

    Args:
        row: a row of `rows`; title, bullet points, brand and color are read.
    """
    item = store_items.understand(row["product_title"])
    values = {**item.values, "creator": row["product_brand"].lower()}
    if row["product_color"]:
        values["color"] = row["product_color"].lower()
    praised = []
    for bullet in re.split(r"\.\s*", row["product_bullet_point"].lower()):
        for label, axis in _labels().items():
            if bullet.startswith(f"{label} "):
                values[axis] = store_items.lexicon(item.kind)[bullet.removeprefix(f"{label} ")][1]
        aspects = store_aspects.aspects_of(item.kind)
        praised += [aspect for aspect in aspects if aspect.summaries[True] in bullet]
    model = row["product_title"].lower().partition(" model ")[2]
    return describe(Item(item.kind, values), model, praised)


def describe(product: Item, model: str, praised: Sequence[Aspect]) -> str:
    """A description in the shop's style."""
    values = product.values
    thing = " ".join(filter(None, (values.get("color"), product.kind.name)))
    name = string.capwords(values.get("product_name", ""))
    brand = string.capwords(values["creator"])
    opening = OPENINGS[product.kind.section]
    sentences = [
        f"{opening} the {' '.join(filter(None, (name, thing)))} by {brand}, model {model}",
        joined([form.format(values[axis]) for axis, form in DETAILS.items() if axis in values]),
        joined([f"the {aspect.names[0]} {aspect.sayings[True][0]}" for aspect in praised]),
        joined(_amounts(values)),
    ]
    return " ".join(f"{capitalized(sentence)}." for sentence in sentences if sentence)


def _amounts(values: Mapping[str, str]) -> list[str]:
    """What a description says of size and quantity."""
    said = []
    if "UoM" in values:
        number, _, unit = values["UoM"].partition(" ")
        if unit in UNITS:
            verb, one, more = UNITS[unit]
            said.append(f"{verb} {_number(number)} {one if number == '1' else more}")
        else:
            said.append(f"comes in {values['UoM']}")
    if "quantity" in values:
        said.append(f"arrives as a set of {_number(values['quantity'])}")
    return said


def _number(digits: str) -> str:
    return NUMBERS[int(digits)] if int(digits) < len(NUMBERS) else digits


# --- Writing --------------------------------------------------------------------------


def _columns(rng: random.Random, split: str) -> dict[str, Any]:
    """The texts of a product."""
    product = store_items.draw_product(rng, split, STATED_SHARE)
    # The remainder tells the splits apart: no title or description is in two of them.
    model = str(rng.choice(MODELS) * len(SPLITS) + SPLITS.index(split))
    named = {axis: value for axis, value in product.values.items() if rng.random() < TITLE_SHARE}
    title = store_items.title(rng, Item(product.kind, named))
    bullets: list[tuple[str, Aspect | None]] = [
        (_specification(rng, split, axis, value), None)
        for axis, value in product.values.items()
        if axis in LABELS and (axis not in named or rng.random() < REPEATED_SHARE)
    ]
    for aspect in rng.sample(store_aspects.aspects_of(product.kind), rng.randint(2, 3)):
        bullets.append((rng.choice(CLAIMS[split]).format(aspect.summaries[True]), aspect))
    bullets += [(line, None) for line in rng.sample(NOISE[split], rng.randint(1, 2))]
    rng.shuffle(bullets)
    color = product.values.get("color")
    return {
        "product_title": f"{title} Model {model}",
        "product_description": describe(product, model, [a for _, a in bullets if a]),
        "product_bullet_point": "\n".join(f"{line}." for line, _ in bullets),
        "product_brand": string.capwords(product.values["creator"]),
        "product_color": string.capwords(color) if color else None,
    }


def _specification(rng: random.Random, split: str, axis: str, value: str) -> str:
    """A bullet point that states a value."""
    listed = as_list(LABELS[axis])
    label = catalogue.pool(split, listed, lambda label: home_by_place(listed.index(label)))
    return f"{label.draw(rng)} {catalogue.spellings(axis, value, 'title')[0]}"


@functools.cache
def _labels() -> dict[str, str]:
    """The axis that each label stands for."""
    return {label.lower(): axis for axis, labels in LABELS.items() for label in as_list(labels)}
