"""The official tables, generated: columns, lengths of texts and skew as in the real ones."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ecomjax.data import subsets
from ecomjax.data.esci_tables import EXAMPLES, PRODUCTS
from ecomjax.data.local import LocalSource
from ecomjax.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).resolve().parents[2]
LABELS, LABEL_SHARES = ("E", "S", "C", "I"), (0.65, 0.22, 0.03, 0.10)
LOCALES, LOCALE_SHARES = ("us", "jp", "es"), (0.67, 0.19, 0.14)
ROW_GROUP = 2**20


def write_official(folder, examples, products, seed=0):
    """Writes both tables; a query has about 20 products, and some products many queries."""
    rng = np.random.default_rng(seed)
    words = rng.integers(ord("a"), ord("z"), (5000, 7)).astype(np.uint8)
    words[:, rng.integers(2, 7, 5000)] = ord(" ")
    latin = words[rng.integers(0, 5000, 2**17)].tobytes().decode()
    pools = {"us": latin, "es": latin.replace("n", "ñ"), "jp": latin.replace("a", "靴")}
    locales = rng.choice(LOCALES, products, p=LOCALE_SHARES)

    def texts(mean, missing):
        """Texts of skewed lengths [products], some of them null."""
        lengths = np.minimum(rng.lognormal(np.log(mean), 0.8, products), 2e4).astype(int)
        starts = rng.integers(0, len(latin) - 20001, products)
        kept = rng.random(products) >= missing
        for locale, start, length, keep in zip(locales, starts, lengths, kept, strict=True):
            yield pools[locale][start : start + length] if keep else None

    fields = {
        "product_title": (90, 0.0),
        "product_description": (650, 0.48),
        "product_bullet_point": (700, 0.16),
        "product_brand": (10, 0.05),
        "product_color": (8, 0.35),
    }
    ids = np.array([f"B{number:09d}" for number in range(products)])
    columns = {name: texts(*shape) for name, shape in fields.items()}
    schema = pa.schema([(n, pa.string()) for n in ("product_id", *fields, "product_locale")])
    with pq.ParquetWriter(folder / PRODUCTS, schema) as writer:
        for start in range(0, products, ROW_GROUP):
            part = slice(start, start + ROW_GROUP)
            made = [list(itertools.islice(column, ROW_GROUP)) for column in columns.values()]
            writer.write_table(pa.table([ids[part], *made, locales[part]], schema=schema))

    queries = np.sort(rng.integers(0, max(examples // 20, 1), examples))
    chosen = (products * rng.random(examples) ** 2).astype(int)
    table = {
        "example_id": np.arange(examples),
        "query": [
            pools[locales[p]][37 * q : 37 * q + 20] + f" {q}"
            for q, p in zip(queries, chosen, strict=True)
        ],
        "query_id": queries,
        "product_id": ids[chosen],
        "product_locale": locales[chosen],
        "esci_label": rng.choice(LABELS, examples, p=LABEL_SHARES),
        "small_version": (queries % 5 < 2).astype(int),
        "large_version": np.ones(examples, int),
        "split": np.where(queries % 4 == 0, "test", "train"),
    }
    pq.write_table(pa.table(table), folder / EXAMPLES, row_group_size=ROW_GROUP)


@pytest.fixture
def official(tmp_path):
    """A data folder with small official tables."""
    (tmp_path / "data" / "esci").mkdir(parents=True)
    write_official(tmp_path / "data" / "esci", 900, 300)
    return tmp_path / "data"


def source(folder, **filters):
    return LocalSource(folder, cache=folder.parent / "cache", **filters)


def merged(folder):
    """What the authors' own code makes of the tables."""
    import pandas as pd

    examples, products = (pd.read_parquet(folder / "esci" / name) for name in (EXAMPLES, PRODUCTS))
    return examples.merge(products, on=["product_id", "product_locale"], how="left")


def plain(frame):
    """The rows of a frame as dicts, missing texts None."""
    shown = frame.drop(columns=["small_version", "large_version", "split"])
    return [
        {name: None if value != value else value for name, value in row.items()}
        for row in shown.to_dict("records")
    ]


@pytest.mark.parametrize(("version", "locale"), [("", ""), ("small", ""), ("large", "jp")])
def test_rows_are_those_of_a_merge(official, version, locale):
    data = source(official, version=version, locale=locale)
    wanted = merged(official)
    wanted = wanted[wanted[f"{version}_version"] == 1] if version else wanted
    wanted = wanted[wanted.product_locale == locale] if locale else wanted
    test = data.rows("esci", "test")
    assert [dict(row.values) for row in test] == plain(wanted[wanted.split == "test"])
    both = [*data.rows("esci", "train"), *data.rows("esci", "validation")]
    train = plain(wanted[wanted.split == "train"])
    assert sorted((row.values for row in both), key=lambda v: v["example_id"]) == train
    assert len(test) and len(both) > 50


