"""Reviews of the products of the synthetic shop, and the summary that follows from them.

A product has chief aspects, good and bad ones, and others. The more chief aspects a review
judges, the more people find it helpful; its rating follows from what it judges good and bad.
The summary holds what more than half of the most helpful reviews agree on: of all reviews
for the verdict, of the favourable ones for the pros, of the unfavourable ones for the cons.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ecomjax.data import catalogue, store_aspects, store_items
from ecomjax.data.catalogue import Kind
from ecomjax.data.store_aspects import Judgement
from ecomjax.data.store_items import Item, capitalized, joined
from ecomjax.data.store_review_words import ASIDES, FORMS, FRAMES, OPENERS, TITLES

TASK = "review_summarization"

MOST_HELPFUL = 4
"""How many reviews a verdict, the pros and the cons are taken from."""

CUSTOMERS = ((4, 0.8, 0.8, 0.1), (3, 0.8, 0.0, 0.2), (3, 0.0, 0.8, 0.2), (2, 0.1, 0.1, 0.6))
"""Kinds of customers: how many, and how often they judge each of the good chief aspects, the bad
ones and the others. Some go into everything, some only praise, some only complain, and some
judge what nobody else minds."""

MOST_CHIEF, OTHERS = 3, 2
"""At most so many chief aspects of a product are good, so many bad; it has so many others."""

TITLE_SHARE = 0.35
"""How often a product title states an axis."""

ASIDE_SHARE = 0.4
"""How often a review also names an aspect that it does not judge."""


@dataclasses.dataclass(frozen=True)
class Review:
    """What a review says, without its words."""

    votes: int
    rating: float
    judgements: Sequence[Judgement]


def rows(split: str, seed: int, size: int) -> list[dict[str, Any]]:
    """Products with their reviews and summary, in the raw form of AmaSum."""
    first = store_items.first_id(split)
    return [_row(split, seed, row_id, row_id - first) for row_id in range(first, first + size)]


def gold_summary(row: Mapping[str, Any]) -> dict[str, Any]:
    """The summary of a row, read from its reviews by someone who knows the shop's words.

    That this finds the summary of every row shows that the reviews determine it.

    Args:
        row: a row of `rows`; only `customer_reviews` is read.

    Returns:
        verdict, pros and cons, as in `website_summaries`.
    """
    texts = [review["text"] for review in row["customer_reviews"]]
    named = Counter(name for text in texts for name in _type_names().findall(text))
    kind = catalogue.kinds()[named.most_common(1)[0][0]]
    reviews = [
        Review(
            review["helpful_votes"],
            review["rating"],
            store_aspects.judgements(kind, review["text"]),
        )
        for review in row["customer_reviews"]
    ]
    return summarize(kind, reviews)


def summarize(kind: Kind, reviews: Sequence[Review]) -> dict[str, Any]:
    """The shop's definition of verdict, pros and cons.

    What more reviews judge comes first, then what the more helpful review judges first.
    """
    good, bad = ([j for j in agreed(reviews) if j[1] is wanted] for wanted in (True, False))
    pros = [j for j in agreed(r for r in reviews if r.rating > 3) if j[1]]
    cons = [j for j in agreed(r for r in reviews if r.rating < 3) if not j[1]]
    return {
        "verdict": _verdict(kind, good, bad),
        "pros": [capitalized(aspect.summaries[True]) for aspect, _ in pros],
        "cons": [capitalized(aspect.summaries[False]) for aspect, _ in cons],
    }


def agreed(reviews: Iterable[Review]) -> list[Judgement]:
    """What more than half of the most helpful of these reviews judge alike."""
    helpful = sorted(reviews, key=lambda review: -review.votes)[:MOST_HELPFUL]
    counts = Counter(judgement for review in helpful for judgement in review.judgements)
    return [judgement for judgement, count in counts.most_common() if 2 * count > len(helpful)]


def _verdict(kind: Kind, good: Sequence[Judgement], bad: Sequence[Judgement]) -> str:
    """One sentence; empty if nothing is agreed on."""
    if not good and not bad:
        return ""
    form, addition = FORMS[_tone(len(good) - len(bad))]
    if good and bad:
        form += addition
    phrases = {
        name: joined([aspect.summaries[sign] for aspect, sign in judgements])
        for name, judgements in (("good", good), ("bad", bad))
    }
    return form.format(type=capitalized(kind.name), **phrases) + "."


# --- Writing --------------------------------------------------------------------------


def _row(split: str, seed: int, row_id: int, number: int) -> dict[str, Any]:
    rng = store_items.generator(TASK, split, seed, number)
    product = store_items.draw_product(rng, split, TITLE_SHARE)
    while True:
        reviews = _reviews(rng, product.kind)
        summary = summarize(product.kind, reviews)
        if all(summary.values()):
            break
    return {
        "example_id": row_id,
        "product_id": store_items.product_id(row_id),
        "customer_reviews": [
            {**_texts(rng, split, product, review), "helpful_votes": review.votes}
            for review in reviews
        ],
        "website_summaries": [summary],
        "product_meta": {
            "title": store_items.title(rng, product),
            "categories": [string.capwords(product.kind.section)],
        },
    }


def _reviews(rng: random.Random, kind: Kind) -> list[Review]:
    """What the customers of one product say, in the order in which they wrote."""
    drawn = rng.sample(store_aspects.aspects_of(kind), 2 * MOST_CHIEF + OTHERS)
    good, bad = rng.randint(1, MOST_CHIEF), rng.randint(1, MOST_CHIEF)
    groups = (
        [(aspect, True) for aspect in drawn[:good]],
        [(aspect, False) for aspect in drawn[good : good + bad]],
        [(aspect, rng.random() < 0.5) for aspect in drawn[-OTHERS:]],
    )
    said = []
    for count, *shares in CUSTOMERS:
        for _ in range(count):
            judged = [
                judgement
                for group, share in zip(groups, shares, strict=True)
                for judgement in group
                if rng.random() < share
            ]
            rng.shuffle(judged)
            said.append(judged)
    rng.shuffle(said)
    said = [judged for judged in said if judged]
    most = sum(count for count, *_ in CUSTOMERS)
    chief = {*groups[0], *groups[1]}
    return [
        Review(most * len(chief.intersection(judged)) + chance, _rating(rng, judged), judged)
        for chance, judged in zip(rng.sample(range(most), len(said)), said, strict=True)
    ]


def _rating(rng: random.Random, judged: Sequence[Judgement]) -> float:
    good = sum(sign for _, sign in judged)
    bad = len(judged) - good
    if not good or not bad:
        return float(rng.choice((4, 5) if good else (1, 2)))
    return 3.0 + (good > bad) - (good < bad)


def _tone(balance: float) -> str:
    return "liked" if balance > 0 else "disliked" if balance < 0 else "mixed"


def _texts(rng: random.Random, split: str, product: Item, review: Review) -> dict[str, Any]:
    """Title, text and rating of a review."""
    sentences = [
        rng.choice(FRAMES[split]).format(store_aspects.say(rng, split, judgement))
        for judgement in review.judgements
    ]
    judged = [aspect for aspect, _ in review.judgements]
    others = [a for a in store_aspects.aspects_of(product.kind) if a not in judged]
    if others and rng.random() < ASIDE_SHARE:
        name = store_aspects.names(split, rng.choice(others)).draw(rng)
        sentences.insert(rng.randint(0, len(sentences)), rng.choice(ASIDES[split]).format(name))
    brand = string.capwords(product.values["creator"])
    opener = rng.choice(OPENERS[split]).format(brand=brand, type=product.kind.name)
    return {
        "title": rng.choice(TITLES[split][_tone(review.rating - 3)]),
        "text": " ".join([opener, *sentences]),
        "rating": review.rating,
    }


@functools.cache
def _type_names() -> re.Pattern[str]:
    names = sorted(catalogue.kinds(), key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(names)})\b")
