"""Reviews of the synthetic shop: true to what is judged, and enough to find the summary."""

from __future__ import annotations

import collections
import functools
import itertools

import numpy as np
import pytest

from ecomjax.data import catalogue, store, store_aspects, store_items, store_reviews
from ecomjax.data.store_aspect_words import TRAITS
from ecomjax.data.store_review_words import ASIDES, FRAMES, OPENERS
from ecomjax.data.store_words import AISLES

TASK = "review_summarization"
PARTS = ("verdict", "pros", "cons")
RATINGS = {"verdict": 3, "pros": 5, "cons": 1}
"""A rating of the reviews that each part is taken from."""


@functools.cache
def most(split: str) -> list[dict]:
    return store.rows(TASK, split, seed=0, size=1000 if split == "train" else 300)


def summary(row) -> dict:
    return row["website_summaries"][0]


def texts(rows) -> list[str]:
    return [review["text"] for row in rows for review in row["customer_reviews"]]


def kind_of(row) -> catalogue.Kind:
    """A summary opens with the type."""
    names = sorted(catalogue.kinds(), key=len, reverse=True)
    verdict = summary(row)["verdict"].lower()
    return catalogue.kinds()[next(name for name in names if verdict.startswith(name))]


# --- Form -----------------------------------------------------------------------------


@pytest.mark.parametrize("split", store.SPLITS)
def test_rows_have_the_raw_form_of_amasum(split):
    for row in most(split):
        assert len(row["website_summaries"]) == 1
        assert list(summary(row)) == list(PARTS)
        assert summary(row)["verdict"] and summary(row)["pros"] and summary(row)["cons"]
        assert set(row["product_meta"]) == {"title", "categories"}
        votes = [review["helpful_votes"] for review in row["customer_reviews"]]
        assert len(set(votes)) == len(votes) >= 6, "which are the most helpful is not open"
        for review in row["customer_reviews"]:
            assert list(review) == ["title", "text", "rating", "helpful_votes"]
            assert review["title"] and review["text"] and review["rating"] in (1, 2, 3, 4, 5)


def test_products_do_not_repeat():
    rows = most("train")
    assert len({tuple(texts([row])) for row in rows}) == len(rows)


# --- Truth ----------------------------------------------------------------------------


