import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data.sources import SPLITS, LocalSource, Row
from ecomjax.errors import UserError
from ecomjax.metrics.ner import lenient_entities, strict_entities
from ecomjax.tasks.base import Example, Invalid, Reading
from ecomjax.tasks.queryner import TAGS, TYPES, QueryNer

WORDS = st.one_of(
    st.text(min_size=1, max_size=8).filter(str.strip),
    st.sampled_from(["(", ")", ",", "'", '"', "(a, O)", ", O)", "(a, B-color),", "[x]", "3\"x5'"]),
)


@st.composite
def examples(draw):
    pairs = draw(st.lists(st.tuples(WORDS, st.sampled_from(TAGS)), min_size=1, max_size=6))
    tokens, tags = zip(*pairs, strict=True)
    return Example("1", {"tokens": tokens}, tags)


def example(tokens, tags):
    return QueryNer().example(
        Row({"example_id": 1, "tokens": tokens, "ner_tags": tags}, "queryner/train.jsonl:4")
    )


DUVET = example(["white", "duvet"], ["B-color", "B-core_product_type"])


def test_answer_is_tuples_of_every_token():
    assert QueryNer().answer(DUVET) == "(white, B-color), (duvet, B-core_product_type)"
    assert QueryNer().user(DUVET) == "white duvet"


@given(examples())
def test_answer_is_read_back_whatever_the_tokens_hold(example):
    assert QueryNer().parse(QueryNer().answer(example), example) == example.target


@given(st.text(), examples())
def test_parse_never_raises(text, example):
    parsed = QueryNer().parse(text, example)
    assert isinstance(parsed, Invalid) or len(parsed) == len(example.target)


@given(examples(), st.data())
def test_damaged_answers_never_raise(example, data):
    answer = QueryNer().answer(example)
    cut = data.draw(st.integers(0, len(answer)))
    text = answer[:cut] + data.draw(st.text(max_size=3)) + answer[cut + 1 :]
    parsed = QueryNer().parse(text, example)
    assert isinstance(parsed, Invalid) or set(parsed) <= set(TAGS)
    QueryNer().metrics([parsed], [example])


def spelt(form, draw):
    """A text of the form, each edge by `draw`; edges without text are gone through."""
    text, state = "", 0
    while form.states[state]:
        piece, state = draw(form.states[state])
        text += piece
    return text


@given(examples(), st.data())
def test_every_text_of_the_form_is_an_answer(example, data):
    """One well-formed tag for each token, whatever the tokens hold."""
    text = spelt(QueryNer().form(example), lambda edges: data.draw(st.sampled_from(edges)))
    tags = QueryNer().parse(text, example)
    assert not isinstance(tags, Invalid)
    assert text == QueryNer().answer(Example("1", example.inputs, tags))
    values = {"tokens": list(example.inputs["tokens"]), "ner_tags": list(tags)}
    assert QueryNer().example(Row(values, "f:1")).target == tags


def spells(form, text, state=0):
    if not form.states[state]:
        return text == ""
    return any(
        text.startswith(piece) and spells(form, text[len(piece) :], target)
        for piece, target in form.states[state]
    )


@given(examples())
def test_every_answer_is_a_text_of_the_form(example):
    tags = list(example.target)
    values = {"tokens": list(example.inputs["tokens"]), "ner_tags": tags}
    well_formed = QueryNer(repair=True).example(Row(values, "f:1"))
    assert spells(QueryNer().form(example), QueryNer().answer(well_formed))
    assert spells(QueryNer().form(example), QueryNer().answer(example)) is not well_formed.repaired


def test_the_form_of_a_token():
    """Each type begins and goes on once: what is computed of a tag serves all tags before it."""
    one, two = (QueryNer().form(example(["a"] * n, ["O"] * n)) for n in (1, 2))
    texts = [edge.text for edge in one.states[0]]
    assert texts == ["(a, O)", *(f"(a, B-{name})" for name in TYPES)]
    assert len(two.states) == 1 + (len(TYPES) + 1) + 1
    assert sum(edge.text != "" for edges in two.states for edge in edges) == 18 + 18 + 17


@pytest.mark.parametrize(
    "text",
    [
        "[('white', 'B-color'), ('duvet', 'B-core_product_type')]",
        '("white","B-color")\n("duvet","B-core_product_type")\n',
        "Here it is:\n(white, B-color)(duvet , B-core_product_type ).",
        "(White, B-color), (duvets, B-core_product_type)",
    ],
)
def test_other_ways_to_write_tuples_are_read(text):
    assert QueryNer().parse(text, DUVET) == DUVET.target


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "0 tuples for 2 tokens"),
        ("white duvet", "0 tuples for 2 tokens"),
        ("(white, color), (duvet, product)", "0 tuples for 2 tokens"),
        ("(white, B-color), (duv", "1 tuples for 2 tokens"),
        ("(white, B-color), (duvet, O), (cover, O)", "3 tuples for 2 tokens"),
        ("(white, B-colour), (duvet, O)", "unknown tag B-colour"),
    ],
)
def test_anything_else_is_invalid(text, reason):
    assert QueryNer().parse(text, DUVET) == Invalid(text, reason)


