"""A small synthetic shop: labelled product searches without a network, drawn from a seed.

The shop has a catalogue of product types in aisles. An aisle holds types that can stand in for
one another, and the types that are used together with those. A product is a type with a value
on each of some axes (brand, colour, size, ...). A query is made from a template of axes, so the
tag of every word is known, and `relation` defines how a product relates to what is asked for.
Rows have the columns of the real data sets in whose place they stand.

Each split has query templates of its own, and validation and test each have aisles, brands and
other words that no other split has; see `HELD_OUT_SHARE` and `held_out_words`.

A row depends on task, split, seed and the rows before it, never on the size: a smaller set is
the beginning of a larger one, in every process and on every platform.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from ecomjax.data import catalogue
from ecomjax.data.catalogue import HELD_OUT_SHARE, Kind, held_out_words
from ecomjax.data.store_words import PRAISE, SPLITS, TITLES
from ecomjax.errors import UserError

__all__ = [
    "HELD_OUT_SHARE",
    "RELATIONS",
    "RELATION_SHARES",
    "SPLITS",
    "TASKS",
    "Item",
    "Sizes",
    "gold_relation",
    "held_out_words",
    "relation",
    "rows",
]

T = TypeVar("T")

TASKS = ("esci", "queryner")
RELATIONS = ("Exact", "Substitute", "Complement", "Irrelevant")

RELATION_SHARES = (0.44, 0.26, 0.12, 0.18)
"""Expected shares of `RELATIONS`: the order of the real data, with its rare classes less rare."""

ACCESSORY_SHARE = 0.3
"""Queries that ask for an accessory and not for what it goes with."""

PRODUCTS_PER_QUERY = 4

KEPT_SHARE = 0.8
"""How often a product that is not wanted still has a value that was asked for."""

EXTRA_SHARE = 0.35
"""How often a product states an axis that was not asked for."""

FRESH_DRAWS = 20
ID_BLOCK = 10_000_000


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Default number of rows of each split of a task."""

    train: int = 1000
    validation: int = 200
    test: int = 300


