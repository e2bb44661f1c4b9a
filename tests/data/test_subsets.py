import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data import subsets
from ecomjax.data.rows import Row
from ecomjax.data.subsets import draw, held_out
from ecomjax.errors import UserError


@given(st.integers(0, 300), st.integers(0, 320), st.integers(0, 5), st.booleans())
def test_a_draw_is_sorted_without_repeats_and_reproducible(n, size, seed, nested):
    drawn = draw(n, size, seed, nested)
    assert np.all(np.diff(drawn) > 0) and all(0 <= place < n for place in drawn)
    assert len(drawn) == (n if size == 0 else min(size, n))
    assert np.array_equal(drawn, draw(n, size, seed, nested))


@given(st.integers(2, 300), st.data())
def test_nested_draws_hold_the_smaller_ones(n, data):
    small, large = sorted(data.draw(st.tuples(st.integers(1, n), st.integers(1, n))))
    assert set(draw(n, small, 3, nested=True)) <= set(draw(n, large, 3, nested=True))


def test_independent_draws_share_what_chance_shares():
    small, large = set(draw(1000, 100, 0)), set(draw(1000, 500, 0))
    assert 30 < len(small & large) < 70


def test_draws_are_those_that_were_always_drawn():
    """The rows of a run of an earlier version: `random` promises this draw for all time."""
    assert draw(1000, 5, 7).tolist() == sorted(random.Random("7/5").sample(range(1000), 5))


@pytest.mark.parametrize("nested", [False, True])
def test_every_row_is_drawn_alike(nested):
    counts = np.zeros(20)
    for seed in range(2000):
        counts[draw(20, 5, seed, nested)] += 1
    # 500 expected, standard deviation 19.4
    assert 420 < counts.min() and counts.max() < 580


def rows(values):
    return [Row(value, f"x:{place}") for place, value in enumerate(values)]


class Unreadable(list):
    def __getitem__(self, index):
        if index == 3:
            raise UserError("bad", "x:3", "mend it")
        return super().__getitem__(index)


def test_a_tenth_is_held_out_by_content_alone():
    values = [{"input": f"text {n}", "output": n % 7} for n in range(3000)]
    held = held_out(rows(values))
    assert 0.08 < held.mean() < 0.12
    turned = [dict(reversed(value.items())) for value in reversed(values)]
    assert np.array_equal(held_out(rows(turned))[::-1], held)


def test_values_are_kept_whole():
    values = [{"query": f"q{n % 200}", "label": n} for n in range(1000)]
    held = held_out(rows(values), "query")
    sides = {(value["query"], bool(side)) for value, side in zip(values, held, strict=True)}
    assert len(sides) == 200 and {side for _, side in sides} == {False, True}


def test_large_splits_hold_fewer_out(monkeypatch):
    monkeypatch.setattr(subsets, "LARGE", 1000)
    values = [{"query": f"q{n}"} for n in range(20000)]
    assert 5 < held_out(rows(values), "query").sum() < 45
    assert held_out(rows(values)).sum() > 1500


def test_rows_that_cannot_be_read_stay_in_train(monkeypatch):
    monkeypatch.setattr(subsets, "HELD_OUT", 1)
    assert held_out(Unreadable(rows([{"a": n} for n in range(5)]))).tolist() == [
        True,
        True,
        True,
        False,
        True,
    ]


class Splits:
    def __init__(self, **splits):
        self.splits = splits

    def rows(self, split):
        return self.splits[split]

    def digest(self, split):
        return str([row.values for row in self.splits[split]])


def test_train_and_validation_are_all_of_train():
    everything = rows([{"query": f"q{n % 90}", "n": n} for n in range(300)])
    data = Splits(train=everything, test=everything[:5])
    train, validation = (subsets.rows(data, "esci", split) for split in ("train", "validation"))
    assert sorted([*train, *validation], key=lambda row: row.values["n"]) == everything
    assert not {row.values["query"] for row in train} & {row.values["query"] for row in validation}
    assert len(train) > 3 * len(validation)
    assert subsets.rows(data, "esci", "test") is data.splits["test"]
    prints = {subsets.digest(data, "esci", split) for split in ("train", "validation", "test")}
    assert len(prints) == 3


def test_a_given_validation_is_kept():
    some = rows([{"query": "q"}])
    data = Splits(train=some, validation=some)
    assert subsets.rows(data, "esci", "train") is some
    assert subsets.digest(data, "esci", "train") == data.digest("train")


def test_too_few_rows_to_hold_one_out_are_told(monkeypatch):
    data = Splits(train=rows([{"query": "q"}]))
    for one_in, split in ((10**6, "validation"), (1, "train")):
        monkeypatch.setattr(subsets, "HELD_OUT", one_in)
        with pytest.raises(UserError, match=r"held out .*esci: 1 rows; give a validation split"):
            subsets.rows(data, "esci", split)