def test_a_row_is_named_by_its_place_in_the_examples(official):
    for row in source(official).rows("esci", "test")[:20]:
        assert row.where == f"{official / 'esci' / EXAMPLES}:{row.values['example_id'] + 1}"


def test_queries_are_held_out_whole(official):
    data = source(official)
    queries = [
        {row.values["query"] for row in data.rows("esci", s)} for s in ("train", "validation")
    ]
    assert queries[1] and not queries[0] & queries[1]
    # The quick way over the column and the long way over the rows hold out the same.
    train = data._data("esci", "train").rows("train")
    assert np.array_equal(subsets.held_out(train, "query"), subsets.held_out([*train], "query"))


def test_tables_are_converted_once_and_again_when_they_change(official, capsys):
    first = source(official).rows("esci", "test")[0]
    assert "1,200 rows in" in capsys.readouterr().err
    before = source(official).fingerprint("esci", "test")
    assert source(official).rows("esci", "test")[0] == first
    assert capsys.readouterr().err == ""
    write_official(official / "esci", 900, 300, seed=1)
    assert source(official).rows("esci", "test")[0] != first
    assert "1,200 rows in" in capsys.readouterr().err
    assert source(official).fingerprint("esci", "test") != before
    prints = {source(official, locale=code).fingerprint("esci", "test") for code in ("", "us")}
    assert len(prints) == 2


def change(folder, name, alter):
    path = folder / "esci" / name
    pq.write_table(alter(pq.read_table(path)), path)


def test_a_product_that_is_missing_costs_its_rows_alone(official):
    change(official, PRODUCTS, lambda table: table.slice(1))
    rows = source(official).rows("esci", "train")
    bad = []
    for place in range(len(rows)):
        try:
            rows[place]
        except UserError as error:
            bad.append(str(error))
    assert 0 < len(bad) < len(rows) / 2
    assert "product is not in the products table" in bad[0] and "add B000000000 " in bad[0]


@pytest.mark.parametrize(
    ("name", "alter", "message"),
    [
        (
            PRODUCTS,
            lambda t: pa.concat_tables([t, t.slice(3, 1)]),
            r"'B000000003 ..' comes twice.*:301",
        ),
        (PRODUCTS, lambda t: t.drop_columns("product_locale"), "missing column 'product_locale'"),
        (EXAMPLES, lambda t: t.drop_columns("split"), "missing column 'split': .*columns present"),
    ],
)
def test_tables_that_cannot_be_joined_are_told(official, name, alter, message):
    change(official, name, alter)
    with pytest.raises(UserError, match=message):
        source(official).rows("esci", "test")


def test_a_missing_table_and_an_unknown_locale_are_told(official):
    with pytest.raises(UserError, match=r"no such examples: .*locale 'fr'"):
        source(official, locale="fr").rows("esci", "test")
    (official / "esci" / PRODUCTS).unlink()
    with pytest.raises(UserError, match=r"no such file: .*products.parquet"):
        source(official).rows("esci", "test")


WALK = """
import json, random, sys, time
start = time.monotonic()
from ecomjax.data.local import LocalSource

rows = LocalSource(sys.argv[1], cache=sys.argv[2]).rows("esci", "train")
order = list(range(len(rows)))
random.Random(0).shuffle(order)

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

first, most, characters = 0.0, 0, 0
for count, place in enumerate(order, 1):
    characters += len(rows[place].values["product_title"])
    if count == 1000:
        first = time.monotonic() - start
    if count % 1000 == 0:
        most = max(most, anonymous())
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
seconds = time.monotonic() - start
print(json.dumps(dict(rows=len(rows), first=first, most=most, peak=peak, seconds=seconds)))
"""


def walk(folder):
    """Walks the train rows in a new process: seconds, and bytes of anonymous memory."""
    command = [sys.executable, "-c", WALK, str(folder), str(folder.parent / "cache")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    print(done.stderr[-500:])
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_shuffled_epoch_takes_little_memory(tmp_path):
    """At 1/20 of the real size, the tables are 200 MB, and no part of memory grows with them."""
    (tmp_path / "data" / "esci").mkdir(parents=True)
    write_official(tmp_path / "data" / "esci", 130_000, 90_000)
    converting, reading = walk(tmp_path / "data"), walk(tmp_path / "data")
    size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.arrow"))
    assert size > 100e6
    assert reading["first"] < 10 and reading["rows"] == converting["rows"] > 80_000
    assert converting["most"] < 300e6 and reading["most"] < 200e6
