import json

import pytest

from ecomjax.data import sources
from ecomjax.data.sources import HubSource, LocalSource, SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.errors import UserError


def write(folder, content, task="esci", split="train"):
    (folder / task).mkdir(parents=True, exist_ok=True)
    path = folder / task / f"{split}.jsonl"
    path.write_bytes(content)
    return path


def local(folder, content):
    write(folder, content)
    return LocalSource(folder).rows("esci", "train")


def test_lines_end_at_newlines_alone(tmp_path):
    text = '\ufeff{"a": "x\u2028y\u0085z\u000b"}\r\n\n \n{"a": "שלום 👟 e\u0301"}'
    rows = local(tmp_path, text.replace("\u000b", "\\u000b").encode())
    assert [row.values["a"] for row in rows] == ["x\u2028y\u0085z\u000b", "שלום 👟 e\u0301"]
    path = tmp_path / "esci" / "train.jsonl"
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:4"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": "\xff"}', r"line is not UTF-8 \(byte 8 is 0xff\): .*train.jsonl:2"),
        (b'{"a": 1', r"line is not JSON .*train.jsonl:2"),
        (b'{"a": "x\x00y"}', r"line is not JSON .*train.jsonl:2"),
        (b"[" * 10**5, r"line is not JSON .*train.jsonl:2"),
        (b"[1]", r"no JSON object but a list: .*train.jsonl:2"),
        (b"null", r"no JSON object but a NoneType: .*train.jsonl:2"),
        (b'{"a": "\\ud83d"}', r"half a surrogate pair: .*train.jsonl:2"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        local(tmp_path, b'{"a": 1}\n' + line + b'\n{"a": 2}\n')


def test_escaped_surrogate_pairs_are_text(tmp_path):
    assert local(tmp_path, b'{"a": "\\ud83d\\udc5f"}')[0].values["a"] == "👟"


def test_what_is_missing_is_named_with_what_is_there(tmp_path):
    with pytest.raises(UserError, match=r"no such folder: .*nowhere; data is read from <folder>/"):
        LocalSource(tmp_path / "nowhere").rows("esci", "train")
    write(tmp_path, b"{}", task="esci", split="test")
    with pytest.raises(UserError, match=r"no such folder: .*queryner; .* present in .*: esci"):
        LocalSource(tmp_path).rows("queryner", "train")
    with pytest.raises(UserError, match=r"no such file: .*train.jsonl; present in .*: test.jsonl"):
        LocalSource(tmp_path).rows("esci", "train")
    with pytest.raises(UserError, match=r"unknown split 'dev': local; known: test, train"):
        LocalSource(tmp_path).rows("esci", "dev")


def test_empty_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="file holds no rows"):
        local(tmp_path, b"\n \n")


def test_fingerprint_is_of_the_content(tmp_path):
    path = write(tmp_path, b'{"a": 1}')
    source = LocalSource(tmp_path)
    first = source.fingerprint("esci", "train")
    assert len(first) == 64 and first == source.fingerprint("esci", "train")
    path.write_bytes(b'{"a": 2}')
    assert source.fingerprint("esci", "train") != first


def test_synthetic_rows_are_numbered_and_reproducible():
    source = SyntheticSource(0, Sizes(5, 4, 3))
    rows = source.rows("queryner", "validation")
    assert [row.where for row in rows] == [
        f"synthetic/queryner/validation:{n}" for n in range(1, 5)
    ]
    same, other = SyntheticSource(0, Sizes(5, 4, 3)), SyntheticSource(1, Sizes(5, 4, 3))
    prints = [s.fingerprint("queryner", "test") for s in (source, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_synthetic_split_of_size_zero_is_an_error():
    with pytest.raises(UserError, match="split of size 0"):
        SyntheticSource(0, Sizes(1, 1, 0)).rows("esci", "test")


class TestHub:
    """`load_dataset` is replaced where the Hub would be asked: no test needs a network."""

    @pytest.fixture
    def hub(self, monkeypatch):
        datasets = pytest.importorskip("datasets")
        asked = []

        def serve(tables):
            def load_dataset(name, revision=None):
                asked.append((name, revision))
                return datasets.DatasetDict(tables)

            monkeypatch.setattr(datasets, "load_dataset", load_dataset)
            return asked

        return serve

    def test_tags_become_names_and_places_ids(self, hub):
        from datasets import ClassLabel, Dataset, Features, List, Value

        features = Features(
            {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-color"]))}
        )
        columns = {"tokens": [["red"], ["a", "b"]], "ner_tags": [[1], [0, 1]]}
        asked = hub({"test": Dataset.from_dict(columns, features=features)})
        source = HubSource(revision="abc")
        rows = source.rows("queryner", "test")
        assert len(rows) == 2
        assert rows[1].values == {
            "example_id": "test-2",
            "tokens": ["a", "b"],
            "ner_tags": ["O", "B-color"],
        }
        assert rows[-1].where == "bltlab/queryner/test:2"
        assert [row.where for row in rows[:1]] == ["bltlab/queryner/test:1"]
        assert source.fingerprint("queryner", "test") == source.fingerprint("queryner", "test")
        assert asked == [("bltlab/queryner", "abc")]

    def test_validation_is_held_out_by_query(self, hub, monkeypatch):
        from datasets import Dataset

        monkeypatch.setattr(sources, "HELD_OUT", 3)
        queries = [f"query {n // 2}" for n in range(60)]
        table = Dataset.from_dict({"example_id": list(range(60)), "query": queries})
        hub({"train": table, "test": table})
        source = HubSource()
        held = {
            split: {row.values["query"] for row in source.rows("esci", split)}
            for split in ("train", "validation", "test")
        }
        assert held["train"] and held["validation"]
        assert not held["train"] & held["validation"]
        assert held["train"] | held["validation"] == held["test"] == set(queries)
        rows = sum(len(source.rows("esci", split)) for split in ("train", "validation"))
        assert rows == 60

    def test_given_validation_is_kept(self, hub):
        from datasets import Dataset

        table = Dataset.from_dict({"example_id": [1], "query": ["q"]})
        hub({"train": table, "validation": table})
        assert len(HubSource().rows("esci", "train")) == 1
        with pytest.raises(
            UserError, match="unknown split 'test': tasksource/esci; known: train, v"
        ):
            HubSource().rows("esci", "test")

    def test_no_network_is_one_clear_line(self, monkeypatch):
        datasets = pytest.importorskip("datasets")

        def load_dataset(name, revision=None):
            raise ConnectionError("Couldn't reach\nthe Hub")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(UserError) as error:
            HubSource().rows("esci", "train")
        assert "(Couldn't reach the Hub): tasksource/esci@newest;" in str(error.value)
        assert "local source" in str(error.value) and "\n" not in str(error.value)

    def test_local_mirror_is_read(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        rows = [{"example_id": n, "query": f"q{n}"} for n in range(3)]
        for split in ("train", "validation", "test"):
            text = "\n".join(json.dumps(row) for row in rows)
            (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
        source = HubSource({"esci": str(tmp_path)})
        assert [row.values for row in source.rows("esci", "test")] == rows

    def test_unknown_task(self):
        with pytest.raises(UserError, match="task 'x' has no data set name"):
            HubSource().rows("x", "train")


def test_real_files_are_read(shared_data):
    source = LocalSource(shared_data)
    counts = {
        (task, split): len(source.rows(task, split))
        for task in ("esci", "queryner")
        for split in sources.SPLITS
    }
    assert min(counts.values()) > 400
