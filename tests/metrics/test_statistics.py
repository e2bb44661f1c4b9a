import numpy as np
import pytest

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


def test_interval_covers_the_truth():
    truth = 0.6 + 0.4 * (0.6 * 1 / 3 + 0.3 * 1 / 3 + 0.1 * 1 / 3)
    intervals = [
        statistics.bootstrap(systems(200, seed, 0.6)[0], summarize, 300, seed)["accuracy"]
        for seed in range(200)
    ]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.89 <= covered <= 0.99


def test_no_examples_is_an_error():
    with pytest.raises(ValueError, match="no examples"):
        statistics.bootstrap(np.zeros((0, 4)), summarize)
