import time
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data.sources import SPLITS, LocalSource, Row
from ecomjax.errors import UserError
from ecomjax.tasks.base import Reading, Skipped
from ecomjax.tasks.description_generation import INLINE, DescriptionGeneration, plain_text

VALUES = {
    "product_id": "B1",
    "product_title": "Red &amp; blue hat",
    "product_description": "<p>A hat for<br>all <b>sea</b>sons.</p>\n",
    "product_bullet_point": "Warm\nSoft",
    "product_brand": None,
    "product_color": " ",
    "product_locale": "us",
}
LONG = "one two three four five six"


def row(place=1, **changes):
    return Row(VALUES | changes, f"esci/train.jsonl:{place}")


def test_a_product_without_html():
    task = DescriptionGeneration()
    found = task.example(row())
    assert found.id == "B1" and found.target == ("A hat for all seasons.",)
    assert task.user(found) == "Title: Red & blue hat\nBullet points: Warm Soft"
    full = task.example(row(product_brand="Acme", product_color="red"))
    assert task.user(full).split("\n")[1:3] == ["Brand: Acme", "Color: red"]
    assert task.source(full) == f"describe: {task.user(full)}"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"product_description": None}, "no description"),
        ({"product_description": "<br> &nbsp;"}, "no description"),
        ({"product_title": " "}, "no title"),
        ({"product_bullet_point": None}, "no bullet points"),
        ({"product_description": "<b>Red</b> & blue hat"}, "description is the title"),
        ({"product_description": "Warm<br>Soft"}, "description is the bullet points"),
        ({"product_description": "a b c d"}, "title is not shorter than the description"),
        ({"product_locale": "es"}, "locale is not us"),
    ],
)
def test_rows_left_out(changes, reason):
    assert DescriptionGeneration().example(row(**changes)) == Skipped(reason)


def test_options():
    no_bullets = row(product_bullet_point=None, product_locale="es")
    found = DescriptionGeneration(bullets=False, locale="").example(no_bullets)
    assert "bullets" not in found.inputs
    assert DescriptionGeneration().example(row(product_locale=None)).id == "B1"
    both = [row(1, product_title="hat"), row(2, product_locale="es")]
    assert len(DescriptionGeneration(locale="").examples(both)) == 2


def test_a_title_is_used_once_a_reading():
    rows = [
        row(1, product_id="1", product_description="too short"),
        row(2, product_id="2"),
        row(3, product_id="3", product_title="Red <i>&</i> blue hat"),
        row(4, product_id="4", product_title="hat"),
    ]
    task = DescriptionGeneration()
    for _ in range(2):
        report = Reading()
        assert [e.id for e in task.examples(rows, report=report)] == ["2", "4"]
        assert report.skipped["title seen before"] == 1 and report.skipped.total() == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"product_title": 3}, "bad value 3 in column 'product_title': esci/train.jsonl:1"),
        ({"product_color": ["red"]}, "column 'product_color'"),
    ],
)
def test_bad_rows(changes, message):
    with pytest.raises(UserError, match=message):
        DescriptionGeneration().example(row(**changes))


class Reference(HTMLParser):
    """What the parser of the standard library makes of a document."""

    def __init__(self, text):
        super().__init__()
        self.parts = []
        self.feed(text)
        self.close()

    def handle_data(self, data):
        if self.cdata_elem is None:
            self.parts.append(data)

    def handle_starttag(self, tag, attrs):
        if tag not in INLINE:
            self.parts.append(" ")

    def handle_endtag(self, tag):
        self.handle_starttag(tag, [])


PIECES = (
    *("a", "b c", " ", "\n", "\u2028", "é", "5 < 6", "1 > 0", "<3"),
    *("<b>", "</b>", "<br/>", "<p class='x y'>", "</P>", "<li>", "</li>", "<h1>", "</h1>"),
    *("&amp;", "&lt;b&gt;", "&eacute;", "&#8212;"),
    *("<!-- a < b -->", "<script>if (a) <b></script>", "<style type='x'>p {}</style>"),
)


@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_plain_text_of_well_formed_documents_is_that_of_the_standard_parser(pieces):
    text = "".join(pieces)
    assert plain_text(text) == " ".join("".join(Reference(text).parts).split())


@given(st.text(st.characters(), max_size=40))
def test_text_without_markup_stays(text):
    if not set(text) & set("<&"):
        assert plain_text(text) == " ".join(text.split())


@pytest.mark.parametrize("piece", ["<", "<a ", "<a b='", "<!--", "<![", "<script", "</", "&", "&#"])
def test_a_million_signs_take_a_moment(piece):
    start = time.monotonic()
    plain_text(piece * (10**6 // len(piece)))
    plain_text("<" + "a" * 10**6)
    assert time.monotonic() - start < 5


def test_real_rows(shared_data):
    """Those of esci stand in."""
    task = DescriptionGeneration()
    described = {"train": 277, "validation": 33, "test": 78}
    for split in SPLITS:
        report = Reading()
        found = task.load(LocalSource(shared_data), split, report=report)
        rows = report.kept + report.skipped.total()
        assert rows - report.skipped["no description"] == described[split]
        assert len(found) == report.kept > 0.6 * described[split]
        assert not any(tag in e.target[0] for e in found for tag in ("<br", "<p>", "<li>"))
        answers = [task.parse(task.answer(e), e) for e in found[:9]]
        assert task.metrics(answers, found[:9])["rougeL"] == pytest.approx(1)
