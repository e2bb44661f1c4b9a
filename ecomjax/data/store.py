"""A small synthetic shop: labelled data of every task without a network, drawn from a seed.

The shop has a catalogue of product types in aisles. An aisle holds types that can stand in for
one another, and the types that are used together with those. A product is a type with a value
on each of some axes (brand, colour, size, ...). A query is made from a template of axes, so the
tag of every word is known, and `relation` defines how a product relates to what is asked for.
What its customers and sellers write is in `store_reviews` and `store_descriptions`. Rows have
the columns of the real data sets in whose place they stand.

Each split has query templates and sentences of its own, and validation and test each have
aisles, brands and other words that no other split has; see `HELD_OUT_SHARE` and
`held_out_words`.

A row depends on task, split, seed and the rows before it, never on the size: a smaller set is
the beginning of a larger one, in every process and on every platform.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import string
from collections.abc import Iterator, Mapping
from typing import Any

from ecomjax.data import catalogue, store_descriptions, store_items, store_reviews
from ecomjax.data.catalogue import HELD_OUT_SHARE, held_out_words
from ecomjax.data.store_descriptions import gold_description
from ecomjax.data.store_items import Item, first_id, fresh, generator, product_id, understand
from ecomjax.data.store_reviews import gold_summary
from ecomjax.data.store_words import SPLITS
from ecomjax.errors import UserError

__all__ = [
    "HELD_OUT_SHARE",
    "RELATIONS",
    "RELATION_SHARES",
    "SPLITS",
    "TASKS",
    "Item",
    "Sizes",
    "gold_description",
    "gold_relation",
    "gold_summary",
    "held_out_words",
    "relation",
    "rows",
]

TASKS = ("esci", "queryner", store_reviews.TASK, store_descriptions.TASK)
RELATIONS = ("Exact", "Substitute", "Complement", "Irrelevant")

RELATION_SHARES = (0.44, 0.26, 0.12, 0.18)
"""Expected shares of `RELATIONS`: the order of the real data, with its rare classes less rare."""

PRODUCTS_PER_QUERY = 4

KEPT_SHARE = 0.8
"""How often a product that is not wanted still has a value that was asked for."""

EXTRA_SHARE = 0.35
"""How often a product states an axis that was not asked for."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Default number of rows of each split of a task."""

    train: int = 1000
    validation: int = 200
    test: int = 300


@dataclasses.dataclass(frozen=True)
class Query:
    """A query word by word, and what it asks for even where it does not name the type."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    wanted: Item


def rows(task: str, split: str, seed: int, size: int) -> list[dict[str, Any]]:
    """The first `size` rows of a split.

    Args:
        task: "esci" (query, product, relation), "queryner" (query, BIO tags),
            "review_summarization" (reviews, summary) or "description_generation" (product,
            description).
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
    makers = {
        "esci": _esci_rows,
        "queryner": _queryner_rows,
        store_reviews.TASK: store_reviews.rows,
        store_descriptions.TASK: store_descriptions.rows,
    }
    return makers[task](split, seed, size)


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
    return relation(understand(row["query"]), understand(row["product_title"]))


# --- Queries and products -------------------------------------------------------------


def _query(rng: random.Random, split: str, of_products: bool) -> Query:
    """A query from a template; `of_products` if every word can be checked on a product."""
    kind = store_items.draw_kind(rng, split)
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
    title = store_items.title(rng, product)
    color = product.values.get("color")
    return {
        "product_locale": "us",
        "esci_label": label,
        "product_title": title,
        "product_description": None,
        "product_bullet_point": None,
        "product_brand": string.capwords(product.values["creator"]),
        "product_color": string.capwords(color) if color else None,
    }


# --- Rows -----------------------------------------------------------------------------


def _queries(task: str, split: str, seed: int) -> Iterator[tuple[random.Random, Query]]:
    """Queries without end, each with a generator for the products to go with it."""
    seen: set[tuple[str, ...]] = set()
    for number in itertools.count():
        rng = generator(task, split, seed, number)
        draw = functools.partial(_query, rng, split, of_products=task == "esci")
        yield rng, fresh(draw, seen, lambda query: query.tokens)


def _queryner_rows(split: str, seed: int, size: int) -> list[dict[str, Any]]:
    queries = itertools.islice(_queries("queryner", split, seed), size)
    return [
        {"example_id": row_id, "tokens": list(query.tokens), "ner_tags": list(query.tags)}
        for row_id, (_, query) in enumerate(queries, first_id(split))
    ]


def _esci_rows(split: str, seed: int, size: int) -> list[dict[str, Any]]:
    first = first_id(split)
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
                    "product_id": product_id(row_id),
                    **fresh(draw, titles, lambda offer: offer["product_title"]),
                }
            )
    return made
