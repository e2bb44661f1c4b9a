import pytest

from ecomjax.data.sources import LocalSource, SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.evaluation.floors import bag_of_words, floors, majority, word_tags
from ecomjax.tasks.base import Example
from ecomjax.tasks.esci import Esci
from ecomjax.tasks.queryner import QueryNer


def query(tokens, tags=""):
    tokens = tuple(tokens.split())
    return Example(tokens[0], {"tokens": tokens}, tuple(tags.split()) or ("O",) * len(tokens))


def pair(query, title, label="Exact"):
    return Example(query, {"query": query, "product_title": title}, label)


def test_majority_breaks_ties_by_name():
    train = [pair("a", "b", label) for label in ("Substitute", "Exact", "Exact", "Substitute")]
    assert majority(Esci(), train, train[:2]) == ["Exact", "Exact"]


def test_word_tags_ignore_position_and_case():
    train = [
        query("red shoe", "B-color B-core_product_type"),
        query("Red red Hat", "B-color B-creator B-modifier"),
        query("shoe boot", "B-core_product_type B-core_product_type"),
    ]
    tags = word_tags(QueryNer(), train, [query("shoe RED hat unseen", "O O O O")])
    assert tags == [("B-core_product_type", "B-color", "B-modifier", "B-core_product_type")]


def test_bag_of_words_learns_words_by_field():
    train = [pair("red", "x blue", "Exact"), pair("blue", "x red", "Irrelevant")] * 5
    asked = [pair("red", "new blue"), pair("blue", "new red")]
    assert bag_of_words(Esci(), train, asked) == ["Exact", "Irrelevant"]


@pytest.mark.parametrize("task", [Esci(), QueryNer()], ids=lambda task: task.name)
def test_floors_score_through_the_statistics_of_the_task(task):
    source = SyntheticSource(0, Sizes(60, 10, 20))
    train, test = task.load(source, "train"), task.load(source, "test")
    predictions = floors(task, train, test)
    assert predictions
    for name, guesses in predictions.items():
        metrics = task.metrics(guesses, test)
        assert metrics["invalid_rate"] == 0, name
        assert 0 < metrics[task.headline] < 1, name


def test_real_esci_bag_of_words_beats_the_majority(shared_data):
    task, source = Esci(), LocalSource(shared_data)
    train, test = task.load(source, "train")[::3], task.load(source, "validation")
    scores = {
        name: task.metrics(guesses, test)["macro_f1"]
        for name, guesses in floors(task, train, test).items()
    }
    assert scores["majority class"] < scores["bag of words"]
