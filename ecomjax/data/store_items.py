"""Products of the synthetic shop: how one is drawn anew, titled, and read back from a text."""

from __future__ import annotations

import dataclasses
import functools
import random
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ecomjax.data import catalogue
from ecomjax.data.catalogue import Kind
from ecomjax.data.store_words import PRAISE, SPLITS, TITLES

T = TypeVar("T")

ACCESSORY_SHARE = 0.3
"""How often an accessory is drawn and not what it goes with."""

FRESH_DRAWS = 20
ID_BLOCK = 10_000_000


@dataclasses.dataclass(frozen=True)
class Item:
    """A type with values on some axes: a product, or what a query asks for."""

    kind: Kind
    values: Mapping[str, str]


def generator(task: str, split: str, seed: int, number: int) -> random.Random:
    """Randomness for one row, or for the rows of one query."""
    # A text seeds through SHA-512, alike on every platform and under every hash seed.
    return random.Random(f"{task}/{split}/{seed}/{number}")


def first_id(split: str) -> int:
    """The id of the first row of a split; those of another split are elsewhere."""
    return SPLITS.index(split) * ID_BLOCK


def product_id(row_id: int) -> str:
    return f"SHOP{row_id:08d}"


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def joined(phrases: Sequence[str]) -> str:
    """Phrases as in "a, b and c"."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), *phrases[-1:])))


def fresh(draw: Callable[[], T], seen: set[Any], key: Callable[[T], Any]) -> T:
    """A draw whose key was not seen yet, or the last of `FRESH_DRAWS`."""
    drawn = draw()
    for _ in range(FRESH_DRAWS - 1):
        if key(drawn) not in seen:
            break
        drawn = draw()
    seen.add(key(drawn))
    return drawn


def draw_kind(rng: random.Random, split: str) -> Kind:
    """A product type that a split has."""
    aisle = catalogue.aisles(split).draw(rng)
    return rng.choice(catalogue.aisle_side(aisle, accessory=rng.random() < ACCESSORY_SHARE))


def draw_product(rng: random.Random, split: str, share: float) -> Item:
    """A product with a brand, and a value on each other axis that often."""
    kind = draw_kind(rng, split)
    return Item(
        kind,
        {
            axis: catalogue.values(split, axis, kind.section, kind.aisle).draw(rng)
            for axis in kind.axes
            if axis == "creator" or rng.random() < share
        },
    )


def title(rng: random.Random, product: Item) -> str:
    """A product title: type and values in one of the orders of `TITLES`, at times with praise."""
    phrases = []
    for slot in rng.choice(TITLES).split():
        if slot == "type":
            phrases.append(product.kind.name)
        elif slot in product.values:
            phrases += catalogue.spellings(slot, product.values[slot], "title")
    return string.capwords(" ".join([*phrases, rng.choice(PRAISE)]))


@functools.cache
def lexicon(kind: Kind) -> dict[str, tuple[str, str]]:
    """Axis and value of every phrase that can describe a product of this type."""
    return {
        phrase: (axis, value)
        for axis in kind.axes
        for split in SPLITS
        for value in catalogue.values(split, axis, kind.section, kind.aisle).everything
        for place in catalogue.PLACES
        for phrase in catalogue.spellings(axis, value, place)
    }


def understand(text: str) -> Item:
    """The item that a query or title describes: first its type, which tells the words' meaning.

    The first of the longest phrases wins, as in "hoop earrings" against "earrings"; a type
    after "for" is not the item's own.
    """
    words = text.lower().split()
    spans = [(i, j) for i in range(len(words)) for j in range(min(i + 4, len(words)), i, -1)]
    kind, first, last = next(
        (catalogue.kinds()[name], i, j)
        for i, j in spans
        if (name := " ".join(words[i:j])) in catalogue.kinds() and (i == 0 or words[i - 1] != "for")
    )
    values, read = {}, 0
    for i, j in spans:
        outside = i >= read and (j <= first or i >= last)
        if outside and (phrase := " ".join(words[i:j])) in lexicon(kind):
            axis, value = lexicon(kind)[phrase]
            values[axis], read = value, j
    return Item(kind, values)
