import pytest

from ecomjax.data.sources import LocalSource, SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.evaluation.floors import bag_of_words, floors, majority, word_tags
from ecomjax.tasks.base import Example
from ecomjax.tasks.description_generation import DescriptionGeneration
from ecomjax.tasks.esci import Esci
from ecomjax.tasks.instruction import Instruction
from ecomjax.tasks.queryner import QueryNer
from ecomjax.tasks.review_summarization import ReviewSummarization


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


def test_bag_of_words_reads_lines_that_are_no_fields():
    """Sentences, with a colon or without one."""
    task = Instruction(score="label", labels=("yes", "no"))

    def row(text, label=None):
        return Example(text, {"instruction": "Is it good?", "input": text}, label)

    good, bad = "verdict: a lovely {}", "awful {} and nothing more: never again"
    train = [
        row(text.format(i), label) for text, label in ((good, "yes"), (bad, "no")) for i in "ab"
    ]
    asked = [row("lovely"), row("awful")]
    assert bag_of_words(task, train, asked) == ["yes", "no"]


def test_one_class_is_all_that_can_be_learnt():
    """And so is the majority of texts without words."""
    assert bag_of_words(Esci(), [pair("a", "b")] * 3, [pair("c", "d")]) == ["Exact"]
    wordless = [pair("!", "?", label) for label in ("Irrelevant", "Irrelevant", "Exact")]
    assert bag_of_words(Esci(), wordless, [pair("c", "d")]) == ["Irrelevant"]


def test_reviews_are_copied():
    task = ReviewSummarization()
    reviews = ("Good. Cheap, too.", "Bad 3.5 inch screen! Never again.", "no end")
    example = Example("1", {"reviews": reviews}, ("good",))
    assert floors(task, [], [example]) == {
        "first review": ["Good. Cheap, too."],
        "first sentence of each review": ["Good. Bad 3.5 inch screen! no end"],
    }


def test_product_fields_are_copied():
    task = DescriptionGeneration()
    full = Example("1", {"title": "hat", "bullets": "warm soft"}, ("a warm hat",))
    bare = Example("2", {"title": "cap"}, ("a cap",))
    assert floors(task, [], [full, bare]) == {
        "title": ["hat", "cap"],
        "bullet points": ["warm soft", "cap"],
    }


def test_free_text_of_ones_own_has_no_floor():
    assert floors(Instruction(), [], []) == {}


def test_real_floors_of_texts_and_instructions(shared_data):
    source = LocalSource(shared_data)
    task = ReviewSummarization()
    test = task.load(source, "test")
    for name, guesses in floors(task, [], test).items():
        metrics = task.metrics(guesses, test)
        assert 0.1 < metrics["rougeL"] < 0.3 and metrics["invalid_rate"] == 0, name
    task = Instruction("ecinstruct/product_matching", "label", ("yes", "no"))
    train, test = (task.load(source, split) for split in ("train", "test"))
    for name, guesses in floors(task, train, test).items():
        metrics = task.metrics(guesses, test)
        assert 0 < metrics["macro_f1"] < 1 and metrics["invalid_rate"] == 0, name


@pytest.mark.parametrize(
    "task",
    [Esci(), QueryNer(), ReviewSummarization(), DescriptionGeneration()],
    ids=lambda task: task.name,
)
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