@dataclasses.dataclass(frozen=True)
class Item:
    """A type with values on some axes: a product, or what a query asks for."""

    kind: Kind
    values: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Query:
    """A query word by word, and what it asks for even where it does not name the type."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    wanted: Item


def rows(task: str, split: str, seed: int, size: int) -> list[dict[str, Any]]:
    """The first `size` rows of a split.

    Args:
        task: "esci" (query, product, relation) or "queryner" (query, BIO tags).
        split: "train", "validation" or "test".
        seed: another seed gives other rows of the same shop.
        size: number of rows.

    Returns:
        Rows with the columns of the real data set; what the shop does not know is None.

    Raises:
        UserError: the task or split is unknown, or the size is negative.
    """
    for name, value, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in known:
            remedy = f"use one of {', '.join(known)}"
            raise UserError(f"unknown {name} {value!r}", "the synthetic shop", remedy)
    if size < 0:
        raise UserError(f"negative size {size}", "the synthetic shop", "ask for 0 or more rows")
    return (_esci_rows if task == "esci" else _queryner_rows)(split, seed, size)


def relation(wanted: Item, product: Item) -> str:
    """The shop's definition of the relation between what is asked for and a product.

    Irrelevant is what stands in another aisle, Complement what is used together with the wanted
    type. Of the types that can stand in for the wanted one, Exact is that type itself with
    every value asked for, Substitute all else.
    """
    if wanted.kind.aisle != product.kind.aisle:
        return "Irrelevant"
    if wanted.kind.accessory != product.kind.accessory:
        return "Complement"
    satisfied = wanted.values.items() <= product.values.items()
    return "Exact" if wanted.kind == product.kind and satisfied else "Substitute"


def gold_relation(row: Mapping[str, Any]) -> str:
    """The relation of an esci row, read from its texts by someone who knows the catalogue.

    Query and product title are parsed with the words that the section of their type has, then
    compared. That this finds the label of every row shows that the texts determine it.

    Args:
        row: a row of `rows("esci", ...)`; only `query` and `product_title` are read.
    """
    return relation(_understand(row["query"]), _understand(row["product_title"]))


# --- Queries and products -------------------------------------------------------------


def _query(rng: random.Random, split: str, of_products: bool) -> Query:
    """A query from a template; `of_products` if every word can be checked on a product."""
    aisle = catalogue.aisles(split).draw(rng)
    kind = rng.choice(catalogue.aisle_side(aisle, accessory=rng.random() < ACCESSORY_SHARE))
    tokens, tags, values, place = [], [], {}, "before"
    for slot in rng.choice(catalogue.templates(split, kind, of_products)):
        phrase, tag = slot, None
        if slot == "type":
            phrase, tag, place = kind.name, "core_product_type", "after"
        elif slot in catalogue.ALL_AXES:
            values[slot] = catalogue.values(split, slot, kind.section, kind.aisle).draw(rng)
            phrase = rng.choice(catalogue.spellings(slot, values[slot], place))
            tag = "modifier" if slot == "fits" else slot
        words = phrase.split()
        tokens += words
        tags += [f"{'I' if i else 'B'}-{tag}" if tag else "O" for i in range(len(words))]
    return Query(tuple(tokens), tuple(tags), Item(kind, values))


def _product(rng: random.Random, split: str, wanted: Item, label: str) -> Item:
    """A product in the given relation to the wanted one, and otherwise much like it."""
    kind, violated = wanted.kind, None
    if label == "Substitute" and rng.random() < 0.5:
        violated = rng.choice(list(wanted.values))
    elif label == "Substitute":
        others = catalogue.aisle_side(kind.aisle, kind.accessory)
        kind = rng.choice([other for other in others if other != kind])
    elif label == "Complement":
        kind = rng.choice(catalogue.aisle_side(kind.aisle, not kind.accessory))
    elif label == "Irrelevant":
        alike, near = catalogue.strangers(split, kind)
        kind = rng.choice(alike if alike and rng.random() < 0.5 else near)
    values = {}
    for axis in kind.axes:
        pool = catalogue.values(split, axis, kind.section, kind.aisle)
        asked = wanted.values.get(axis)
        keep = label == "Exact" or violated is not None or rng.random() < KEPT_SHARE
        if axis == violated:
            values[axis] = rng.choice([value for value in pool.everything if value != asked])
        elif keep and asked in pool.everything:
            values[axis] = asked
        elif asked is not None or axis == "creator" or rng.random() < EXTRA_SHARE:
            values[axis] = pool.draw(rng)
    return Item(kind, values)


def _offer(rng: random.Random, split: str, wanted: Item, label: str) -> dict[str, Any]:
    """The product columns of an esci row."""
    product = _product(rng, split, wanted, label)
    phrases = []
    for slot in rng.choice(TITLES).split():
        if slot == "type":
            phrases.append(product.kind.name)
        elif slot in product.values:
            phrases += catalogue.spellings(slot, product.values[slot], "title")
    color = product.values.get("color")
    return {
        "product_locale": "us",
        "esci_label": label,
        "product_title": string.capwords(" ".join([*phrases, rng.choice(PRAISE)])),
        "product_description": None,
        "product_bullet_point": None,
        "product_brand": string.capwords(product.values["creator"]),
        "product_color": string.capwords(color) if color else None,
    }


# --- Rows -----------------------------------------------------------------------------


def _fresh(draw: Callable[[], T], seen: set[Any], key: Callable[[T], Any]) -> T:
    """A draw whose key was not seen yet, or the last of `FRESH_DRAWS`."""
    drawn = draw()
    for _ in range(FRESH_DRAWS - 1):
        if key(drawn) not in seen:
            break
        drawn = draw()
    seen.add(key(drawn))
    return drawn


def _queries(task: str, split: str, seed: int) -> Iterator[tuple[random.Random, Query]]:
    """Queries without end, each with a generator for the products to go with it."""
    seen: set[tuple[str, ...]] = set()
    for number in itertools.count():
        # A text seeds through SHA-512, alike on every platform and under every hash seed.
        rng = random.Random(f"{task}/{split}/{seed}/{number}")
        draw = functools.partial(_query, rng, split, of_products=task == "esci")
        yield rng, _fresh(draw, seen, lambda query: query.tokens)


def _queryner_rows(split: str, seed: int, size: int) -> list[dict[str, Any]]:
    queries = itertools.islice(_queries("queryner", split, seed), size)
    return [
        {"example_id": row_id, "tokens": list(query.tokens), "ner_tags": list(query.tags)}
        for row_id, (_, query) in enumerate(queries, SPLITS.index(split) * ID_BLOCK)
    ]


def _esci_rows(split: str, seed: int, size: int) -> list[dict[str, Any]]:
    first = SPLITS.index(split) * ID_BLOCK
    made: list[dict[str, Any]] = []
    queries = itertools.islice(_queries("esci", split, seed), -(-size // PRODUCTS_PER_QUERY))
    for query_id, (rng, query) in enumerate(queries, first):
        titles: set[str] = set()
        for _ in range(min(PRODUCTS_PER_QUERY, size - len(made))):
            label = rng.choices(RELATIONS, RELATION_SHARES)[0]
            draw = functools.partial(_offer, rng, split, query.wanted, label)
            row_id = first + len(made)
            made.append(
                {
                    "example_id": row_id,
                    "query": " ".join(query.tokens),
                    "query_id": query_id,
                    "product_id": f"SHOP{row_id:08d}",
                    **_fresh(draw, titles, lambda offer: offer["product_title"]),
                }
            )
    return made


# --- Reading the texts back -----------------------------------------------------------


@functools.cache
def _lexicon(kind: Kind) -> dict[str, tuple[str, str]]:
    """Axis and value of every phrase that can describe a product of this type."""
    return {
        phrase: (axis, value)
        for axis in kind.axes
        for split in SPLITS
        for value in catalogue.values(split, axis, kind.section, kind.aisle).everything
        for place in catalogue.PLACES
        for phrase in catalogue.spellings(axis, value, place)
    }


def _understand(text: str) -> Item:
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
        if outside and (phrase := " ".join(words[i:j])) in _lexicon(kind):
            axis, value = _lexicon(kind)[phrase]
            values[axis], read = value, j
    return Item(kind, values)
