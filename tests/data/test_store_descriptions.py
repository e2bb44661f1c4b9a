"""Descriptions of the synthetic shop: they follow from the other texts, and from no copy."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from ecomjax.data import catalogue, store, store_aspects, store_items
from ecomjax.data.store_description_words import DETAILS, LABELS, OPENINGS
from ecomjax.data.store_words import AISLES, SECTIONS

TASK = "description_generation"


@functools.cache
def most(split: str) -> list[dict]:
    return store.rows(TASK, split, seed=0, size=3000 if split == "train" else 1000)


def kind_of(row) -> catalogue.Kind:
    return store_items.understand(row["product_title"]).kind


# --- Form -----------------------------------------------------------------------------


@pytest.mark.parametrize("split", store.SPLITS)
def test_rows_pass_the_filters_of_the_study(split):
    titles = set()
    for row in most(split):
        title, description = row["product_title"], row["product_description"]
        assert title and description and row["product_bullet_point"] and row["product_brand"]
        assert description not in (title, row["product_bullet_point"])
        assert len(title.split()) < len(description.split())
        assert title not in titles, "an earlier product has this title"
        titles.add(title)


# --- Truth ----------------------------------------------------------------------------


@pytest.mark.parametrize("split", store.SPLITS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_other_texts_determine_the_description(split, seed):
    for row in store.rows(TASK, split, seed, 1000):
        given = {name: text for name, text in row.items() if name != "product_description"}
        assert store.gold_description(given) == row["product_description"], row["product_title"]


def test_line_ends_do_not_matter():
    for row in most("test")[:100]:
        one_line = " ".join(row["product_bullet_point"].split())
        found = store.gold_description({**row, "product_bullet_point": one_line})
        assert found == row["product_description"]


@pytest.mark.parametrize(
    ("column", "least"),
    [("product_bullet_point", 0.99), ("product_brand", 0.8), ("product_color", 0.5)],
)
def test_every_column_matters(column, least):
    """With the column of another product of the type the description is another."""
    by_type = sorted(most("train")[:1000], key=lambda row: kind_of(row).name)
    pairs = [
        (one, other)
        for one, other in itertools.pairwise(by_type)
        if kind_of(one) == kind_of(other) and one[column] and other[column]
    ]
    changed = [
        store.gold_description({**one, column: other[column]}) != one["product_description"]
        for one, other in pairs
    ]
    assert len(changed) > 100
    assert np.mean(changed) > least


def test_description_by_hand():
    row = {
        "product_title": "Wool Parka For Men Best Seller Model 1204",
        "product_bullet_point": "Count on accurate sizing.\nOur team replies on weekends too.\n"
        "Measure: size 8.\nIdeal for hiking.\nWe promise quick delivery.\nSold as pack of 2.",
        "product_brand": "Red Thimble",
        "product_color": "Olive",
    }
    assert store.gold_description(row) == (
        "Dress for the day with the olive parka by Red Thimble, model 1204. Made of wool, at its "
        "best for hiking and created with men in mind. The fit matches the chart and the delivery "
        "took two days. Comes in size 8 and arrives as a set of two."
    )


@pytest.mark.parametrize(
    ("size", "amount"),
    [
        ("12 inch", "Measures twelve inches"),
        ("1 liter", "Holds one liter"),
        ("large", "Comes in large"),
    ],
)
def test_sizes_by_hand(size, amount):
    row = {
        "product_title": "Hearthwell Nonstick Wok Ember Model 2000",
        "product_bullet_point": f"Dimension: {size}.\nNow with tight lid.",
        "product_brand": "Hearthwell",
        "product_color": None,
    }
    assert store.gold_description(row) == (
        "Cook and serve with the Ember wok by Hearthwell, model 2000. Nonstick. The lid shuts "
        f"with a click. {amount}."
    )


# --- Words ----------------------------------------------------------------------------


def test_the_style_covers_every_section_and_axis():
    assert set(OPENINGS) == {section for section, *_ in AISLES}
    axes = {"fits"}.union(*SECTIONS.values())
    assert set(LABELS) == axes - {"creator", "color"}
    assert set(DETAILS) == axes - {"creator", "color", "product_name", "UoM", "quantity"}


def test_training_has_every_praise():
    """Descriptions of test are written in words that training has, but for its own things."""
    text = " ".join(row["product_description"].lower() for row in most("train"))
    for aspect in itertools.chain(*store_aspects.aspects().values()):
        assert f"the {aspect.names[0]} {aspect.sayings[True][0]}".lower() in text


# --- Difficulty -----------------------------------------------------------------------


@pytest.mark.parametrize("column", ["product_title", "product_description", "product_bullet_point"])
def test_no_text_is_in_two_splits(column):
    texts = [{row[column] for row in most(split)} for split in store.SPLITS]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_no_model_is_in_two_splits():
    """Titles and descriptions state the model, so they differ for certain and not by chance."""
    for remainder, split in enumerate(store.SPLITS):
        for row in most(split):
            model = row["product_title"].split()[-1]
            assert f", model {model}." in row["product_description"]
            assert int(model) % len(store.SPLITS) == remainder


@pytest.mark.parametrize(("split", "least"), [("validation", 50), ("test", 100)])
def test_words_are_held_out(split, least):
    """Brands, types and other words are new, and yet most of the text is of known words."""

    def words_of(rows):
        columns = ("product_title", "product_description", "product_bullet_point")
        return [set(" ".join(row[name] for name in columns).lower().split()) for row in rows]

    held_out = store.held_out_words(split)
    found = words_of(most(split))
    known = set().union(*words_of(most("train")))
    assert len((held_out - known) & set().union(*found)) > least
    assert 0.6 < np.mean([bool(words & held_out) for words in found]) < 0.99
    assert 0.6 < np.mean([word in known for words in found for word in words]) < 0.95
    aisles = [kind_of(row).aisle for row in most(split)]
    assert 0.4 < np.mean([aisle in catalogue.aisles(split).own for aisle in aisles]) < 0.6
    assert not {kind_of(row).aisle for row in most("train")} & set(catalogue.aisles(split).own)


def test_columns_are_balanced():
    """Each value is as often in the title as it is not; a color is in about half of the rows."""
    rows = most("train")
    named = [row["product_brand"] in row["product_title"] for row in rows]
    assert 0.45 < np.mean(named) < 0.55
    assert 0.25 < np.mean([bool(row["product_color"]) for row in rows]) < 0.5
    bullets = [row["product_bullet_point"].count("\n") + 1 for row in rows]
    assert 4 < np.mean(bullets) < 9 and min(bullets) >= 3


def test_copies_score_low():
    """ROUGE-L of what needs no understanding. Measured: the title 0.18, the bullet points 0.12,
    both 0.21, the description of another product 0.31."""
    rouge = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge.RougeScorer(["rougeL"], use_stemmer=True)
    test = most("test")[:100]

    def score(candidates):
        return np.mean(
            [
                scorer.score(row["product_description"], text)["rougeL"].fmeasure
                for row, text in zip(test, candidates, strict=True)
            ]
        )

    assert score([store.gold_description(row) for row in test]) == 1.0
    assert score([row["product_title"] for row in test]) < 0.25
    assert score([row["product_bullet_point"] for row in test]) < 0.2
    both = [f"{row['product_title']} {row['product_bullet_point']}" for row in test]
    assert score(both) < 0.3
    for row in most("train")[:20]:
        assert score([row["product_description"]] * len(test)) < 0.42, "the same for all"
