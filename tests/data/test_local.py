import gzip
import json

import pytest

from ecomjax.data import cache, subsets
from ecomjax.data.local import LocalSource
from ecomjax.errors import UserError

TABLE = [{"instruction": f"do {n}", "input": f"text {n}", "output": "yes"} for n in range(4)]


@pytest.fixture
def data(tmp_path):
    """A data folder with a source, and a function that writes a file there."""

    class Data:
        folder = tmp_path / "data"
        source = LocalSource(tmp_path / "data", cache=tmp_path / "cache")

        def write(self, name, content):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            return path

    return Data()


def as_lines(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_csv(rows):
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    return "\n".join(lines).encode()


def as_parquet(rows):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue().to_pybytes()


FORMS = {
    "test.jsonl": as_lines,
    "test.jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
    "test.csv": as_csv,
    "test.parquet": as_parquet,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_holds_the_same_rows(data, name, capsys):
    path = data.write(f"ecinstruct/matching/{name}", FORMS[name](TABLE))
    rows = data.source.rows("ecinstruct/matching", "test")
    assert [row.values for row in rows] == TABLE
    first = 2 if path.suffix == ".csv" else 1
    assert [row.where for row in rows] == [f"{path}:{n}" for n in range(first, first + 4)]
    told = capsys.readouterr().err
    assert ("4 rows in" in told) == (path.suffix in (".csv", ".parquet"))
    print_ = data.source.fingerprint("ecinstruct/matching", "test")
    data.source.rows("ecinstruct/matching", "test")
    assert capsys.readouterr().err == ""
    path.write_bytes(FORMS[name](TABLE[::-1]))
    changed = data.source.rows("ecinstruct/matching", "test")
    assert [row.values for row in changed] == TABLE[::-1]
    assert data.source.fingerprint("ecinstruct/matching", "test") != print_


@pytest.mark.parametrize("name", ["test.jsonl.gz", "test.csv", "test.parquet"])
def test_a_damaged_cache_is_made_anew(data, name):
    data.write(f"x/{name}", FORMS[name](TABLE))
    data.source.rows("x", "test")
    (made,) = data.source._cache.folder.rglob("rows.*")
    content = bytearray(made.read_bytes())
    content[len(content) // 2] ^= 1
    made.write_bytes(content)
    assert [row.values for row in data.source.rows("x", "test")] == TABLE


def test_a_folder_of_products_is_a_split(data):
    raw = {"website_summaries": [{"verdict": "good", "pros": [], "cons": []}]}
    for number in (2, 1):
        data.write(f"review_summarization/test/B{number}.json", json.dumps(raw).encode())
    rows = data.source.rows("review_summarization", "test")
    assert [row.values for row in rows] == [
        {"example_id": "B1", **raw},
        {"example_id": "B2", **raw},
    ]
    before = data.source.fingerprint("review_summarization", "test")
    data.write("review_summarization/test/B2.json", b"{}")
    assert data.source.fingerprint("review_summarization", "test") != before


def test_what_is_missing_is_named_with_what_is_there(data, tmp_path):
    with pytest.raises(UserError, match=r"no such folder: .*nowhere; data is read from <folder>/"):
        LocalSource(tmp_path / "nowhere").rows("esci", "train")
    data.write("esci/test.jsonl", b"{}")
    with pytest.raises(UserError, match=r"no such folder: .*queryner; .* present in .*: esci"):
        data.source.rows("queryner", "train")
    for split in ("train", "validation"):
        match = rf"no such file: .*{split}.jsonl; present in .*: test.jsonl"
        with pytest.raises(UserError, match=match):
            data.source.rows("esci", split)
    with pytest.raises(UserError, match=r"unknown split 'dev': local; known: test, train"):
        data.source.rows("esci", "dev")
    data.write("esci/test.csv", b"a")
    with pytest.raises(UserError, match=r"split in 2 forms: .*test.jsonl, test.csv; keep one"):
        data.source.rows("esci", "test")


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_file_without_rows_is_an_error(data, form):
    data.write(f"x/test.{form}", b"\n \n" if form == "jsonl" else b"a,b\n")
    if form == "parquet":
        data.write("x/test.parquet", as_parquet([{"a": "x"}]))
        pq = pytest.importorskip("pyarrow.parquet")
        pq.write_table(
            pq.read_table(data.folder / "x/test.parquet")[:0], data.folder / "x/test.parquet"
        )
    with pytest.raises(UserError, match="file holds no rows"):
        data.source.rows("x", "test")


@pytest.mark.parametrize("name", ["", ".", "..", "../other", "a/../../other", "/etc"])
def test_no_name_leads_out_of_the_folder(data, tmp_path, name):
    data.write("a/test.jsonl", b"{}\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test.jsonl").write_bytes(b"{}\n")
    with pytest.raises(UserError, match="path leaves the data folder"):
        data.source.rows(name, "test")


@pytest.mark.parametrize("linked", ["a", "a/test.jsonl", "a/test"])
def test_no_link_leads_out_of_the_folder(data, tmp_path, linked):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test.jsonl").write_bytes(b"{}\n")
    target = tmp_path / "other" / ("test.jsonl" if linked.endswith("jsonl") else "")
    (data.folder / linked).parent.mkdir(parents=True)
    (data.folder / linked).symlink_to(target)
    with pytest.raises(UserError, match="path leaves the data folder"):
        data.source.rows("a", "test")


def test_no_file_of_a_folder_is_a_link_out_of_it(data, tmp_path):
    (tmp_path / "secret.json").write_text('{"a": 1}', encoding="utf-8")
    data.write("a/test/B1.json", b"{}")
    (data.folder / "a/test/B2.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UserError, match=r"link to another folder: .*B2.json"):
        data.source.rows("a", "test")[1]


def test_links_within_the_folder_are_followed(data):
    data.write("real/test.jsonl", b'{"a": 1}\n')
    (data.folder / "alias").symlink_to(data.folder / "real")
    assert data.source.rows("alias", "test")[0].values == {"a": 1}


def test_descriptions_are_read_from_esci_unless_they_have_their_own(data):
    for split in ("train", "test"):
        products = [{"query": f"q{n}", "product_id": f"B{n % 40}"} for n in range(200)]
        data.write(f"esci/{split}.jsonl", as_lines(products))
    name = "description_generation"
    assert [row.values for row in data.source.rows(name, "test")] == products
    ids = [
        {row.values["product_id"] for row in data.source.rows(name, s)}
        for s in ("train", "validation")
    ]
    assert ids[1] and not ids[0] & ids[1]
    data.write(f"{name}/test.jsonl", b'{"own": 1}\n')
    assert data.source.rows(name, "test")[0].values == {"own": 1}


def test_the_rest_of_train_says_where_it_stands(data):
    path = data.write("x/train.jsonl", as_lines([{"a": n} for n in range(100)]))
    data.write("x/test.jsonl", b"{}\n")
    train, validation = (data.source.rows("x", split) for split in ("train", "validation"))
    for rows in (train, validation):
        assert all(row.where == f"{path}:{row.values['a'] + 1}" for row in rows)
    assert len(train) + len(validation) == 100 and len(validation) > 3
    assert validation[-1] == validation[len(validation) - 1]


def test_filters_are_for_the_official_tables(data):
    data.write("esci/test.jsonl", b"{}\n")
    filtered = LocalSource(data.folder, version="small")
    for name in ("esci", "description_generation"):
        with pytest.raises(UserError, match="columns of the official tables alone"):
            filtered.rows(name, "test")
    for name in ("queryner", "description_generation"):
        data.write(f"{name}/test.jsonl", b"{}\n")
        assert len(filtered.rows(name, "test")) == 1


def test_rows_larger_than_any_bound_of_text_keep_their_neighbours(data, monkeypatch):
    """A bomb in one split neither fills the disk nor hides the others."""
    monkeypatch.setattr(cache, "GROWTH_FREE", 2**20)
    data.write("x/test.jsonl", b"{}\n")
    data.write("x/train.jsonl.gz", gzip.compress(bytes(2**25)))
    data.write("x/validation.jsonl", b"{}\n")
    with pytest.raises(UserError, match="file holds more than 100 times its size"):
        data.source.rows("x", "train")
    assert len(data.source.rows("x", "test")) == 1
    assert not list(data.source._cache.folder.rglob("rows.*"))


def test_held_out_rows_do_not_depend_on_the_form(data, monkeypatch):
    monkeypatch.setattr(subsets, "HELD_OUT", 2)
    rows = [{"instruction": "do", "input": f"text {n}", "output": "yes"} for n in range(50)]
    for form in ("jsonl", "csv", "parquet"):
        data.write(f"{form}/train.{form}", FORMS[f"test.{form}"](rows))
    first, *others = (
        [row.values for row in data.source.rows(form, "train")]
        for form in ("jsonl", "csv", "parquet")
    )
    assert 10 < len(first) < 40 and all(first == other for other in others)
