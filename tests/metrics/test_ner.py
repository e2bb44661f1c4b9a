import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomjax.metrics import ner

TYPES = ("color", "core_product_type", "UoM")
TAGS = ("O", *(f"{prefix}-{name}" for name in TYPES for prefix in "BI"))


@st.composite
def corpora(draw):
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    tags = [st.lists(st.sampled_from(TAGS), min_size=n, max_size=n) for n in lengths]
    return [draw(t) for t in tags], [draw(t) for t in tags]


def scores(gold, predicted, tuples=None):
    rows = ner.statistics(gold, predicted, tuples or [p or [] for p in predicted], TYPES)
    return {k: float(v) for k, v in ner.summarize(rows.sum(0), TYPES).items()}


@settings(max_examples=500, deadline=None)
@given(corpora())
def test_strict_scores_equal_seqeval(corpus):
    seqeval = pytest.importorskip("seqeval.metrics")
    from seqeval.scheme import IOB2, Entities

    gold, predicted = corpus
    ours = scores(gold, predicted)
    strict = {"mode": "strict", "scheme": IOB2, "zero_division": 0}
    for name in ("f1", "precision", "recall"):
        theirs = getattr(seqeval, f"{name}_score")(gold, predicted, **strict)
        assert ours[f"entity_{name}"] == pytest.approx(theirs, abs=1e-12)
    present = Entities(gold, IOB2).unique_tags | Entities(predicted, IOB2).unique_tags
    if present:
        each = np.atleast_1d(seqeval.f1_score(gold, predicted, average=None, **strict))
        ours_each = [ours[f"f1/{name}"] for name in sorted(present)]
        np.testing.assert_allclose(ours_each, each, atol=1e-12)
    assert all(ours[f"f1/{name}"] == 0 for name in set(TYPES) - present)


@settings(max_examples=500, deadline=None)
@given(corpora(), st.randoms(use_true_random=False))
def test_all_o_variant_equals_lenient_seqeval(corpus, random):
    seqeval = pytest.importorskip("seqeval.metrics")
    gold, predicted = corpus
    tuples = [tags + ["B-color"] * random.choice([0, 0, 1]) for tags in predicted]
    counted = [
        list(out) if len(out) == len(true) else ["O"] * len(true)
        for true, out in zip(gold, tuples, strict=True)
    ]
    theirs = seqeval.f1_score(gold, counted, zero_division=0)
    ours = scores(gold, predicted, tuples)
    assert ours["entity_f1_all_o"] == pytest.approx(theirs, abs=1e-12)
    theirs = seqeval.f1_score(gold, predicted, zero_division=0)
    assert ours["entity_f1_lenient"] == pytest.approx(theirs, abs=1e-12)


@settings(max_examples=500, deadline=None)
@given(corpora())
def test_partial_score_is_that_of_the_best_pairs(corpus):
    from scipy.optimize import linear_sum_assignment

    credit = entities = 0.0
    for pair in zip(*corpus, strict=True):
        gold, predicted = (ner.strict_entities(tags) for tags in pair)
        entities += len(gold) + len(predicted)
        worth = np.zeros((len(gold), len(predicted)))
        for i, (_, begin, end) in enumerate(gold):
            for j, (_, other_begin, other_end) in enumerate(predicted):
                if (begin, end) == (other_begin, other_end):
                    worth[i, j] = 1.0
                elif begin <= other_end and other_begin <= end:
                    worth[i, j] = 0.5
        credit += worth[linear_sum_assignment(worth, maximize=True)].sum()
    ours = scores(*corpus)
    assert ours["entity_f1_partial"] == pytest.approx(2 * credit / max(entities, 1), abs=1e-12)
    assert ours["entity_f1_partial"] >= ours["entity_f1"]


def test_partial_score_by_hand():
    # Equal spans of another type count 1, the longer span 1/2, the last entity nothing.
    gold = [["B-color", "O", "B-UoM", "O", "O"]]
    predicted = [["B-UoM", "O", "B-UoM", "I-UoM", "B-color"]]
    assert scores(gold, predicted)["entity_f1_partial"] == pytest.approx(2 * 1.5 / (2 + 3))


@settings(max_examples=500, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=())), min_size=1, max_size=6))
def test_any_text_is_a_tag_of_a_tuple(texts):
    gold = ["B-color"] + ["O"] * (len(texts) - 1)
    marked = [text if index % 2 else f"I-{text}" for index, text in enumerate(texts)]
    for tuples in (texts, marked, marked[1:]):
        ours = scores([gold], [None], [tuples])
        assert ours["entity_f1"] == 0 and 0 <= ours["entity_f1_all_o"] <= 1
    assert ner.strict_entities(texts) <= ner.lenient_entities(texts)


def test_invalid_output_counts_as_all_o():
    gold = [["B-color", "O"], ["B-UoM"]]
    invalid, outside = scores(gold, [["B-color", "O"], None]), scores(gold, [gold[0], ["O"]])
    assert invalid.pop("invalid_rate") == 0.5
    assert outside.pop("invalid_rate") == 0.0
    assert invalid == outside
    assert invalid["entity_f1_lenient"] == invalid["entity_f1_partial"] == pytest.approx(2 / 3)
    assert invalid["entity_f1"] == pytest.approx(2 / 3)


def test_inside_tag_that_continues_nothing_is_lenient_only():
    tags = ["I-color", "I-color", "I-UoM"]
    assert ner.strict_entities(tags) == set()
    assert ner.lenient_entities(tags) == {("color", 0, 1), ("UoM", 2, 2)}


def test_wrong_number_of_tags_is_refused():
    with pytest.raises(ValueError, match="1 predicted tags for 2 tokens"):
        scores([["O", "O"]], [["O"]])
