import re
import struct
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from ecomjax.errors import UserError
from ecomjax.experiments.figures import heat_map

NAMES = ["esci", "queryner $5 or $6", "review-summarization/rank16-alpha32-seed1"]
TABLE = np.array([[1.0, -0.001, np.nan], [0.3, 1.0, 12.345], [0.5, 0.25, 1.0]])


def said(path):
    """The texts of an SVG, which matplotlib writes beside their outlines."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"), re.DOTALL)


def test_values_and_names_are_in_the_figure(tmp_path):
    path = tmp_path / "new" / "cosine.svg"
    heat_map(path, TABLE, NAMES, "Cosine of $deltas$", rows="adapter", columns="task")
    ElementTree.parse(path)
    texts = said(path)
    assert {"Cosine of $deltas$", "adapter", "task"} <= set(texts)
    for name in (*NAMES[:2], "review-summarization/rank16-", "alpha32-seed1"):
        assert texts.count(name) == 2, name
    cells = [text for text in texts if re.fullmatch(r"-?\d+\.\d\d", text)]
    assert sorted(cells) == sorted(
        ["1.00", "0.00", "0.30", "1.00", "12.35", "0.50", "0.25", "1.00"]
    )


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_same_numbers_give_the_same_bytes(tmp_path, suffix):
    paths = [tmp_path / f"{i}.{suffix}" for i in range(3)]
    for path, low in zip(paths, (0.0, 0.0, -1.0), strict=True):
        heat_map(path, TABLE, NAMES, "t", bounds=(low, 1.0))
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second != other
    if suffix == "png":
        assert first.startswith(b"\x89PNG\r\n") and min(struct.unpack(">II", first[16:24])) > 200
    assert sorted(tmp_path.iterdir()) == paths


def test_values_are_read_on_every_colour(tmp_path):
    """A contrast of 4.5, as WCAG asks of text."""
    import matplotlib

    table = np.linspace(0.0, 1.0, 36).reshape(6, 6)
    heat_map(tmp_path / "x.svg", table, list("abcdef"), "t", bounds=(0.0, 1.0))
    text = (tmp_path / "x.svg").read_text(encoding="utf-8")
    found = re.findall(r'<!-- (\d\.\d\d) -->\s*<g( style="fill: #ffffff")?', text)
    assert len(found) == 36 and len({white for _, white in found}) == 2
    for value, white in found:
        colour = np.array(matplotlib.colormaps["viridis"](float(value))[:3])
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        ground = linear @ [0.2126, 0.7152, 0.0722]
        contrast = 1.05 / (ground + 0.05) if white else (ground + 0.05) / 0.05
        assert contrast >= 4.4, (value, white)


def test_what_cannot_be_drawn_is_refused_and_nothing_is_lost(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    heat_map(path, TABLE, NAMES, "t")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"suffix '\.pdf'"):
        heat_map(tmp_path / "x.pdf", TABLE, NAMES, "t")
    with pytest.raises(UserError, match="no value to draw"):
        heat_map(path, np.full((3, 3), np.nan), NAMES, "t")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left"):
        heat_map(path, 2 * TABLE, NAMES, "t")
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
