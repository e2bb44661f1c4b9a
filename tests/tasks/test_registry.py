import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data.sources import Row
from ecomjax.errors import UserError
from ecomjax.metrics import classification
from ecomjax.tasks import registry
from ecomjax.tasks.base import Example, Invalid, Prompt, Task, column, identity
from ecomjax.tasks.registry import TASKS, get_task


def test_tasks_by_name():
    for name in TASKS:
        assert get_task(name).name == get_task(name).data == name
    assert "product_description" in get_task("esci", description=True).shown


def test_unknown_names_list_the_known():
    with pytest.raises(UserError, match=r"unknown task 'esic'.*known: description_.*esci, inst"):
        get_task("esic")
    with pytest.raises(UserError, match="unknown option 'x': task esci; known: description"):
        get_task("esci", x=1)
    with pytest.raises(UserError, match="unknown option 'x': task queryner; known: repair"):
        get_task("queryner", x=1)


class Polarity(Task):
    """All that a task of one's own needs: this class, and its place in the registry."""

    name = "polarity"
    headline = "accuracy"
    labels = ("good", "bad")
    system = "Is the review good or bad?"

    def example(self, row):
        return Example(identity(row), {"text": column(row, "text", str)}, column(row, "gold", str))

    def user(self, example):
        return example.inputs["text"]

    def answer(self, example):
        return example.target

    def parse(self, text, example):
        return text if text in self.labels else Invalid(text, "no label")

    def statistics(self, predictions, examples):
        guesses = [None if isinstance(guess, Invalid) else guess for guess in predictions]
        return classification.statistics([e.target for e in examples], guesses, self.labels)

    def summarize(self, totals):
        return classification.summarize(totals, self.labels)


def test_a_task_of_ones_own(monkeypatch):
    monkeypatch.setitem(registry.TASKS, "polarity", Polarity)
    task = get_task("polarity")
    assert task.data == "polarity"
    first, second = task.examples([Row({"text": t, "gold": "good"}, "f:1") for t in "ab"])
    assert task.prompt(second, [first]) == Prompt(task.system, (("a", "good"),), "b")
    assert task.metrics(["good", task.parse("?", second)], [first, second])["accuracy"] == 0.5
    assert task.source(first) == "a" and task.pair(first) is None and task.words(first) is None


TEXTS = st.one_of(
    st.text(st.characters(), min_size=1, max_size=20),
    st.sampled_from(
        ["\x00", "\ud83d", "a\u2028b", "\u202eabc\u202c", "e\u0301", "👩‍👩‍👧", "﻿x", "{x}", "<", "&"]
    ),
)


def rows(text):
    """A row of every task that holds a text wherever it may."""
    product = {f"product_{name}": text for name in ("title", "brand", "color", "bullet_point")}
    product |= {"product_description": text and f"{text} {text} " * 3 + text, "query": text}
    return {
        "esci": product | {"example_id": text, "query_id": text, "esci_label": "E"},
        "queryner": {"tokens": [text, "x", text], "ner_tags": ["O", "B-color", "I-color"]},
        "review_summarization": {"reviews": [text], "summaries": [text], "product_id": text},
        "description_generation": product | {"product_id": text},
        "instruction": {"instruction": text, "input": text, "output": text},
    }


@pytest.mark.parametrize("name", TASKS)
@given(text=TEXTS, said=TEXTS)
def test_no_text_breaks_a_task(name, text, said):
    task = get_task(name)
    row = Row(rows(text)[name], "f.jsonl:1")
    try:
        example = task.example(row)
    except UserError as error:
        assert not text.strip() and len(str(error).splitlines()) == 1
        return
    if not isinstance(example, Example):
        return
    prompt = task.prompt(example, [example])
    assert all(isinstance(part, str) for part in (prompt.system, prompt.user, *prompt.turns[0]))
    assert task.user(example) in task.source(example)
    for given_back in (task.pair(example), task.words(example)):
        assert given_back is None or all(isinstance(part, str) for part in given_back)
    assert len(task.words(example) or ()) == (len(example.target) if task.tags else 0)
    right = task.parse(task.answer(example), example)
    assert not isinstance(right, Invalid)
    for output in (said, task.answer(example) + said, said + task.answer(example)):
        task.metrics([task.parse(output, example)], [example])


class Fixed:
    """A source of one row."""

    name = "fixed"

    def __init__(self, values):
        self.values = values

    def rows(self, task, split):
        return [Row(self.values, "f:1")]

    def fingerprint(self, task, split):
        return ""


@pytest.mark.parametrize("name", TASKS)
def test_blank_rows_are_told(name):
    skipped = name == "description_generation"
    message = r"no row gives an example: .*no desc" if skipped else r"column '\w+': f:1; it must"
    with pytest.raises(UserError, match=message):
        get_task(name).load(Fixed(rows(" ")[name]), "train")