def test_long_hostile_texts_are_read_in_linear_time():
    for text in ("(" * 10**5, ", " * 10**5, "," + " " * 10**5, "(white, B-" + "x" * 10**5):
        assert isinstance(QueryNer().parse(text, DUVET), Invalid)


def test_scores_of_invalid_outputs():
    task, rows = QueryNer(), [DUVET, DUVET]
    unknown = task.parse("(white, B-color), (duvet, B-thing)", DUVET)
    metrics = task.metrics([DUVET.target, unknown], rows)
    assert metrics["invalid_rate"] == 0.5
    assert metrics["entity_f1"] == pytest.approx(2 * 2 / (2 + 4))
    # The study's scorer counts the tuples alone, so that the known tag still scores.
    assert metrics["entity_f1_all_o"] == pytest.approx(2 * 3 / (4 + 4))
    short = task.parse("(white, B-color)", DUVET)
    assert task.metrics([short], [DUVET])["entity_f1_all_o"] == 0


@pytest.mark.parametrize(
    ("tokens", "tags", "message"),
    [
        (["a", "b"], ["O"], "column 'ner_tags': queryner/train.jsonl:4; it holds 1 tags for 2"),
        (["a"], ["B-brand"], "holds 'B-brand', none of O, B-UoM"),
        (["a"], [3], "holds 3, none of"),
        (["a", "b"], ["B-color", "I-shape"], "holds 'I-shape' that continues no entity"),
        (["a"], ["I-color"], "holds 'I-color' that continues no entity"),
        ([], [], "column 'tokens': .* must be a list of texts"),
        (["a", " "], ["O", "O"], "column 'tokens'"),
        (["a", None], ["O", "O"], "column 'tokens'"),
        ("a", ["O"], "column 'tokens': .* must be of type list"),
        (["a"], None, "bad value null in column 'ner_tags'"),
    ],
)
def test_bad_rows(tokens, tags, message):
    with pytest.raises(UserError, match=message):
        example(tokens, tags)


def test_repair_begins_an_entity_with_an_orphan_and_counts_it():
    tags = ["I-color", "I-color", "O", "I-shape", "B-color", "I-shape", "I-shape"]
    mended = ("B-color", "I-color", "O", "B-shape", "B-color", "B-shape", "I-shape")
    values = {"example_id": None, "tokens": list("abcdefg"), "ner_tags": tags}
    rows = [Row(values, "f:1"), Row(values | {"ner_tags": ["O"] * 7}, "f:2")]
    report = Reading()
    first, second = QueryNer(repair=True).examples(rows, report=report)
    assert first.target == mended and first.repaired and not second.repaired
    assert report == Reading(kept=2, repaired=1)
    assert strict_entities(mended) == lenient_entities(tags)
    with pytest.raises(UserError, match="none of O"):
        QueryNer(repair=True).example(Row(values | {"ner_tags": ["I-x"] * 7}, "f:3"))
    with pytest.raises(UserError, match="6 tags for 7 tokens"):
        QueryNer(repair=True).example(Row(values | {"ner_tags": tags[1:]}, "f:3"))


@given(st.lists(st.sampled_from(TAGS), min_size=1, max_size=8))
def test_repaired_tags_are_well_formed_and_mean_what_the_default_mode_reads(tags):
    values = {"example_id": None, "tokens": ["x"] * len(tags), "ner_tags": tags}
    found = QueryNer(repair=True).example(Row(values, "f:1"))
    assert strict_entities(found.target) == lenient_entities(tags)
    assert not QueryNer().example(Row(values | {"ner_tags": list(found.target)}, "f:1")).repaired


def test_words_and_tags_stay_aligned_whatever_the_words():
    words = ["cafe\u0301", "café", "a\u2028b", "\u202eabc", "👩‍👩‍👧", "x\x00y", "½"]
    found = example(words, ["O"] * 7)
    task = QueryNer()
    assert task.words(found) == tuple(words) and len(found.target) == 7
    assert task.parse(task.answer(found), found) == found.target


def test_real_rows_round_trip(shared_data):
    task = QueryNer()
    for split, size in zip(SPLITS, (7841, 871, 510), strict=True):
        rows = task.load(LocalSource(shared_data), split)
        assert len(rows) == size
        assert all(task.parse(task.answer(row), row) == row.target for row in rows)
        metrics = task.metrics([row.target for row in rows], rows)
        assert metrics["entity_f1"] == metrics["entity_f1_all_o"] == 1.0
