import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomjax.metrics import ranking
from ecomjax.metrics.statistics import bootstrap

GAINS = st.sampled_from((0.0, 0.01, 0.1, 1.0))
SCORES = st.sampled_from((-1.0, 0.0, 0.5, 2.0)) | st.floats(-1e3, 1e3)
QUERIES = st.lists(
    st.lists(st.tuples(GAINS, SCORES), min_size=2, max_size=8), min_size=1, max_size=5
)


def flat(queries):
    """Gains, scores and queries of all products, the queries' products in turns."""
    rows = [
        (place, gain, score, str(query))
        for query, products in enumerate(queries)
        for place, (gain, score) in enumerate(products)
    ]
    return tuple(map(list, zip(*(row[1:] for row in sorted(rows)), strict=True)))


def ndcg(queries, k=None):
    rows = ranking.statistics(*flat(queries), k=k)
    return {name: float(value) for name, value in ranking.summarize(rows.sum(0)).items()}


@settings(max_examples=500, deadline=None)
@given(QUERIES, st.none() | st.integers(1, 9))
def test_equals_sklearn(queries, k):
    from sklearn.metrics import ndcg_score

    each = []
    for products in queries:
        gains, scores = np.array(products).T
        each.append(ndcg_score(gains[None], scores[None], k=k))
    assert ndcg(queries, k)["ndcg"] == pytest.approx(np.mean(each), abs=1e-12)


def test_by_hand():
    # Ranked 0.1, 1, 0: (0.1 + 1 / log2(3)) / (1 + 0.1 / log2(3)).
    value = ndcg([[(1.0, 2.0), (0.1, 3.0), (0.0, 1.0)]])["ndcg"]
    assert value == pytest.approx((0.1 + 1 / np.log2(3)) / (1 + 0.1 / np.log2(3)))


def test_ties_do_not_depend_on_the_order():
    tied = [(1.0, 0.0), (0.0, 0.0), (0.1, 0.0)]
    assert ndcg([tied]) == ndcg([tied[::-1]])
    assert ndcg([[(1.0, 1.0), (0.0, 0.0)]])["ndcg"] > ndcg([[(1.0, 0.0), (0.0, 0.0)]])["ndcg"]


def test_queries_without_gain_count_as_zero_and_are_told():
    ours = ndcg([[(1.0, 1.0), (0.0, 0.0)], [(0.0, 1.0), (0.0, 0.0)]])
    assert ours == {"ndcg": 0.5, "no_gain_rate": 0.5}


def test_a_query_of_one_product():
    assert ndcg([[(0.1, -3.0)]])["ndcg"] == 1.0
    assert ndcg([[(0.0, -3.0)]]) == {"ndcg": 0.0, "no_gain_rate": 1.0}


def test_queries_are_what_is_resampled():
    rows = ranking.statistics(*flat([[(1.0, 1.0), (0.0, 0.0)], [(1.0, 0.0), (0.0, 1.0)]]))
    assert rows.shape == (2, 3)
    low, high = bootstrap(rows, ranking.summarize, 200)["ndcg"]
    assert low == pytest.approx(1 / np.log2(3)) and high == 1.0


@pytest.mark.parametrize(
    ("gains", "scores", "message"),
    [([1.0, 0.0], [1.0], "1 scores"), ([-1.0, 0.0], [1.0, 2.0], "gain of -1.0 is below 0")],
)
def test_what_does_not_fit_is_refused(gains, scores, message):
    with pytest.raises(ValueError, match=message):
        ranking.statistics(gains, scores, ["q", "q"])
