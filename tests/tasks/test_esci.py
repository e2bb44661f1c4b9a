import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data.sources import SPLITS, LocalSource, Row
from ecomjax.errors import UserError
from ecomjax.tasks.base import Example, Invalid
from ecomjax.tasks.esci import LABELS, Esci

VALUES = {
    "example_id": 3,
    "query": " red shoes ",
    "esci_label": "Exact",
    "product_title": "Red Shoe {size}",
    "product_brand": None,
    "product_color": " ",
    "product_description": "Soft.",
    "product_bullet_point": "One\nTwo",
    "product_locale": "us",
}
ANY = Example("1", {}, "Exact")


def example(task=None, **changes):
    return (task or Esci()).example(Row(VALUES | changes, "esci/test.jsonl:9"))


def test_null_and_blank_fields_are_left_out():
    assert Esci().user(example()) == "Query: red shoes\nProduct: Red Shoe {size}"
    full = example(product_brand="Acme", product_color="red")
    expected = "Query: red shoes\nProduct: Red Shoe {size}\nBrand: Acme\nColor: red"
    assert Esci().user(full) == expected


def test_description_and_bullets_are_options():
    task = Esci(description=True, bullets=True)
    assert task.user(example(task)).endswith("\nDescription: Soft.\nFeatures: One\nTwo")


def test_products_are_ranked_by_query_and_gain():
    assert example().group == example(query_id=None).group == "red shoes"
    assert example(query_id=7).group == example(query_id="7").group == "7"
    with pytest.raises(UserError, match="bad value true in column 'query_id'"):
        example(query_id=True)
    assert Esci.gains == {"Exact": 1, "Substitute": 0.1, "Complement": 0.01, "Irrelevant": 0}


def test_encoders_read_query_and_product_apart():
    found = example(product_brand="Acme")
    assert Esci().pair(found) == ("red shoes", "Product: Red Shoe {size}\nBrand: Acme")
    assert Esci().source(found) == f"classify: {Esci().user(found)}"


def test_letters_of_the_original_data_are_labels():
    assert [example(esci_label=label[0]).target for label in LABELS] == list(LABELS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"esci_label": "X"}, "bad value \"X\" in column 'esci_label': esci/test.jsonl:9"),
        ({"esci_label": None}, "bad value null in column 'esci_label'"),
        ({"query": " "}, "column 'query': esci/test.jsonl:9; it must not be blank"),
        ({"product_title": None}, "column 'product_title': .* if nothing else is known"),
        ({"product_color": 3}, "bad value 3 in column 'product_color'"),
    ],
)
def test_bad_rows(changes, message):
    with pytest.raises(UserError, match=message):
        example(**changes)


@pytest.mark.parametrize(
    "text", ["Exact", " exact.", "EXACT\nbecause", "**Exact**: all", '"Exact"', "Exact Substitute"]
)
def test_first_word_is_the_label(text):
    assert Esci().parse(text, ANY) == "Exact"


@pytest.mark.parametrize("text", ["", "...", "Exactly", "The product is Exact", "E", "12"])
def test_anything_else_is_invalid(text):
    parsed = Esci().parse(text, ANY)
    assert isinstance(parsed, Invalid) and parsed.text == text


@given(st.text())
def test_parse_never_raises(text):
    parsed = Esci().parse(text, ANY)
    assert isinstance(parsed, Invalid) or parsed in LABELS


def test_invalid_is_wrong_and_counted():
    metrics = Esci().metrics(["Exact", Invalid("?", "no word")], [example(), example()])
    assert metrics["accuracy"] == metrics["invalid_rate"] == 0.5


def test_real_rows_round_trip(shared_data):
    task = Esci(description=True, bullets=True)
    for split, size in zip(SPLITS, (2238, 411, 725), strict=True):
        examples = task.load(LocalSource(shared_data), split)
        assert len(examples) == size and all(e.group for e in examples)
        assert all(task.parse(task.answer(e), e) == e.target for e in examples)
        assert task.metrics([e.target for e in examples], examples)["macro_f1"] == 1.0
