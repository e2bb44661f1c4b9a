"""A report as a list of blocks, and what they look like as Markdown and as a page.

Texts are shown as they are, whatever they hold: what comes from data or models is never taken
for markup.
"""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Heading:
    """A title: 1 that of the report, 2 of a section, 3 of a part of one."""

    level: int
    text: str


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Running text; `warning` makes it stand out."""

    text: str
    warning: bool = False


@dataclasses.dataclass(frozen=True)
class Items:
    """A list, each item with what it begins with, in bold; that may be empty."""

    items: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells of text, below a header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Code:
    """Text of a program or a file, as it is."""

    text: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """An .svg file, and in words what it shows."""

    path: Path
    shows: str


Block = Heading | Paragraph | Items | Table | Code | Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1a1c20; --ground: #ffffff; --line: #c9ced6;
  --soft: #f2f4f7; --alarm: #a3160c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --ground: #15171a;
  --line: #41464e; --soft: #22262b; --alarm: #ff9b8f; } }
body { color: var(--ink); background: var(--ground); margin: 0 auto; padding: 1rem;
  max-width: 84rem; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.25; margin: 1.6em 0 0.6em; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: 0.35rem 0.6rem; text-align: left;
  vertical-align: top; overflow-wrap: normal; white-space: nowrap; }
th { background: var(--soft); white-space: normal; }
td.text { min-width: 16rem; white-space: pre-wrap; }
:is(th, td:not(.text)):first-child { position: sticky; left: 0; background: var(--soft); }
@media (max-width: 40rem) { td:not(.text):first-child { max-width: 8rem; white-space: normal; } }
pre { background: var(--soft); padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 0.3rem; }
figcaption { font-size: 0.9rem; }
.warning { color: var(--alarm); font-weight: bold; }
"""

WARNING_CLASS = ' class="warning"'

LONG_CELL = 40
"""Characters from which on a cell holds running text, and gets room for it."""


def markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The blocks as Markdown; figures are named by their places in `folder`."""
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * level} {_inline(text)}")
            case Paragraph(text, warning):
                parts.append(f"**{_inline(text)}**" if warning else _inline(text))
            case Items(items):
                told = (f"**{_inline(a)}** {_inline(b)}" if a else _inline(b) for a, b in items)
                parts.append("\n".join(f"- {line}" for line in told))
            case Table(header, rows):
                parts.append(_aligned(header, rows))
            case Code(text):
                fence = "```"
                while fence in text:
                    fence += "`"
                parts.append(f"{fence}\n{text.rstrip()}\n{fence}")
            case Figure(path, shows):
                where = path.relative_to(folder).as_posix()
                parts.append(f"![{_inline(shows)}]({where})\n\n{_inline(shows)}")
    return "\n\n".join(parts) + "\n"


def page(blocks: Sequence[Block], title: str) -> str:
    """The blocks as a page of HTML that needs no other file, figures included."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(map(_element, blocks))
        + "\n</body>\n</html>\n"
    )


def _element(block: Block) -> str:
    """A block as HTML."""
    safe = html.escape
    match block:
        case Heading(level, text):
            return f"<h{level}>{safe(text)}</h{level}>"
        case Paragraph(text, warning):
            return f"<p{WARNING_CLASS if warning else ''}>{safe(text)}</p>"
        case Items(items):
            lines = (f"<li>{f'<b>{safe(a)}</b> ' if a else ''}{safe(b)}</li>" for a, b in items)
            return f"<ul>{''.join(lines)}</ul>"
        case Table(header, rows):
            head = "".join(f"<th>{safe(cell)}</th>" for cell in header)
            body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
            return (
                f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div>"
            )
        case Code(text):
            return f"<pre>{safe(text.rstrip())}</pre>"
        case Figure(path, shows):
            # As an image it cannot run anything, and its ids stay its own.
            data = base64.b64encode(path.read_bytes()).decode()
            source = f"data:image/svg+xml;base64,{data}"
            return (
                f'<figure><img src="{source}" alt="{safe(shows)}">'
                f"<figcaption>{safe(shows)}</figcaption></figure>"
            )


def _cell(text: str) -> str:
    kind = ' class="text"' if len(text) > LONG_CELL else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _inline(text: str) -> str:
    """Text in which Markdown sees no tags, and no end of a line or of a cell."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|")


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns also line up in a terminal."""
    cells = [[_inline(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
