import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecomjax.metrics import classification, statistics

LABELS = ("a", "b", "c")


def summarize(totals):
    return classification.summarize(totals, LABELS)


def systems(n, seed, *rates):
    """Statistics of systems that are right at the given rates on the same examples."""
    generator = np.random.default_rng(seed)
    gold = generator.choice(LABELS, n, p=[0.6, 0.3, 0.1])
    rows = []
    for rate in rates:
        guess = np.where(generator.random(n) < rate, gold, generator.choice(LABELS, n))
        rows.append(classification.statistics(list(gold), list(guess), LABELS))
    return rows


def test_equals_a_naive_loop_on_the_same_resamples():
    (stats,) = systems(40, 0, 0.6)
    rows, counts = np.unique(stats, axis=0, return_counts=True)
    drawn = np.random.default_rng(3).multinomial(40, counts / 40, 50)
    naive = [summarize(np.repeat(rows, weights, axis=0).sum(0)) for weights in drawn]
    ours = statistics.bootstrap(stats, summarize, 50, seed=3)
    for name, interval in ours.items():
        expected = np.percentile([values[name] for values in naive], [2.5, 97.5])
        np.testing.assert_allclose(interval, expected, atol=1e-12)


def test_same_distribution_as_drawing_examples_one_by_one():
    (stats,) = systems(60, 0, 0.5)
    picks = np.random.default_rng(1).integers(0, 60, (20000, 60))
    naive = summarize(stats[picks].sum(1))["accuracy"]
    low, high = statistics.bootstrap(stats, summarize, 20000)["accuracy"]
    np.testing.assert_allclose((low, high), np.percentile(naive, [2.5, 97.5]), atol=1 / 60)


def test_neither_chunks_nor_order_matter(monkeypatch):
    a, b = systems(50, 0, 0.5, 0.7)
    whole = statistics.paired_bootstrap(a, b, summarize, 100)
    order = np.random.default_rng(0).permutation(50)
    assert statistics.paired_bootstrap(a[order], b[order], summarize, 100) == whole
    monkeypatch.setattr(statistics, "WEIGHTS_AT_ONCE", 64)
    assert statistics.paired_bootstrap(a, b, summarize, 100) == whole


def test_seed_decides():
    (stats,) = systems(50, 0, 0.5)
    first = statistics.bootstrap(stats, summarize, 100, seed=1)
    assert first == statistics.bootstrap(stats, summarize, 100, seed=1)
    assert first != statistics.bootstrap(stats, summarize, 100, seed=2)


def test_identical_systems_do_not_differ():
    (stats,) = systems(50, 0, 0.5)
    for row in statistics.paired_bootstrap(stats, stats, summarize, 100).values():
        assert row == (0.0, 0.0, 0.0, 1.0)


def test_paired_difference_is_seen():
    a, b = systems(300, 0, 0.9, 0.3)
    ab = statistics.paired_bootstrap(a, b, summarize, 400)["accuracy"]
    assert ab[0] > 0 and ab[1] > 0 and ab[3] == pytest.approx(2 / 401)
    assert ab[0] == pytest.approx(
        float(summarize(a.sum(0))["accuracy"] - summarize(b.sum(0))["accuracy"])
    )


def test_no_examples_is_an_error():
    with pytest.raises(ValueError, match="no examples"):
        statistics.bootstrap(np.zeros((0, 4)), summarize)


def cells(prior, rate):
    """Chances of the confusion cells of a system that knows the label at `rate`, else guesses."""
    known, guessed = np.diag(prior) * rate, np.outer(prior, np.ones(3)) * (1 - rate) / 3
    return np.pad(known + guessed, ((0, 0), (0, 1))).ravel()


def coverage(prior, rate, n, trials=2000):
    """Share of the samples whose interval holds the true value, by metric."""
    chances = cells(prior, rate)
    truth, generator = summarize(chances), np.random.default_rng(0)
    held = {"accuracy": 0, "macro_f1": 0}
    for trial in range(trials):
        stats = np.repeat(np.eye(12), generator.multinomial(n, chances), axis=0)
        intervals = statistics.bootstrap(stats, summarize, 1000, trial)
        for name in held:
            held[name] += intervals[name][0] <= truth[name] <= intervals[name][1]
    return {name: count / trials for name, count in held.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("prior", "n"), [((0.34, 0.33, 0.33), 300), ((0.6, 0.3, 0.1), 200)])
def test_intervals_hold_the_truth_as_often_as_they_say(prior, n):
    assert all(0.93 <= held <= 0.97 for held in coverage(prior, 0.6, n).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prior", "n", "stated"),
    [((0.7, 0.28, 0.02), 200, 0.919), ((0.6, 0.3, 0.1), 50, 0.929), ((0.6, 0.3, 0.1), 20, 0.76)],
)
def test_intervals_of_rare_labels_are_too_narrow_as_stated(prior, n, stated):
    assert coverage(prior, 0.6, n)["macro_f1"] == pytest.approx(stated, abs=0.01)


