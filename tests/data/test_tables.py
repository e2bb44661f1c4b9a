import csv
import datetime
import io
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ecomjax.data import cache, tables
from ecomjax.data.rows import LONGEST_ROW
from ecomjax.data.tables import ArrowRows, csv_batches, parquet_batches, write
from ecomjax.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def rows_of(tmp_path):
    """Function (table, or bytes of a csv file) -> its rows, read from an Arrow file."""

    def make(content, **options):
        if isinstance(content, bytes):
            path, batches = tmp_path / "x.csv", csv_batches
            path.write_bytes(content)
        else:
            path, batches = tmp_path / "x.parquet", parquet_batches
            pq.write_table(content, path, **options)
        count = write(tmp_path / "x.arrow", batches(path), path)
        rows = ArrowRows(tmp_path / "x.arrow", str(path))
        assert len(rows) == count
        return rows

    return make


def values(rows):
    return [row.values for row in rows]


class TestParquet:
    def test_every_kind_of_value_comes_back(self, rows_of, monkeypatch):
        monkeypatch.setattr(tables, "BATCH", 3)
        given = [
            {
                "number": n,
                "text": "שלום 👟 e\u0301 \u2028\x00" if n % 2 else None,
                "tokens": ["red", "shoe"][: n % 3],
                "deep": {"a": [1.5, None]},
                "when": datetime.date(2020, 1, 1),
            }
            for n in range(20)
        ]
        rows = rows_of(pa.Table.from_pylist(given), row_group_size=7)
        assert values(rows) == given
        assert rows[-1].where.endswith("x.parquet:20") and values(rows[3:5]) == given[3:5]
        assert pickle.loads(pickle.dumps(rows))[11] == rows[11]

    def test_dictionaries_and_wide_texts_are_plain_texts(self, rows_of):
        wide = pa.array(["a", None, "b"], pa.large_string())
        coded = [pa.array(part).dictionary_encode() for part in (["x", "y"], ["z"])]
        rows = rows_of(pa.table({"wide": wide, "coded": pa.chunked_array(coded)}), row_group_size=2)
        assert [tuple(row.values.values()) for row in rows] == [("a", "x"), (None, "y"), ("b", "z")]

    def test_a_text_that_is_not_utf8_costs_its_row_alone(self, rows_of):
        texts = pa.array([b"ok", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
        rows = rows_of(pa.table({"a": texts}))
        with pytest.raises(UserError, match=r"column 'a' is not UTF-8 \(byte 1 is 0xff\): .*:2"):
            rows[1]
        assert values([rows[0], rows[2]]) == [{"a": "ok"}, {"a": "fine"}]

    def test_a_value_without_an_equal_in_python_costs_its_row_alone(self, rows_of):
        times = pa.array([0, 2**60], pa.timestamp("ms"))
        rows = rows_of(pa.table({"a": times}))
        with pytest.raises(UserError, match=r"value in column 'a' cannot be read .*x.parquet:2"):
            rows[1]
        assert rows[0].values["a"].year == 1970

    @pytest.mark.parametrize("harm", [lambda b: b[:-50], lambda b: b"", lambda b: b"query,label\n"])
    def test_what_is_no_parquet_file_is_told(self, tmp_path, harm):
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"a": ["x"] * 100}), path)
        path.write_bytes(harm(path.read_bytes()))
        with pytest.raises(UserError, match=r"parquet file cannot be read .*x.parquet"):
            list(parquet_batches(path))

    def test_a_damaged_page_is_told(self, tmp_path):
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"a": [f"text {n}" for n in range(1000)]}), path)
        content = bytearray(path.read_bytes())
        content[20:400] = b"\xff" * 380
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"parquet file cannot be read .*x.parquet"):
            list(parquet_batches(path))

    def test_a_bomb_is_defused(self, rows_of, monkeypatch):
        monkeypatch.setattr(cache, "GROWTH_FREE", 2**20)
        with pytest.raises(UserError, match="file holds more than 100 times its size"):
            rows_of(pa.table({"a": ["x" * 10**4] * 4000}))

    def test_columns_of_one_name_are_told(self, rows_of):
        with pytest.raises(UserError, match="columns of one name"):
            rows_of(pa.table([["x"], ["y"]], names=["a", "a"]))

    @pytest.mark.slow
    def test_one_row_group_is_read_in_bounded_memory(self, tmp_path):
        """400 MB of text in one row group: pyarrow would otherwise decode it at once."""
        path = tmp_path / "x.parquet"
        texts = [f"{n} " * 700 for n in range(100_000)]
        options = {"use_dictionary": False, "compression": "none"}
        pq.write_table(pa.table({"a": texts}), path, row_group_size=10**6, **options)
        del texts
        pa.default_memory_pool().release_unused()
        before = pa.total_allocated_bytes()
        most = 0
        for batch in parquet_batches(path):
            most = max(most, pa.total_allocated_bytes() - before)
            del batch
        assert most < 100e6


