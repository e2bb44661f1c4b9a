import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data.mixture import Mixture, draw_orders, shares
from ecomjax.errors import UserError

SIZES = (100, 10, 1000)


def tasks_of(order, sizes=SIZES):
    return np.searchsorted(np.cumsum(sizes), order, side="right")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 9))
def test_concatenation_holds_every_example_once_an_epoch(sizes, seed):
    orders = draw_orders(sizes, Mixture(), seed, 3)
    for order in orders:
        assert sorted(order) == list(range(sum(sizes)))
    again = draw_orders(sizes, Mixture(), seed, 5)
    assert all((a == b).all() for a, b in zip(orders, again, strict=False))


def test_capped_concatenation_goes_on_through_a_task():
    """Four epochs of 25 draws from a task of 100: all of it, once."""
    orders = draw_orders((100, 10), Mixture(cap=25), 0, 4)
    counts = [np.bincount(tasks_of(order), minlength=2).tolist() for order in orders]
    assert counts == [[25, 10]] * 4
    drawn = np.concatenate(orders)
    assert sorted(drawn[drawn < 100]) == list(range(100))


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        (Mixture("proportional"), [100, 10, 1000]),
        (Mixture("proportional", cap=100), [100, 10, 100]),
        (Mixture("temperature", temperature=1.0), [100, 10, 1000]),
        (Mixture("temperature", temperature=2.0), [100**0.5, 10**0.5, 1000**0.5]),
        (Mixture("temperature", temperature=math.inf), [1, 1, 1]),
        (Mixture("weights", weights=(3.0, 0.0, 1.0)), [3, 0, 1]),
    ],
)
def test_realised_shares_are_those_wanted(mixture, expected):
    """At every moment, and not only at the end."""
    wanted = np.array(expected) / np.sum(expected)
    np.testing.assert_allclose(shares(SIZES, mixture), wanted)
    for seed in range(3):
        order = np.concatenate(
            draw_orders(SIZES, Mixture(**vars(mixture) | {"draws": 5000}), seed, 2)
        )
        member = tasks_of(order)[:, None] == np.arange(3)
        ahead = member.cumsum(0) - np.arange(1, 10_001)[:, None] * wanted
        assert np.abs(ahead).max() <= 3
        assert np.abs(member.mean(0) - wanted).max() < 0.01


@given(st.lists(st.integers(1, 30), min_size=2, max_size=4), st.integers(0, 9))
def test_every_task_is_walked_evenly(sizes, seed):
    """No example comes again before all others of its task came."""
    mixture = Mixture("weights", weights=tuple(float(i + 1) for i in range(len(sizes))), draws=70)
    order = np.concatenate(draw_orders(sizes, mixture, seed, 3))
    counts = np.bincount(order, minlength=sum(sizes))
    for part in np.split(counts, np.cumsum(sizes)[:-1]):
        assert part.max() - part.min() <= 1


@pytest.mark.parametrize("policy", ["concatenate", "temperature"])
def test_an_order_depends_on_the_seed_alone(policy):
    mixture = Mixture(policy, temperature=3.0, draws=100 if policy != "concatenate" else 0)
    first, second = draw_orders(SIZES, mixture, 7, 2)
    assert (first == draw_orders(SIZES, mixture, 7, 2)[0]).all()
    assert (first != draw_orders(SIZES, mixture, 8, 2)[0]).any()
    assert (first != second).any()


@pytest.mark.parametrize(
    ("sizes", "mixture", "told"),
    [
        ((3, 0), Mixture(), "task 1 .* no examples"),
        ((3, 4), Mixture("temperature", temperature=0.0), "temperature 0.0"),
        ((3, 4), Mixture("temperature", temperature=-1.0), "temperature -1.0"),
        ((3, 4), Mixture("temperature", temperature=math.nan), "temperature nan"),
        ((3, 4), Mixture("weights", weights=(1.0,)), "1 weights for 2 tasks"),
        ((3, 4), Mixture("weights", weights=(1.0, math.nan)), "nan"),
        ((3, 4), Mixture("weights", weights=(1.0, math.inf)), "inf"),
        ((3, 4), Mixture("weights", weights=(1.0, -1.0)), "-1.0"),
        ((3, 4), Mixture("weights", weights=(0.0, 0.0)), "one above 0"),
    ],
)
def test_what_is_no_mixture_is_refused(sizes, mixture, told):
    with pytest.raises(UserError, match=told):
        draw_orders(sizes, mixture, 0, 1)
