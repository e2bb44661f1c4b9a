from collections.abc import Sequence

import pytest

from ecomjax.data.forms import one_of
from ecomjax.data.sources import Row
from ecomjax.errors import UserError
from ecomjax.tasks.base import Reading, column, identity, overlap
from ecomjax.tasks.esci import Esci
from ecomjax.tasks.instruction import Instruction
from ecomjax.tasks.queryner import QueryNer

HOSTILE = (
    "a\x00b",
    "half \ud83d pair",
    "line\u2028break",
    "\u202emirrored\u202c عربي",
    "Cafe\u0301 Café",
    "👩‍👩‍👧 emoji",
    "﻿mark",
)
"""Texts that break careless code."""


def query(text, place=1, example_id=None):
    tokens = text.split()
    values = {"example_id": example_id, "tokens": tokens, "ner_tags": ["O"] * len(tokens)}
    return Row(values, f"data/queryner/train.jsonl:{place}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "a"}, "missing column 'query': f.jsonl:3; columns present: text"),
        ({"query": None}, "bad value null in column 'query': f.jsonl:3; it must be of type str"),
        ({"query": 5}, "bad value 5 in column 'query': f.jsonl:3; it must be of type str"),
        ({"query": True}, "bad value true in column 'query'"),
    ],
)
def test_bad_column_names_row_column_and_value(values, message):
    with pytest.raises(UserError, match=message):
        column(Row(values, "f.jsonl:3"), "query", str)


def test_long_values_are_cut_in_messages():
    with pytest.raises(UserError) as error:
        column(Row({"query": ["x"] * 10**5}, "f:1"), "query", str)
    assert len(str(error.value)) < 200


def test_ids_are_given_or_digests_of_the_content():
    assert identity(query("a", example_id=7)) == "7"
    assert identity(query("a", 1)) == identity(query("a", 2)) != identity(query("b"))


def test_equal_rows_without_id_are_told_apart():
    examples = QueryNer().examples([query("a", 1), query("a", 2), query("a", 3)])
    assert len({example.id for example in examples}) == 3


def test_id_given_twice_is_an_error():
    with pytest.raises(UserError, match=r"'7' comes twice: data/queryner/train.jsonl:2"):
        QueryNer().examples([query("a", 1, 7), query("b", 2, 7)])


def test_demonstrations_come_before_the_input_in_order():
    task = QueryNer()
    first, second, asked = task.examples([query("a"), query("b c"), query("d")])
    prompt = task.prompt(asked, [first, second])
    assert prompt.turns == (("a", "(a, O)"), ("b c", "(b, O), (c, O)"))
    assert prompt.user == "d"
    assert prompt.system == task.prompt(asked).system


def test_overlap_counts_examples_of_the_first_set():
    task = QueryNer()
    ours = task.examples([query("a", 1), query("a", 2), query("b", 3)])
    assert overlap(task, ours, task.examples([query("a"), query("c")])) == 2


def test_the_form_of_labels_is_one_of_them():
    row = {"example_id": 1, "query": "q", "esci_label": "E", "product_title": "t"}
    task = Esci()
    (example,) = task.examples([Row(row | {"product_brand": None, "product_color": None}, "f:1")])
    form = task.form(example)
    assert task.has_form and form == one_of(task.labels)
    for text, _ in form.states[0]:
        assert task.parse(text, example) == text


def test_open_answers_have_no_form():
    assert not Instruction().has_form and QueryNer().has_form
    values = {"instruction": "Say.", "input": "", "output": "a"}
    (example,) = Instruction().examples([Row(values, "f:1")])
    assert Instruction().form(example) is None


def test_headlines_are_metrics():
    row = {"example_id": 1, "query": "q", "esci_label": "E", "product_title": "t"}
    esci_row = Row(row | {"product_brand": None, "product_color": None}, "f:1")
    for task, example in ((Esci(), esci_row), (QueryNer(), query("a"))):
        examples = task.examples([example])
        assert task.headline in task.metrics([examples[0].target], examples)


class Shown(QueryNer):
    """A task that leaves out what is not new."""

    name = "shown"
    once = "tokens"


def test_a_reading_counts_what_becomes_of_every_row():
    rows = [
        query("a b", 1),
        query("", 2),
        query("a b", 3),
        query("c", 4, 7),
        query("d", 5, 7),
        Row({"tokens": ["x"], "ner_tags": None}, "f:6"),
    ]
    report = Reading()
    with pytest.raises(UserError, match="column 'tokens'"):
        list(Shown().read(rows, report))
    assert report.kept == 1 and report.bad == {"bad value in column 'tokens'": 1}
    report = Reading()
    found = list(Shown().read(rows, report, "drop"))
    assert [e.inputs["tokens"] for e in found] == [("a", "b"), ("c",)]
    assert report.kept == 2 and report.skipped == {"tokens seen before": 1}
    assert report.bad == {
        "bad value in column 'tokens'": 1,
        "bad value in column 'ner_tags'": 1,
        "example_id comes twice": 1,
    }
    assert report.first_bad.startswith("bad value [] in column 'tokens'")
    assert str(report).startswith("2 examples; 1 rows skipped (1 tokens seen before); 3 rows bad")


class Broken(Sequence):
    """Rows of which, once damaged, the second cannot be read and the fourth must not be."""

    damaged = False

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1 and self.damaged:
            raise UserError("line is not JSON (at 3)", "f.jsonl:2", "write JSON")
        assert index < 3 or not self.damaged, "read ahead"
        return query("abcd"[index], index + 1)


def test_a_reading_streams_and_goes_on_after_rows_that_cannot_be_read():
    report, seen, rows = Reading(), [], Broken()
    found = QueryNer().read(rows, report, "drop", seen.append)
    rows.damaged = True  # the check of types has looked at a row
    assert [next(found).inputs["tokens"] for _ in range(2)] == [("a",), ("c",)]
    assert seen == [1, 1, 1] and report.bad == {"line is not JSON": 1}


def test_a_split_without_examples_is_told():
    class Nothing:
        name = "nothing"

        def rows(self, task, split):
            assert (task, split) == ("queryner", "test")
            return [query("")]

        def fingerprint(self, task, split):
            return ""

    with pytest.raises(UserError, match=r"no row gives an example: nothing source, queryner test"):
        QueryNer().load(Nothing(), "test", "drop")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_ids_of_hostile_rows(hostile):
    rows = [query(hostile, 1), query(hostile, 2), query("x", 3, hostile)]
    assert len({e.id for e in QueryNer().examples(rows)}) == 3


def test_mistakes_are_one_line_whatever_the_value():
    for hostile in HOSTILE:
        with pytest.raises(UserError) as error:
            Esci().example(Row({"query": "q", "product_title": [hostile]}, "f:1"))
        assert len(str(error.value).splitlines()) == 1
