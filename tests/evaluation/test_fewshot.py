import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data.sources import SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.errors import UserError
from ecomjax.evaluation.fewshot import fixed_demonstrations, without_leaks
from ecomjax.tasks.base import Example
from ecomjax.tasks.esci import Esci
from ecomjax.tasks.queryner import QueryNer

TRAIN = [
    Example(f"id{i}", {"query": f"query {i}", "product_title": "x"}, "Exact") for i in range(9)
]


@given(st.permutations(TRAIN), st.integers(0, 9), st.integers(0, 99))
def test_the_draw_does_not_depend_on_the_order_of_train(order, shots, seed):
    shown = fixed_demonstrations(TRAIN, shots, seed)
    assert fixed_demonstrations(order, shots, seed) == shown
    assert len({example.id for example in shown}) == shots


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 99))
def test_fewer_shots_are_the_first_of_more(shots, more, seed):
    few, many = sorted((shots, more))
    assert fixed_demonstrations(TRAIN, many, seed)[:few] == fixed_demonstrations(TRAIN, few, seed)


def test_the_seed_draws_others_and_all_are_drawn():
    draws = [tuple(e.id for e in fixed_demonstrations(TRAIN, 2, seed)) for seed in range(200)]
    assert len(set(draws)) > 50
    assert {id for draw in draws for id in draw} == {example.id for example in TRAIN}


def test_the_state_of_the_global_generator_does_not_matter():
    draws = []
    for seed in range(5):
        random.seed(seed)
        draws.append(fixed_demonstrations(TRAIN, 3, 0))
    assert all(draw == draws[0] for draw in draws)


def test_more_shots_than_examples_are_refused():
    with pytest.raises(UserError, match=r"10 demonstrations of 9.*config\.fewshot\.shots"):
        fixed_demonstrations(TRAIN, 10, 0)


@pytest.mark.parametrize("task", [Esci(), QueryNer()], ids=lambda task: task.name)
def test_an_example_is_left_out_by_its_id_or_by_its_text(task):
    source = SyntheticSource(0, Sizes(4, 4, 6))
    train, test = task.load(source, "train"), task.load(source, "test")
    assert without_leaks(task, test, train) == test
    same_text = Example("new", train[1].inputs, test[0].target)
    same_id = Example(train[2].id, test[3].inputs, test[3].target)
    assert without_leaks(task, [same_text, *test, same_id], train) == test
    assert without_leaks(task, [same_text, *test, same_id], ()) == [same_text, *test, same_id]
