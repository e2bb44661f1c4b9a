import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data.sources import LocalSource, Row
from ecomjax.errors import UserError
from ecomjax.tasks.base import Invalid, Prompt, Reading
from ecomjax.tasks.instruction import Instruction

VALUES = {"instruction": " Same product? ", "input": " a and b ", "output": " Yes\n"}
YES_NO = Instruction("shop/matching", "label", ("yes", "no"))
LETTERS = Instruction("letters", "label", ("A", "A+", "C++", "B (or A)"))
ATTRIBUTES = json.dumps(
    [
        {"attribute": "Brand", "value": "Acme", "source": "title"},
        {"attribute": "Size", "value": None, "source": None},
    ]
)


def example(task=YES_NO, **changes):
    return task.example(Row(VALUES | changes, "matching/train.jsonl:2"))


def test_name_and_data():
    assert (YES_NO.name, YES_NO.data, YES_NO.labels) == ("matching", "shop/matching", ("yes", "no"))
    assert Instruction().name == Instruction().data == "instruction"
    assert Instruction().labels is None


def test_the_instruction_of_a_row_is_the_system_text():
    found = example()
    assert YES_NO.prompt(found) == Prompt("Same product?", (), "a and b")
    assert YES_NO.source(found) == "Same product?\na and b"
    assert YES_NO.pair(found) == ("Same product?", "a and b")
    assert Instruction().pair(example(Instruction())) is None


def test_without_input_the_instruction_is_the_message():
    task = Instruction()
    for blank in (None, " "):
        found = example(task, input=blank)
        assert task.prompt(found) == Prompt(task.system, (), "Same product?")
        assert task.source(found) == "Same product?"


def test_demonstrations_with_another_instruction_state_it():
    other = example(instruction="Else?", input="c", output="no")
    prompt = YES_NO.prompt(example(), [example(input="d"), other])
    assert prompt.turns == (("d", "yes"), ("Else?\nc", "no"))


@pytest.mark.parametrize("text", ["yes", " Yes.", "**YES**", "yes, since", "Yes\nno", '"yes"'])
def test_labels(text):
    assert YES_NO.parse(text, example()) == "yes"


@pytest.mark.parametrize("text", ["", "yesterday", "yes it is", "The answer is yes", "?", "y"])
def test_anything_else_is_no_label(text):
    assert YES_NO.parse(text, example()) == Invalid(text, "begins with no label")


@pytest.mark.parametrize(
    ("text", "label"),
    [("a", "A"), ("(A)", "A"), ("A+", "A+"), ("c++: fast", "C++"), ("B (or a).", "B (or A)")],
)
def test_labels_that_begin_others_or_hold_signs(text, label):
    assert LETTERS.parse(text, example()) == label


def test_label_scores():
    metrics = YES_NO.metrics(["yes", Invalid("?", "")], [example(), example(output="no")])
    assert metrics["accuracy"] == metrics["invalid_rate"] == 0.5


def test_free_text():
    task = Instruction("answers", "rouge")
    found = example(task, output="It is red.")
    assert found.target == ("It is red.",) and task.answer(found) == "It is red."
    assert task.headline == "rougeL"
    metrics = task.metrics([task.parse(" it is red ", found), task.parse(" ", found)], [found] * 2)
    assert metrics["rougeL"] == metrics["invalid_rate"] == 0.5


TUPLES = "(white, B-color), (duvet, B-type), (cover, I-type)"


def test_entities_of_tuples():
    task = Instruction("tags", "ner")
    found = example(task, output=TUPLES)
    assert task.answer(found) == TUPLES and task.headline == "entity_f1"
    right = task.parse("[('White', 'B-color')('duvet', 'B-type')('x', 'I-type')]", found)
    half = task.parse("(white, B-color), (duvet, B-type), (cover, O)", found)
    assert task.metrics([right], [found])["entity_f1"] == 1
    metrics = task.metrics([right, half, Invalid("", "")], [found] * 3)
    assert metrics["entity_f1"] == pytest.approx(2 * 3 / (4 + 6))
    assert metrics["entity_precision"] == 3 / 4 and metrics["entity_recall"] == 3 / 6
    assert metrics["invalid_rate"] == pytest.approx(1 / 3)
    assert task.parse("(white, B-color)", found) == Invalid("(white, B-color)", "1 tuples for 3")
    assert isinstance(task.parse(ATTRIBUTES, found), Invalid)