class TestCsv:
    def test_cells_are_text_and_empty_ones_null(self, rows_of):
        rows = rows_of('\ufeffid,"a ""b""",c\r\n1,"x,\ny",\r\n\r\n007,שלום 👟\u2028,z'.encode())
        assert values(rows) == [
            {"id": "1", 'a "b"': "x,\ny", "c": None},
            {"id": "007", 'a "b"': "שלום 👟\u2028", "c": "z"},
        ]
        assert [row.where.rpartition(":")[2] for row in rows] == ["2", "5"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"1", "row of 1 cells under a header of 2"),
            (b"1,2,3", "row of 3 cells under a header of 2"),
            (b"1,\xe9", r"row is not UTF-8 \(a byte is 0xe9\)"),
            (b"1,\x002", "row holds NUL"),
            (b'1,"a"b', "row is not csv .*expected after"),
        ],
    )
    def test_a_bad_line_is_named_and_leaves_the_others_alone(self, rows_of, line, message):
        rows = rows_of(b"a,b\n0,0\n" + line + b"\n2,2\n")
        with pytest.raises(UserError, match=message + r".*x.csv:3; mend the row"):
            rows[1]
        assert values([rows[0], rows[2]]) == [{"a": "0", "b": "0"}, {"a": "2", "b": "2"}]

    def test_an_open_quote_says_how_far_it_reaches(self, rows_of):
        rows = rows_of(b'a,b\n0,0\n1,"x\n2,2\n3,3\n')
        with pytest.raises(UserError, match=r"unexpected end of data, up to line 5\): .*x.csv:3"):
            rows[1]
        assert len(rows) == 2

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "file holds no rows: .*x.csv:1"),
            ("a,b\n1,2\n".encode("utf-16"), r"row is not UTF-8 \(a byte is 0xff\): .*x.csv:1"),
            (b"a,,b\n1,2,3\n", "header with empty or equal names: .*x.csv:1"),
            (b"a,b,a\n1,2,3\n", "header with empty or equal names: .*x.csv:1"),
            (b"a\n" + b"x" * (LONGEST_ROW + 1), "line too long: .*x.csv:2"),
        ],
    )
    def test_a_file_that_is_no_table_is_told(self, rows_of, content, message):
        with pytest.raises(UserError, match=message):
            rows_of(content)

    def test_a_million_characters_are_a_row(self, rows_of):
        text = "👟" * 10**6
        assert rows_of(f"a\n{text}\n".encode())[0].values == {"a": text}

    @given(st.lists(st.tuples(st.text(), st.text()), max_size=20), st.integers(1, 5))
    @example([("\x85\u2028", "\x1c")], 1)
    def test_what_csv_writes_is_read(self, tmp_path_factory, cells, batch):
        kept = [pair for pair in cells if "\0" not in "".join(pair)]
        text = io.StringIO(newline="")
        writer = csv.writer(text, quoting=csv.QUOTE_ALL)
        writer.writerows([("a", "b"), *kept])
        folder = tmp_path_factory.mktemp("csv")
        (folder / "x.csv").write_bytes(text.getvalue().encode())
        before, tables.BATCH = tables.BATCH, batch
        try:
            write(folder / "x.arrow", csv_batches(folder / "x.csv"))
        finally:
            tables.BATCH = before
        wanted = [{"a": a or None, "b": b or None} for a, b in kept]
        assert values(ArrowRows(folder / "x.arrow", "x")) == wanted


def test_encoded_columns_are_the_values(rows_of, monkeypatch):
    monkeypatch.setattr(tables, "BATCH", 4)
    words, numbers = ["é", "a", None, "a", "é", "b"] * 3, [3, 1, 3, 2, 2, 2] * 3
    rows = rows_of(pa.table({"word": words, "number": numbers, "real": [0.5] * 18}))
    for column, wanted in (("word", [w or "" for w in words]), ("number", list(map(str, numbers)))):
        codes, known = rows.encoded(column)
        assert [known[code].decode() for code in codes] == wanted
        assert len(set(known)) == len(known)
    assert rows.encoded("real") is None and rows.encoded("nothing") is None
