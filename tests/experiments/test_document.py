from html.parser import HTMLParser

import pytest

from ecomjax.experiments.document import (
    Code,
    Figure,
    Heading,
    Items,
    Paragraph,
    Table,
    markdown,
    page,
)

HOSTILE = "<script>alert(1)</script> | a & \"b\" 'c'\n# no heading"


class Reader(HTMLParser):
    """What a browser finds: tags, whether they are closed in order, and texts."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def figure(tmp_path):
    path = tmp_path / "figures" / "one.svg"
    path.parent.mkdir()
    path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return Figure(path, HOSTILE)


@pytest.fixture
def blocks(figure):
    """One of each kind, with a text that would be markup if it were let."""
    return [
        Heading(1, HOSTILE),
        Paragraph(HOSTILE, warning=True),
        Paragraph(HOSTILE),
        Items(((HOSTILE, HOSTILE), ("", HOSTILE))),
        Table((HOSTILE, "b"), ((HOSTILE, HOSTILE),)),
        Code(f"```\n{HOSTILE}"),
        figure,
    ]


def read(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def test_a_page_shows_texts_as_they_are_and_runs_none(blocks):
    found = read(page(blocks, HOSTILE))
    assert "script" not in found.tags and "a" not in found.tags
    # The title, and all blocks but the figure, whose text is its caption and its alternative.
    assert found.texts.count(HOSTILE) == 10
    assert ("alt", HOSTILE) in found.attributes


def test_a_page_needs_nothing_but_itself(blocks):
    text = page(blocks, "t")
    sources = [value for name, value in read(text).attributes if name in ("src", "href")]
    assert len(sources) == 1 and sources[0].startswith("data:image/svg+xml;base64,")
    assert "url(" not in text and "@import" not in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text


def test_markdown_keeps_cells_lines_and_fences_whole(blocks, tmp_path):
    text = markdown(blocks, tmp_path)
    outside, inside = text.split("````")[::2], text.split("````")[1]
    assert "<script>" not in "".join(outside) and "<script>" in inside
    assert [line for line in text.splitlines() if line.startswith("# ")][1:] == ["# no heading"]
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 3 and len({len(line) for line in table}) == 1
    assert [line.replace("\\|", "").count("|") for line in table] == [3, 3, 3]
    assert "](figures/one.svg)" in text


def test_a_table_lines_up_in_a_terminal(tmp_path):
    text = markdown([Table(("a", "long header"), (("value", "1"), ("v", "22")))], tmp_path)
    assert text.splitlines() == [
        "| a     | long header |",
        "|-------|-------------|",
        "| value | 1           |",
        "| v     | 22          |",
    ]
