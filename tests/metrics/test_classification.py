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


@settings(max_examples=200, deadline=None)
@given(PAIRS)
def test_equals_sklearn(pairs):
    sklearn = pytest.importorskip("sklearn.metrics")
    gold = [a for a, _ in pairs]
    predicted = [b or "invalid" for _, b in pairs]
    ours = scores(pairs)
    each = sklearn.f1_score(gold, predicted, labels=LABELS, average=None, zero_division=0)
    np.testing.assert_allclose([ours[f"f1/{label}"] for label in LABELS], each, atol=1e-12)
    macro = sklearn.f1_score(gold, predicted, labels=LABELS, average="macro", zero_division=0)
    assert ours["macro_f1"] == pytest.approx(macro, abs=1e-12)
    assert ours["accuracy"] == pytest.approx(sklearn.accuracy_score(gold, predicted), abs=1e-12)


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
