from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ecomjax.metrics import calibration

LABELS = ("Exact", "Substitute", "Irrelevant")
CASES = st.integers(1, 30).flatmap(
    lambda n: st.tuples(
        arrays.arrays(float, (n, 3), elements=st.floats(-50, 0)),
        st.lists(st.sampled_from(LABELS), min_size=n, max_size=n),
    )
)


def scores(loglikelihoods, gold):
    rows = calibration.statistics(loglikelihoods, gold, LABELS)
    return {name: float(value) for name, value in calibration.summarize(rows.sum(0)).items()}


@settings(max_examples=500, deadline=None)
@given(CASES)
def test_brier_equals_sklearn(case):
    from sklearn.metrics import brier_score_loss

    loglikelihoods, gold = case
    share = calibration.probabilities(loglikelihoods)
    order = [LABELS.index(label) for label in sorted(LABELS)]
    theirs = brier_score_loss(gold, share[:, order], labels=sorted(LABELS), scale_by_half=False)
    assert scores(*case)["brier"] == pytest.approx(theirs, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(CASES)
def test_calibration_error_equals_a_loop_over_the_bins(case):
    loglikelihoods, gold = case
    share = calibration.probabilities(loglikelihoods)
    confidence = share.max(1)
    right = np.array([LABELS[place] for place in share.argmax(1)]) == np.array(gold)
    edges, error = np.arange(16) / 15, 0.0
    for low, high in pairwise(edges):
        own = (confidence > low) & (confidence <= high)
        if own.any():
            error += own.mean() * abs(right[own].mean() - confidence[own].mean())
    assert scores(*case)["ece"] == pytest.approx(error, abs=1e-12)


def test_sure_and_right_is_perfect_sure_and_wrong_the_worst():
    sure = np.array([[0.0, -np.inf, -np.inf]])
    assert scores(sure, ["Exact"]) == {"ece": 0.0, "brier": 0.0}
    assert scores(sure, ["Irrelevant"]) == {"ece": 1.0, "brier": 2.0}


def test_calibrated_on_average_within_a_bin_is_no_error():
    share = np.log([[0.5, 0.3, 0.2]] * 4)
    assert scores(share, ["Exact", "Exact", "Substitute", "Irrelevant"])["ece"] == pytest.approx(0)


def test_summaries_map_over_leading_axes():
    rows = calibration.statistics(np.log([[0.5, 0.3, 0.2]] * 2), ["Exact", "Irrelevant"], LABELS)
    for name, value in calibration.summarize(rows[:, None]).items():
        assert value.shape == (2, 1)
        assert value[1, 0] == calibration.summarize(rows[1])[name]


@pytest.mark.parametrize("bad", [[np.nan, 0, 0], [np.inf, 0, 0], [-np.inf] * 3])
def test_what_is_no_likelihood_is_refused(bad):
    with pytest.raises(ValueError, match="no probabilities"):
        scores(np.array([[0.0, 0.0, 0.0], bad]), ["Exact", "Exact"])


def test_another_number_of_labels_is_refused():
    with pytest.raises(ValueError, match="1x2 log-likelihoods for 1 examples of 3 labels"):
        scores(np.zeros((1, 2)), ["Exact"])


def test_what_a_prompt_favours_anyway_is_divided_out():
    """Zhao et al. 2021: p / p_cf, here of the mean over two prompts without content."""
    p = np.array([[0.7, 0.2, 0.1]])
    content_free = np.array([[[0.8, 0.1, 0.1], [0.6, 0.3, 0.1]]])
    found = calibration.contextual(np.log(p) - 300.0, np.log(content_free) - 500.0)
    np.testing.assert_allclose(found, np.log([[0.7 / 0.7, 0.2 / 0.2, 0.1 / 0.1]]), atol=1e-9)
    same = calibration.contextual(np.log(p), np.log(np.full((1, 2, 3), 1 / 3)))
    np.testing.assert_allclose(calibration.probabilities(same), p)