@pytest.mark.slow
def test_intervals_of_means_hold_the_truth():
    generator, held = np.random.default_rng(0), 0
    for trial in range(2000):
        stats = np.stack([generator.beta(0.8, 2.0, 200), np.ones(200)], axis=1)
        low, high = statistics.bootstrap(
            stats, lambda totals: {"mean": totals[..., 0] / totals[..., 1]}, 500, trial
        )["mean"]
        held += low <= 0.8 / 2.8 <= high
    assert 0.93 <= held / 2000 <= 0.97


def false_claims(n, trials=2000):
    """Share of pairs of equally good systems that the tests tell apart at 0.05."""
    generator = np.random.default_rng(0)
    told = {"accuracy": 0, "macro_f1": 0, "mcnemar": 0}
    for trial in range(trials):
        gold, both = generator.choice(3, n, p=(0.6, 0.3, 0.1)), generator.random(n)
        stats = []
        for _ in range(2):
            # Half of the examples are equally hard for both systems.
            ease = np.where(generator.random(n) < 0.5, both, generator.random(n))
            guess = np.where(ease < 0.6, gold, generator.integers(0, 3, n))
            stats.append(np.eye(12)[4 * gold + guess])
        compared = statistics.paired_bootstrap(*stats, summarize, 1000, trial)
        for name in ("accuracy", "macro_f1"):
            told[name] += compared[name][3] < 0.05
        a, b = (summarize(rows)["accuracy"] == 1 for rows in stats)
        told["mcnemar"] += statistics.mcnemar(a, b)[2] < 0.05
    return {name: count / trials for name, count in told.items()}


@pytest.mark.slow
def test_equally_good_systems_are_seldom_told_apart():
    assert all(told <= 0.055 for told in false_claims(200).values())


@pytest.mark.slow
def test_few_examples_tell_equally_good_systems_apart_too_often_as_stated():
    assert false_claims(20)["macro_f1"] == pytest.approx(0.077, abs=0.01)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_exact_sign_test(pairs):
    a, b = np.array(pairs).T
    only_a, only_b, p = statistics.mcnemar(a, b)
    assert (only_a, only_b) == (pairs.count((True, False)), pairs.count((False, True)))
    told = only_a + only_b
    tail = sum(math.comb(told, k) for k in range(min(only_a, only_b) + 1)) / 2**told
    assert p == pytest.approx(min(1.0, 2 * tail), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=6))
def test_holm_by_its_definition(p_values):
    adjusted = statistics.holm(p_values)
    assert list(adjusted) == list(p_values)
    for level in (0.01, 0.05, 0.2):
        claimed = set()
        for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
            if p_values[name] * (len(p_values) - rank) > level:
                break
            claimed.add(name)
        assert {name for name, p in adjusted.items() if p <= level} == claimed


def test_holm_by_hand():
    adjusted = statistics.holm({"a": 0.03, "b": 0.01, "c": 0.04})
    assert adjusted == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})


@pytest.mark.parametrize(
    ("comparison", "n", "said"),
    [
        ((0.1, 0.02, 0.18, 0.01), 300, "better"),
        ((-0.1, -0.18, -0.02, 0.01), 300, "worse"),
        ((0.1, -0.02, 0.22, 0.1), 300, "no claim"),
        ((0.0, 0.0, 0.0, 1.0), 300, "no claim"),
        ((0.1, 0.02, 0.18, 0.06), 300, "no claim"),  # p adjusted for several comparisons
        ((0.1, 0.02, 0.18, 0.01), 99, "no claim"),
    ],
)
def test_what_may_be_claimed(comparison, n, said):
    assert statistics.verdict(*comparison, n) == said


def test_sizes_by_hand():
    assert statistics.detectable(-0.05, 0.15) == pytest.approx(0.1)
    assert statistics.examples_needed(-0.05, -0.15, 0.05, 300) == 1200
    assert statistics.examples_needed(0.5, 0.4, 0.6, 300) == statistics.FEWEST_EXAMPLES
    assert statistics.examples_needed(0.0, -0.1, 0.1, 300) == math.inf


def test_a_split_of_the_size_needed_tells_the_difference():
    draw = [systems(n, 7, 0.75, 0.65) for n in (150, 40000)]
    small, large = (statistics.paired_bootstrap(*s, summarize, 1000)["accuracy"] for s in draw)
    assert statistics.verdict(*small, 150) == "no claim"
    assert abs(small[0]) < statistics.detectable(*small[1:3])
    needed = statistics.examples_needed(*large[:3], 40000)
    stats = systems(4 * needed, 8, 0.75, 0.65)
    told = statistics.paired_bootstrap(*stats, summarize, 1000)["accuracy"]
    assert statistics.verdict(*told, 4 * needed) == "better"


def test_continuous_statistics_are_resampled_in_bounded_memory():
    generator = np.random.default_rng(0)
    stats = generator.random((3000, 39))
    low, high = statistics.bootstrap(stats, lambda totals: {"mean": totals[..., 0] / 3000})["mean"]
    error = stats[:, 0].std() / np.sqrt(3000)
    assert low == pytest.approx(stats[:, 0].mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(stats[:, 0].mean() + 1.96 * error, abs=0.2 * error)
