import gzip
import json
import pickle
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecomjax.data import cache, jsonl
from ecomjax.data.jsonl import JsonFolder, JsonLines, unpack
from ecomjax.data.rows import LONGEST_ROW
from ecomjax.errors import UserError


@pytest.fixture
def lines(tmp_path):
    """Function (bytes of a file) -> its rows."""

    def make(content):
        path = tmp_path / "train.jsonl"
        path.write_bytes(content)
        return JsonLines(path)

    return make


def test_lines_end_at_newlines_alone(lines):
    text = '\ufeff{"a": "x\u2028y\u0085z\\u000b"}\r\n\n \n{"a": "שלום 👟 e\u0301"}'
    rows = lines(text.encode())
    assert [row.values["a"] for row in rows] == ["x\u2028y\u0085z\u000b", "שלום 👟 e\u0301"]
    assert [row.where.rpartition("/")[2] for row in rows] == ["train.jsonl:1", "train.jsonl:4"]


BAD = {
    b'{"a": "\xff"}': r"line is not UTF-8 \(byte 8 is 0xff\): .*train.jsonl:2",
    '{"a": "x"}'.encode("utf-16"): r"line is not UTF-8 \(byte 1 is 0xff\): .*train.jsonl:2",
    b'{"a": 1': r"line is not JSON .*train.jsonl:2",
    b'{"a": "x\x00y"}': r"line is not JSON .*train.jsonl:2",
    b"[" * 10**5: r"line is not JSON .*train.jsonl:2",
    b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}": r"nested more than 100 levels deep.*train.jsonl:2",
    b"[1]": r"no JSON object but a list: .*train.jsonl:2",
    b"null": r"no JSON object but a NoneType: .*train.jsonl:2",
    b'{"a": "\\ud83d"}': r"half a surrogate pair: .*train.jsonl:2",
    b'{"a": "\\uDC5F"}': r"half a surrogate pair: .*train.jsonl:2",
    b'{"a": 1e999}': r"number 1e999 is out of range.*train.jsonl:2",
    b'{"a": -Infinity}': r"-Infinity is no value of JSON.*train.jsonl:2",
    b'{"a": NaN}': r"NaN is no value of JSON.*train.jsonl:2",
    b'{"a": ' + b"9" * 5000 + b"}": r"line is not JSON .*train.jsonl:2",
    b'{"a": "' + b"x" * LONGEST_ROW + b'"}': r"row of 16,777,226 bytes: .*train.jsonl:2",
}


@pytest.mark.parametrize(("line", "message"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_line_is_named_and_leaves_the_others_alone(lines, line, message):
    rows = lines(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    assert len(rows) == 3
    with pytest.raises(UserError, match=message):
        rows[1]
    assert [rows[n].values for n in (0, 2)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("text", ['"\\ud83d\\udc5f"', '"\\\\ud83d"', '"\\u0000"', "[[[1e30]]]"])
def test_what_is_odd_but_right_is_read(lines, text):
    assert lines(f'{{"a": {text}}}'.encode())[0].values == {"a": json.loads(text)}


def test_rows_are_indexed_as_those_of_a_list(lines):
    rows = lines(b'{"a": 0}\n{"a": 1}\n{"a": 2}\n')
    everything = list(rows)
    assert (
        rows[-1] == everything[-1] and rows[:2] == everything[:2] and rows[::-1] == everything[::-1]
    )
    assert pickle.loads(pickle.dumps(rows))[1] == everything[1]
    for index in (3, -4):
        with pytest.raises(IndexError):
            rows[index]


@given(
    st.lists(st.sampled_from([b"", b" \t", b"\r", b'{"a": 1}', b'{"long": "' + b"y" * 40 + b'"}'])),
    st.integers(1, 50),
)
def test_lines_are_those_of_the_file_however_it_is_cut(tmp_path_factory, parts, chunk):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_bytes(b"\n".join(parts))
    kept, jsonl.CHUNK = jsonl.CHUNK, chunk
    try:
        rows = JsonLines(path)
    finally:
        jsonl.CHUNK = kept
    with path.open("rb") as file:
        wanted = [(n, json.loads(line)) for n, line in enumerate(file, 1) if line.strip()]
    assert [(int(row.where.rpartition(":")[2]), row.values) for row in rows] == wanted


def test_a_million_characters_are_a_row(lines):
    text = "👟" * 10**6
    assert lines(json.dumps({"a": text}).encode())[0].values["a"] == text


def test_memory_does_not_grow_with_the_file(lines):
    line = json.dumps({"a": "x" * 1000}).encode() + b"\n"
    content = line * 2**16
    tracemalloc.start()
    rows = lines(content)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 2**16 and most < len(content) / 2 and kept < 20 * 2**16


def test_files_of_a_folder_are_rows(tmp_path):
    (tmp_path / "b.json").write_text('{\n "a": 1\n}', encoding="utf-8")
    (tmp_path / "a.json").write_text('{"a": 2, "example_id": 7}', encoding="utf-8")
    (tmp_path / "c.json").write_bytes(b'{"a": "\xe9"}')
    (tmp_path / "notes.txt").write_text("no row", encoding="utf-8")
    rows = JsonFolder(tmp_path)
    assert [rows[n].values for n in (0, 1)] == [
        {"a": 2, "example_id": 7},
        {"a": 1, "example_id": "b"},
    ]
    assert rows[1].where == str(tmp_path / "b.json")
    with pytest.raises(UserError, match=r"file is not UTF-8 \(byte 8 is 0xe9\): .*c.json"):
        rows[2]
    (tmp_path / "a.json").unlink()
    with pytest.raises(UserError, match=r"cannot be read .*a.json"):
        rows[0]


class TestGzip:
    def test_members_are_joined(self, tmp_path):
        packed = tmp_path / "x.gz"
        packed.write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n"))
        unpack(packed, tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == b"one\ntwo\n"

    @pytest.mark.parametrize("change", [lambda b: b[:-5], lambda b: b"no" + b, lambda b: b + b"x"])
    def test_a_broken_file_is_told(self, tmp_path, change):
        packed = tmp_path / "x.gz"
        packed.write_bytes(change(gzip.compress(b"one\n" * 1000)))
        with pytest.raises(UserError, match=r"not a whole gzip file .*x.gz"):
            unpack(packed, tmp_path / "x")

    def test_a_bomb_is_defused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(cache, "GROWTH_FREE", 2**20)
        packed = tmp_path / "x.gz"
        packed.write_bytes(gzip.compress(bytes(2**25)))
        with pytest.raises(UserError, match=r"holds more than 100 times its size: .*x.gz"):
            unpack(packed, tmp_path / "x")
        assert (tmp_path / "x").stat().st_size < 2**24
