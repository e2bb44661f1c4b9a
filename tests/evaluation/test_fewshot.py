import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data.sources import SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.errors import UserError
from ecomjax.evaluation.fewshot import Chooser, terms
from ecomjax.tasks.base import Example
from ecomjax.tasks.esci import LABELS, Esci
from ecomjax.tasks.queryner import QueryNer

TASK = Esci()
POLICIES = ("fixed", "balanced", "random", "similar")
WORDS = ("red shoe", "blue shoe", "red hat", "hat box", "oak table", "blue oak", "tea", "cup", "x")


def example(id, query, label="Exact"):
    return Example(id, {"query": query, "product_title": "thing"}, label)


TRAIN = [example(f"id{i}", words, LABELS[i % 3]) for i, words in enumerate(WORDS)]
ASKED = [example(f"new{i}", words) for i, words in enumerate(("red shoes", "a blue hat", "oak"))]


def chosen(train, shots, seed=0, policy="fixed", order="drawn", asked=ASKED):
    chooser = Chooser(TASK, train, 9, seed, policy, order)
    return {e.id: chooser.of(e, shots) for e in asked}


@pytest.mark.parametrize("policy", POLICIES)
@given(train=st.permutations(TRAIN), asked=st.permutations(ASKED), shots=st.integers(0, 9))
def test_neither_the_order_of_train_nor_that_of_requests_matters(policy, train, asked, shots):
    shown = chosen(TRAIN, shots, 3, policy)
    assert chosen(train, shots, 3, policy, asked=asked) == shown
    for each in shown.values():
        assert len({e.id for e in each}) == shots


@pytest.mark.parametrize("policy", POLICIES)
def test_fewer_shots_are_the_first_of_more(policy):
    most = chosen(TRAIN, 9, 1, policy)
    for shots in range(9):
        few = chosen(TRAIN, shots, 1, policy)
        assert few == {id: each[:shots] for id, each in most.items()}


@pytest.mark.parametrize("policy", ["fixed", "balanced", "random"])
def test_the_seed_draws_others_and_all_are_drawn(policy):
    draws = [tuple(e.id for e in chosen(TRAIN, 2, s, policy)["new0"]) for s in range(200)]
    assert len(set(draws)) > 20
    assert {id for draw in draws for id in draw} == {e.id for e in TRAIN}


def test_shared_demonstrations_are_those_of_every_example_and_random_ones_are_not():
    for policy, shared in (("fixed", True), ("balanced", True), ("random", False)):
        first, second, third = chosen(TRAIN, 4, 0, policy).values()
        assert (first == second == third) is shared
        assert Chooser(TASK, TRAIN, 4, 0, policy).shared is shared


def test_a_random_draw_finds_every_place_alike():
    """Of 9 training examples each stands first in a ninth of the draws: 3000 / 9 = 333."""
    asked = [example(f"asked{i}", "nothing alike") for i in range(3000)]
    firsts = [each[0].id for each in chosen(TRAIN, 1, 0, "random", asked=asked).values()]
    counts = [firsts.count(e.id) for e in TRAIN]
    assert sum((n - 3000 / 9) ** 2 / (3000 / 9) for n in counts) < 26.1  # p = 0.001, 8 freedoms


@given(st.integers(0, 9), st.integers(0, 99))
def test_balanced_ones_have_each_label_as_often_but_for_one(shots, seed):
    labels = [e.target for e in chosen(TRAIN, shots, seed, "balanced")["new0"]]
    counts = [labels.count(label) for label in LABELS[:3]]
    assert max(counts) - min(counts) <= 1


def test_a_label_that_runs_out_leaves_the_turns_to_the_others():
    train = [example(str(i), f"q{i}", "Exact" if i else "Irrelevant") for i in range(9)]
    labels = [e.target for e in chosen(train, 9, 0, "balanced")["new0"]]
    assert labels.index("Irrelevant") < 2 and labels.count("Exact") == 8


def test_the_most_similar_come_first_and_of_equals_the_first_id():
    shown = chosen(TRAIN, 3, 0, "similar", asked=[example("a", "red shoe box")])["a"]
    assert {shown[0].inputs["query"], shown[1].inputs["query"]} == {"red shoe", "hat box"}
    alike = [example(id, "red shoe") for id in "cab"] + TRAIN[3:]
    assert [e.id for e in chosen(alike, 3, 0, "similar")["new0"]] == ["a", "b", "c"]


