import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomjax.metrics import classification

LABELS = ("Exact", "Substitute", "Complement", "Irrelevant")
PAIRS = st.lists(
    st.tuples(st.sampled_from(LABELS), st.sampled_from((*LABELS, None))), min_size=1, max_size=30
)


def scores(pairs):
    gold, predicted = zip(*pairs, strict=True)
    rows = classification.statistics(gold, predicted, LABELS)
    return {k: float(v) for k, v in classification.summarize(rows.sum(0), LABELS).items()}


@settings(max_examples=500, deadline=None)
@given(PAIRS)
def test_equals_sklearn(pairs):
    sklearn = pytest.importorskip("sklearn.metrics")
    gold = [a for a, _ in pairs]
    predicted = [b or "invalid" for _, b in pairs]
    ours = scores(pairs)
    each = sklearn.precision_recall_fscore_support(gold, predicted, labels=LABELS, zero_division=0)
    for name, theirs in zip(("precision", "recall", "f1"), each, strict=False):
        ours_each = [ours[f"{name}/{label}"] for label in LABELS]
        np.testing.assert_allclose(ours_each, theirs, rtol=0, atol=1e-12)
    for average in ("macro", "micro", "weighted"):
        theirs = sklearn.f1_score(gold, predicted, labels=LABELS, average=average, zero_division=0)
        assert ours[f"{average}_f1"] == pytest.approx(theirs, abs=1e-12)
    assert ours["accuracy"] == pytest.approx(sklearn.accuracy_score(gold, predicted), abs=1e-12)
    if ours["invalid_rate"] == 0:
        assert ours["micro_f1"] == pytest.approx(ours["accuracy"], abs=1e-12)
    elif ours["accuracy"] > 0:
        assert ours["micro_f1"] > ours["accuracy"]


@settings(max_examples=100, deadline=None)
@given(PAIRS)
def test_confusion_equals_sklearn(pairs):
    sklearn = pytest.importorskip("sklearn.metrics")
    gold, predicted = zip(*pairs, strict=True)
    ours = classification.confusion(
        classification.statistics(gold, predicted, LABELS).sum(0), LABELS
    )
    named = [label or "invalid" for label in predicted]
    theirs = sklearn.confusion_matrix(gold, named, labels=[*LABELS, "invalid"])
    np.testing.assert_array_equal(ours, theirs[:-1])


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=())))
def test_any_text_is_a_prediction(text):
    assert scores([("Exact", text)])["invalid_rate"] == (text not in LABELS)


def test_invalid_output_counts_as_wrong():
    ours = scores([("Exact", "Exact"), ("Exact", None), ("Irrelevant", "no label")])
    assert ours["accuracy"] == pytest.approx(1 / 3)
    assert ours["f1/Exact"] == pytest.approx(2 / 3)
    assert ours["invalid_rate"] == pytest.approx(2 / 3)


def test_macro_is_over_all_labels_of_the_task():
    assert scores([("Exact", "Exact")])["macro_f1"] == pytest.approx(1 / 4)


def test_summaries_map_over_leading_axes():
    rows = classification.statistics(["Exact", "Complement"], ["Exact", None], LABELS)
    stacked = classification.summarize(rows[:, None], LABELS)
    for name, value in stacked.items():
        assert value.shape == (2, 1), name
        for index in range(2):
            assert value[index, 0] == classification.summarize(rows[index], LABELS)[name]