@pytest.mark.parametrize("split", store.SPLITS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_reviews_determine_the_summary(split, seed):
    for row in store.rows(TASK, split, seed, 150):
        reviews = {"customer_reviews": row["customer_reviews"]}
        assert store.gold_summary(reviews) == summary(row), row["product_id"]


def test_the_order_of_the_reviews_does_not_matter():
    for row in most("test")[:50]:
        assert store.gold_summary({"customer_reviews": row["customer_reviews"][::-1]}) == summary(
            row
        )


def helpful(row, part: str) -> list[dict]:
    """The reviews that a part of the summary is taken from."""
    worst, best = {"verdict": (1, 5), "pros": (4, 5), "cons": (1, 2)}[part]
    found = [r for r in row["customer_reviews"] if worst <= r["rating"] <= best]
    return sorted(found, key=lambda r: -r["helpful_votes"])[: store_reviews.MOST_HELPFUL]


def test_the_texts_of_the_helpful_reviews_are_enough():
    """Without titles, ratings and the other reviews, as a model is shown them."""
    for row, (part, rating) in itertools.product(most("test")[:100], RATINGS.items()):
        shown = [
            {"text": review["text"], "rating": rating, "helpful_votes": -place}
            for place, review in enumerate(helpful(row, part))
        ]
        assert store.gold_summary({"customer_reviews": shown})[part] == summary(row)[part]


def test_which_reviews_are_helpful_matters():
    changed = [
        store.gold_summary(
            {
                "customer_reviews": [
                    {**review, "helpful_votes": -review["helpful_votes"]}
                    for review in row["customer_reviews"]
                ]
            }
        )
        != summary(row)
        for row in most("test")[:100]
    ]
    assert np.mean(changed) > 0.95


def review(votes: int, rating: float, *sentences: str) -> dict:
    text = " ".join(["My sister talked me into the Ovando parka.", *sentences])
    return {"title": "", "text": text, "rating": rating, "helpful_votes": votes}


def test_summary_by_hand():
    fits, pinches = "To me, the fit sits just right.", "Honestly, the cut pinches all over."
    late, seam = "The shipping was late twice.", "To me, the seam gave way at once."
    reviews = [
        review(9, 5, "I was asked about the seam.", fits),
        review(8, 3, late, fits),
        review(7, 1, late, seam),
        review(6, 4, fits, "The sizing matches the chart."),
        review(1, 1, late, pinches),
        review(0, 2, late, pinches),
    ]
    assert store.gold_summary({"customer_reviews": reviews}) == {
        "verdict": "Parka worth buying for accurate sizing.",
        "pros": ["Accurate sizing"],
        "cons": ["Slow delivery", "Unreliable sizing"],
    }
    reviews[3] = review(6, 3, late, fits)
    found = store.gold_summary({"customer_reviews": reviews})
    assert found["verdict"] == (
        "Parka with accurate sizing on one side and slow delivery on the other."
    )


@pytest.mark.parametrize("split", store.SPLITS)
def test_ratings_follow_from_what_is_judged(split):
    for row in most(split)[:100]:
        for review in row["customer_reviews"]:
            judged = store_aspects.judgements(kind_of(row), review["text"])
            good = sum(sign for _, sign in judged)
            balance = good - (len(judged) - good)
            assert judged and np.sign(balance) == np.sign(review["rating"] - 3), review


def test_a_product_is_good_or_bad_in_an_aspect_and_never_both():
    for row in most("train")[:100]:
        judged = set(store_aspects.judgements(kind_of(row), " ".join(texts([row]))))
        assert len({aspect for aspect, _ in judged}) == len(judged)


def test_votes_favour_reviews_that_judge_what_the_summary_says():
    """Measured: 3.1 of its aspects in each of the four most helpful reviews, 1.3 in the others."""
    means = []
    for row in most("test")[:100]:
        gold = {phrase.lower() for part in PARTS[1:] for phrase in summary(row)[part]}
        found = []
        for review in sorted(row["customer_reviews"], key=lambda r: -r["helpful_votes"]):
            judged = store_aspects.judgements(kind_of(row), review["text"])
            found.append(sum(aspect.summaries[sign] in gold for aspect, sign in judged))
        means.append((np.mean(found[:4]), np.mean(found[4:])))
    helpful, others = np.mean(means, 0)
    assert helpful > 2 * others
    assert np.mean([one > other for one, other in means]) > 0.9


# --- Words ----------------------------------------------------------------------------


def test_every_type_has_its_aspects():
    """Enough for a product, and every name and saying means one thing."""
    assert len(TRAITS) == len(AISLES)
    names_of_types = store_reviews._type_names()
    for kind in catalogue.kinds().values():
        aspects = store_aspects.aspects_of(kind)
        assert len(aspects) >= 2 * store_reviews.MOST_CHIEF + store_reviews.OTHERS, kind
        names = [name for aspect in aspects for name in aspect.names]
        assert len(set(names)) == len(names), kind
        phrases = [aspect.summaries[True] for aspect in aspects]
        for one, other in itertools.permutations(phrases, 2):
            assert one not in other, (kind, one, other)
        for aspect, sign in itertools.product(aspects, (True, False)):
            assert len(aspect.names) == len(aspect.sayings[sign]) == 3, aspect.names
            for said in (*aspect.names, *aspect.sayings[sign]):
                assert not names_of_types.search(said), said
            # What the aspects can say well and badly is told apart by the words.
            assert not set(aspect.sayings[True]) & set(aspect.sayings[False])


def test_training_has_every_aspect_good_and_bad():
    """Summaries of test are written in words that training has, but for the type."""
    judged = {
        phrase for row in most("train") for part in PARTS[1:] for phrase in summary(row)[part]
    }
    known = {
        store_items.capitalized(aspect.summaries[sign])
        for aspects in store_aspects.aspects().values()
        for aspect in aspects
        for sign in (True, False)
    }
    assert judged == known


def test_aspects_are_balanced():
    """Each verdict is common, and no phrase but those on any product is."""
    verdicts = collections.Counter(
        next(word for word in ("worth", "avoid", "one side") if word in summary(row)["verdict"])
        for row in most("train")
    )
    assert min(verdicts.values()) > 0.15 * len(most("train")), verdicts
    for part in ("pros", "cons"):
        assert 1.7 < np.mean([len(summary(row)[part]) for row in most("train")]) < 2.3
        said = collections.Counter(phrase for row in most("train") for phrase in summary(row)[part])
        assert said.most_common(5)[4][1] < 0.15 * len(most("train")), said.most_common(6)
    ratings = collections.Counter(
        r["rating"] for row in most("train") for r in row["customer_reviews"]
    )
    assert min(ratings.values()) > 0.1 * sum(ratings.values()), ratings


# --- Difficulty -----------------------------------------------------------------------


def test_no_text_is_in_two_splits():
    kinds = [set(texts(most(split))) for split in store.SPLITS]
    assert not kinds[0] & kinds[1] and not kinds[0] & kinds[2] and not kinds[1] & kinds[2]


@pytest.mark.parametrize("table", [OPENERS, FRAMES, ASIDES])
def test_every_split_has_sentences_of_its_own(table):
    written = {split: " ".join(texts(most(split))) for split in store.SPLITS}
    for split, sentence in ((split, s) for split, listed in table.items() for s in listed):
        start = sentence.partition("{")[0]
        assert [other for other, text in written.items() if start in text] == [split]


@pytest.mark.parametrize(("split", "least"), [("validation", 15), ("test", 30)])
def test_phrases_are_held_out(split, least):
    """Names and sayings of a split are in its reviews and in those of no other."""
    own = set()
    for aspect in itertools.chain(*store_aspects.aspects().values()):
        own |= {f"the {name} " for name in store_aspects.names(split, aspect).own}
        for sign in (True, False):
            own |= {f" {saying}." for saying in store_aspects.sayings(split, aspect, sign).own}
            own |= {f" {saying}." for saying in store_aspects.common_sayings(split, sign).own}
    here = " ".join(texts(most(split)))
    assert sum(phrase in here for phrase in own) > least
    for other in set(store.SPLITS) - {split}:
        elsewhere = " ".join(texts(most(other)))
        assert not [phrase for phrase in own if phrase in elsewhere]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_types_and_brands_are_held_out(split):
    """About half of the products are of types that training has not; most words are known."""
    own = {kind_of(row).name for row in most(split)} - {kind_of(row).name for row in most("train")}
    assert 0.3 < np.mean([kind_of(row).name in own for row in most(split)]) < 0.7
    assert {catalogue.kinds()[name].aisle for name in own} <= set(catalogue.aisles(split).own)
    known = set(" ".join(texts(most("train"))).lower().split())
    words = " ".join(texts(most(split))).lower().split()
    assert 0.6 < np.mean([word in known for word in words]) < 0.95


def test_trivial_summaries_score_low():
    """ROUGE-L of what needs no understanding. Measured for verdict, pros and cons: the most
    helpful review 0.10, 0.03 and 0.03; the same summary for all products 0.28, 0.23 and 0.27."""
    rouge = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge.RougeScorer(["rougeL"], use_stemmer=True)
    test = most("test")[:60]

    def score(part, candidates):
        gold = [summary(row)[part] for row in test]
        pairs = zip(map(written, gold), map(written, candidates), strict=True)
        return np.mean([scorer.score(one, other)["rougeL"].fmeasure for one, other in pairs])

    def written(text):
        return text if isinstance(text, str) else "\n".join(text)

    for part in PARTS:
        assert score(part, [store.gold_summary(row)[part] for row in test]) == 1.0
        texts_of = [[review["text"] for review in helpful(row, part)] for row in test]
        assert score(part, [listed[0] for listed in texts_of]) < 0.2, "most helpful review"
        assert score(part, texts_of) < 0.1, "all helpful reviews"
        first = [row["customer_reviews"][0] for row in test]
        assert score(part, [review["text"] for review in first]) < 0.2
        assert score(part, [review["title"] for review in first]) < 0.1
        for row in most("train")[:10]:
            assert score(part, [summary(row)[part]] * len(test)) < 0.4, "the same for all"
