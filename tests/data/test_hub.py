"""No test needs a network: data sets are local mirrors, or stand in for `datasets`' builder."""

import json

import pytest

from ecomjax.data.sources import HubSource
from ecomjax.errors import UserError

datasets = pytest.importorskip("datasets")
COMMIT = "0123456789" * 4


@pytest.fixture
def hub(monkeypatch):
    """Function (tables by split, commit) -> list of what `datasets` is asked for."""

    class Builder:
        def __init__(self, tables, commit):
            self.tables, self.hash = datasets.DatasetDict(tables), commit

        def download_and_prepare(self):
            pass

        def as_dataset(self):
            return self.tables

        def as_streaming_dataset(self):
            empty = datasets.IterableDataset.from_generator(lambda: iter(()))
            streams = {
                name: table.to_iterable_dataset() if len(table) else empty
                for name, table in self.tables.items()
            }
            return datasets.IterableDatasetDict(streams)

    def serve(tables, commit=COMMIT):
        asked = []

        def load_dataset_builder(name, revision=None):
            asked.append((name, revision))
            return Builder(tables, commit)

        monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
        return asked

    return serve


@pytest.fixture(params=[False, True], ids=["cached", "streamed"])
def source(request, tmp_path, monkeypatch):
    """Function (arguments of HubSource) -> source, streaming or not."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return lambda *a, **k: HubSource(*a, streaming=request.param, cache=tmp_path / "cache", **k)


def tagged():
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features(
        {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "B-color"]))}
    )
    columns = {"tokens": [["red"], ["a", "b"]], "ner_tags": [[1], [0, 1]]}
    return Dataset.from_dict(columns, features=features)


def test_tags_become_names_and_places_ids(hub, source):
    asked = hub({"test": tagged()})
    hub_source = source(revision="abc")
    rows = hub_source.rows("queryner", "test")
    assert len(rows) == 2
    assert rows[1].values == {
        "example_id": "test-2",
        "tokens": ["a", "b"],
        "ner_tags": ["O", "B-color"],
    }
    assert rows[-1].where == "bltlab/queryner/test:2"
    assert [row.where for row in rows[:1]] == ["bltlab/queryner/test:1"]
    assert asked == [("bltlab/queryner", "abc")]


def test_the_commit_is_told_and_in_the_fingerprint(hub, source):
    hub({"test": tagged()})
    first = source()
    assert first.commit("queryner") == COMMIT
    prints = {source().fingerprint("queryner", "test") for _ in range(2)}
    hub({"test": tagged()}, commit="f" * 40)
    prints.add(source().fingerprint("queryner", "test"))
    assert len(prints) == 2


def test_validation_is_held_out_by_query(hub, source):
    queries = [f"query {n // 2}" for n in range(600)]
    table = datasets.Dataset.from_dict({"example_id": list(range(600)), "query": queries})
    hub({"train": table, "test": table})
    hub_source = source()
    held = {
        split: [row.values["query"] for row in hub_source.rows("esci", split)]
        for split in ("train", "validation", "test")
    }
    assert held["train"] and held["validation"]
    assert not set(held["train"]) & set(held["validation"])
    assert sorted(held["train"] + held["validation"]) == sorted(queries)
    described = [row.values["query"] for row in hub_source.rows("description_generation", "test")]
    assert described == held["test"] == queries


def test_given_splits_are_kept(hub, source):
    table = datasets.Dataset.from_dict({"example_id": [1], "query": ["q"]})
    hub({"train": table, "validation": table})
    assert len(source().rows("esci", "train")) == 1
    with pytest.raises(UserError, match=r"split 'test': tasksource/esci; known: train, v"):
        source().rows("esci", "test")
    hub({"train": table.select([]), "validation": table}, commit="e" * 40)
    with pytest.raises(UserError, match="split holds no rows: tasksource/esci train"):
        source().rows("esci", "train")


def test_f44_offline_is_one_clear_line(source):
    """`datasets` itself is asked, which finds that tests are offline."""
    with pytest.raises(UserError) as error:
        source().rows("esci", "train")
    assert "Couldn't reach 'tasksource/esci'" in str(error.value)
    assert "tasksource/esci@newest; " in str(error.value)
    assert "local source" in str(error.value) and "\n" not in str(error.value)


def test_unknown_names_are_told(source):
    with pytest.raises(UserError, match=r"'x' has no data set name: .*known: esci, queryner"):
        source().rows("x", "train")
    with pytest.raises(UserError, match="data set cannot be loaded"):
        source({"x": "no//name"}).rows("x", "train")


class TestMirror:
    @pytest.fixture
    def mirror(self, tmp_path):
        rows = [
            {"example_id": n, "query": f"q{n}", "note": None if n < 40 else "x"} for n in range(60)
        ]
        for split in ("train", "validation", "test"):
            text = "\n".join(json.dumps(row) for row in rows)
            (tmp_path / "mirror").mkdir(exist_ok=True)
            (tmp_path / "mirror" / f"{split}.jsonl").write_text(text, encoding="utf-8")
        return tmp_path / "mirror", rows

    def test_is_read(self, source, mirror):
        folder, rows = mirror
        hub_source = source({"esci": str(folder)})
        assert [row.values for row in hub_source.rows("esci", "test")] == rows
        assert hub_source.commit("esci") == ""

    def test_and_read_anew_when_it_changes(self, source, mirror):
        folder, _ = mirror
        before = source({"esci": str(folder)}).fingerprint("esci", "test")
        changed = (folder / "test.jsonl").read_text(encoding="utf-8").replace("q7", "r7")
        (folder / "test.jsonl").write_text(changed, encoding="utf-8")
        hub_source = source({"esci": str(folder)})
        assert hub_source.rows("esci", "test")[7].values["query"] == "r7"
        assert hub_source.fingerprint("esci", "test") != before

    def test_is_streamed_once_and_to_its_limit(self, mirror, tmp_path, capsys):
        folder, rows = mirror
        names, cache = {"esci": str(folder)}, tmp_path / "cache"
        for told in (True, False):
            some = HubSource(names, streaming=True, limit=7, cache=cache)
            assert [row.values for row in some.rows("esci", "train")] == rows[:7]
            assert ("7 rows in" in capsys.readouterr().err) == told
        everything = HubSource(names, streaming=True, cache=cache)
        assert len(everything.rows("esci", "train")) == 60
        assert some.fingerprint("esci", "train") != everything.fingerprint("esci", "train")

    def test_that_is_damaged_is_told(self, source, mirror):
        folder, _ = mirror
        (folder / "test.jsonl").write_bytes(b'{"example_id": 1}\n{"exam')
        with pytest.raises(UserError, match=r"data set cannot be loaded .*mirror@newest"):
            source({"esci": str(folder)}).rows("esci", "test")

    def test_f46_a_program_in_it_never_runs(self, source, mirror):
        folder, _ = mirror
        (folder / "mirror.py").write_text("raise SystemExit('imported')")
        with pytest.raises(UserError, match=r"scripts are no longer supported.*mirror@newest"):
            source({"esci": str(folder)}).rows("esci", "test")

    @pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
    @pytest.mark.parametrize("value", ["!!python/object/apply:os.mkdir [{}]", "["])
    def test_f49_yaml_of_it_makes_no_object(self, source, mirror, tmp_path, file, value):
        folder, _ = mirror
        text = f"configs: {value.format(tmp_path / 'made')}\n"
        (folder / file).write_text(f"---\n{text}---\n" if file == "README.md" else text)
        with pytest.raises(UserError, match=r"data set cannot be loaded .*mirror@newest"):
            source({"esci": str(folder)}).rows("esci", "test")
        assert not (tmp_path / "made").exists()