def test_entities_of_attributes():
    task = Instruction("attributes", "ner")
    found = example(task, output=ATTRIBUTES)
    other = json.loads(ATTRIBUTES)
    other[0]["source"] = "description"
    guesses = [task.parse(text, found) for text in (f" {ATTRIBUTES}", json.dumps(other), "[]")]
    assert task.metrics(guesses[:1], [found])["entity_f1"] == 1
    assert task.metrics(guesses[1:2], [found])["entity_f1"] == 0.5
    assert task.metrics(guesses[2:], [found]) == {
        "entity_f1": 0,
        "entity_precision": 0,
        "entity_recall": 0,
        "invalid_rate": 0,
    }
    for text in (ATTRIBUTES[:-1], "{}", '[{"attribute": "x"}]', "[3]", "3", TUPLES, "[" * 10**5):
        assert task.parse(text, found) == Invalid(text, "no list of attributes")


@given(st.text(st.characters(), max_size=30))
def test_parse_never_raises(text):
    for task, output in (
        (YES_NO, "yes"),
        (LETTERS, "A"),
        (Instruction(), "x"),
        (Instruction("a", "ner"), TUPLES),
        (Instruction("a", "ner"), ATTRIBUTES),
    ):
        found = example(task, output=output)
        for said in (text, output[:5] + text, text + output, output + text):
            task.metrics([task.parse(said, found)], [found])


def test_long_hostile_texts_are_read_in_linear_time():
    found = example(LETTERS, output="A")
    for text in ("\n" * 10**6, "(" * 10**6, "B (or" * 10**5, "A" + " " * 10**6 + "x", "C+" * 10**5):
        assert isinstance(LETTERS.parse(text, found), Invalid)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (YES_NO, {"output": "maybe"}, "column 'output': matching/train.jsonl:2; it must be one of"),
        (YES_NO, {"output": ""}, "column 'output': .* must not be blank"),
        (YES_NO, {"instruction": " "}, "column 'instruction': .* must not be blank"),
        (YES_NO, {"input": 3}, "bad value 3 in column 'input'"),
        (Instruction("a", "ner"), {"output": "none"}, r"must be \(token, TAG\) tuples or a JSON"),
    ],
)
def test_bad_rows(task, changes, message):
    with pytest.raises(UserError, match=message):
        example(task, **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "bleu"}, "unknown score 'bleu': task instruction; known: label, rouge, ner"),
        ({"score": "label"}, "0 labels for the score label"),
        ({"labels": ("a",)}, "1 labels for the score rouge"),
        ({"score": "label", "labels": ("a", "a")}, "none blank, none twice"),
        ({"score": "label", "labels": ("a", " ")}, "none blank, none twice"),
        ({"score": "label", "labels": (1, 0)}, "give texts, none blank, none twice"),
        ({"data": "../secrets"}, "bad data name '../secrets'"),
        ({"data": ""}, "bad data name ''"),
        ({"data": "a//b"}, "bad data name 'a//b'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        Instruction(**options)


REAL = {
    "product_matching": (("yes", "no"), 291, 68),
    "product_relation_prediction": (("A", "B", "C"), 1296, 322),
    "product_substitute_identification": (("yes", "no"), 1281, 318),
}


@pytest.mark.parametrize("name", REAL)
def test_real_rows(shared_data, name):
    labels, train, test = REAL[name]
    task, source = Instruction(f"ecinstruct/{name}", "label", labels), LocalSource(shared_data)
    report = Reading()
    # There is no validation split: it is held out from train.
    rows = [e for split in ("train", "validation") for e in task.load(source, split, report=report)]
    assert report == Reading(kept=train)
    rows += task.load(source, "test")
    assert len(rows) == train + test
    answers = [task.parse(task.answer(e), e) for e in rows]
    assert task.metrics(answers, rows)["accuracy"] == 1
