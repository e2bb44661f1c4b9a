"""Figures of a study, the same bytes from the same numbers."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ecomjax.errors import UserError
from ecomjax.experiments.files import write_bytes

CELL = 0.55
"""Inches."""

MARKERS = "osD^vPX*"
"""Of lines, so that colour is not all that tells them apart."""

NAME_WIDTH = 28
"""Characters of a name on one line, where it can be broken."""

EQUAL_CONTRAST = 0.179
"""Luminance of a ground on which black and white are read equally well."""


def heat_map(
    path: Path,
    table: Float[np.ndarray, "A A"],
    names: Sequence[str],
    title: str,
    *,
    rows: str = "",
    columns: str = "",
    bounds: tuple[float, float] | None = None,
) -> None:
    """Writes a table between adapters as coloured cells with their values.

    Args:
        path: ends in .png or .svg.
        table: NaN where there is no value.
        names: of the rows, which are those of the columns.
        title: of the figure.
        rows: what the rows are, such as "adapter"; "" for nothing.
        columns: what the columns are.
        bounds: values of the first and the last colour; by default the least and the largest.

    Raises:
        UserError: another suffix, no value in the table, or a file that cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_suffix(path)
    if not np.isfinite(table).any():
        raise UserError("no value to draw", str(path), "leave the figure out")
    low, high = bounds or (float(np.nanmin(table)), float(np.nanmax(table)))
    labels = [_broken(name) for name in names]
    places = range(len(names))
    figure = Figure((CELL * len(names) + 1.5, CELL * len(names) + 1.0))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.85")
    image = axes.imshow(table, cmap=colours, vmin=low, vmax=high)
    # Names are no formulas, though they may hold dollar signs.
    axes.set_yticks(places, labels, parse_math=False)
    axes.set_xticks(places, labels, parse_math=False, rotation=90)
    axes.set_title(title, parse_math=False)
    axes.set_ylabel(rows, parse_math=False)
    axes.set_xlabel(columns, parse_math=False)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            dark = _luminance(np.asarray(image.to_rgba(value))[:3]) < EQUAL_CONTRAST
            text = f"{round(float(value), 2) + 0.0:.2f}"
            axes.text(
                column, row, text, ha="center", va="center", size=8, color="w" if dark else "k"
            )
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.04)
    _save(figure, path)


def line_chart(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],
    title: str,
    *,
    x: str,
    y: str,
    logarithmic: bool = False,
) -> None:
    """Writes lines with their intervals, each marked in its own way.

    Args:
        path: ends in .png or .svg.
        series: by name the points (x, value, low, high) of a line, in the order of x.
        title: of the figure.
        x: what is on the horizontal axis.
        y: what is on the vertical axis.
        logarithmic: whether both axes are, where all of a line is above zero.

    Raises:
        UserError: another suffix, no point, or a file that cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    check_suffix(path)
    if not any(series.values()):
        raise UserError("no value to draw", str(path), "leave the figure out")
    figure = Figure((6.4, 4.0))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (name, points) in enumerate(series.items()):
        places, values, low, high = np.array(points, np.float64).reshape(-1, 4).T
        marker, colour = MARKERS[place % len(MARKERS)], f"C{place % 10}"
        axes.plot(places, values, color=colour, marker=marker, label=_plain(name))
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_title(title, parse_math=False)
    axes.set_xlabel(x, parse_math=False)
    axes.set_ylabel(y, parse_math=False)
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def _plain(name: str) -> str:
    """A name that a legend takes for no formula, and for no line to be left out."""
    return name.replace("$", r"\$").lstrip("_")


def check_suffix(path: Path) -> None:
    """UserError unless a figure can be written by such a name."""
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"suffix '{path.suffix}'", str(path), "write a .png or an .svg")


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    written = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ecomjax"}):
        figure.savefig(
            written,
            format=path.suffix[1:],
            dpi=150,
            bbox_inches="tight",
            metadata={"Date": None} if path.suffix == ".svg" else {"Software": None},
        )
    write_bytes(path, written.getvalue())


def _broken(name: str) -> str:
    """A long name on several lines, broken between its words only."""
    lines = [""]
    for part in re.findall(r"[^\W_]+[\W_]*|[\W_]+", name):
        if lines[-1] and len(lines[-1] + part) > NAME_WIDTH:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _luminance(colour: Float[np.ndarray, "3"]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2)."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