@pytest.mark.parametrize("policy", POLICIES)
def test_orders(policy):
    drawn, back, mixed = (
        chosen(TRAIN, 5, 7, policy, order) for order in ("drawn", "reversed", "shuffled")
    )
    assert back == {id: each[::-1] for id, each in drawn.items()}
    assert mixed == chosen(TRAIN, 5, 7, policy, "shuffled") and mixed != drawn
    for id, each in mixed.items():
        assert sorted(e.id for e in each) == sorted(e.id for e in drawn[id])


def test_the_state_of_the_global_generator_does_not_matter():
    draws = []
    for seed in range(5):
        random.seed(seed)
        draws.append([chosen(TRAIN, 3, 0, policy, "shuffled") for policy in POLICIES])
    assert all(draw == draws[0] for draw in draws)


@pytest.mark.parametrize("policy", POLICIES)
def test_more_shots_than_examples_are_refused(policy):
    with pytest.raises(UserError, match=r"10 demonstrations of 9.*config\.fewshot\.shots"):
        Chooser(TASK, TRAIN, 10, 0, policy)


def test_labels_are_balanced_where_there_are_some():
    with pytest.raises(UserError, match=r"no labels.*queryner.*config\.fewshot\.policy"):
        Chooser(QueryNer(), [], 0, 0, "balanced")


def test_texts_without_words_are_like_no_other(monkeypatch):
    """None is asked about, or all are without; then the first id comes first."""
    monkeypatch.setattr(Esci, "user", lambda self, e: e.inputs["query"])
    signs, train = example("new", "?!"), [example("b", "-"), example("a", "red"), example("c", "*")]
    for few in (train, train[::2]):
        shown = Chooser(TASK, few, 2, 0, "similar").of(signs, 2)
        assert [e.id for e in shown] == sorted(e.id for e in few)[:2]
    shown = Chooser(TASK, train, 3, 0, "similar").of(example("new", "big c red"), 3)
    assert [e.id for e in shown] == ["a", "b", "c"]


def test_texts_written_without_blanks_are_compared_by_pairs_of_characters():
    assert terms("赤い靴 Nike靴下, größe! 犬") == ["赤い", "い靴", "nike", "靴下", "größe", "犬"]
    assert terms("スニーカー") == ["スニ", "ニー", "ーカ", "カー"] and terms("?! ") == []
    train = [example("a", "青い帽子"), example("b", "紅茶の缶"), example("c", "子供の赤い靴")]
    (shown,) = Chooser(TASK, train, 1, 0, "similar").of(example("new", "赤い靴下"), 1)
    assert shown.id == "c"


@pytest.mark.parametrize("policy", ["random", "similar"])
def test_a_demonstration_of_the_same_id_or_text_is_passed_over(policy):
    asked = [example("id4", "another"), example("new", WORDS[0]), example("id3", WORDS[1])]
    for each, clean in zip(asked, (8, 8, 7), strict=True):
        shown = chosen(TRAIN, clean, 0, policy, asked=[each])[each.id]
        assert each.id not in {e.id for e in shown}
        assert TASK.user(each) not in {TASK.user(e) for e in shown}
        with pytest.raises(UserError, match=rf"only {clean} training.*esci, example {each.id}"):
            chosen(TRAIN, clean + 1, 0, policy, asked=[each])
        assert Chooser(TASK, TRAIN, 9, 0, policy).scorable([each]) == [each]


@pytest.mark.parametrize("task", [Esci(), QueryNer()], ids=lambda task: task.name)
def test_an_example_is_left_out_by_its_id_or_by_its_text(task):
    source = SyntheticSource(0, Sizes(4, 4, 6))
    train, test = task.load(source, "train"), task.load(source, "test")
    same_text = Example("new", train[1].inputs, test[0].target)
    same_id = Example(train[2].id, test[3].inputs, test[3].target)
    asked = [same_text, *test, same_id]
    assert Chooser(task, train, 4, 0).scorable(asked) == test
    assert Chooser(task, train, 0, 0).scorable(asked) == asked
