import pytest

from ecomjax.data import sources
from ecomjax.data.sources import HubSource, LocalSource, Source, SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.errors import UserError


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


def test_all_are_sources(tmp_path):
    for source in (SyntheticSource(), LocalSource(tmp_path), HubSource()):
        assert isinstance(source, Source)
        with pytest.raises(UserError, match=r"unknown split 'dev'|no such folder|no data set name"):
            source.rows("review", "dev")


def test_real_files_are_read(shared_data):
    source = LocalSource(shared_data)
    counts = {
        (task, split): len(source.rows(task, split))
        for task in ("esci", "queryner")
        for split in sources.SPLITS
    }
    assert min(counts.values()) > 400


def test_real_files_without_validation_hold_some_of_train_out(shared_data):
    source = LocalSource(shared_data)
    name = "ecinstruct/product_relation_prediction"
    texts = {
        split: [row.values["input"] for row in source.rows(name, split)]
        for split in ("train", "validation")
    }
    assert len(texts["train"]) + len(texts["validation"]) == 1296
    assert 90 < len(texts["validation"]) < 170
    assert source.fingerprint(name, "train") != source.fingerprint(name, "validation")


def test_descriptions_are_those_of_the_esci_products(shared_data):
    source = LocalSource(shared_data)
    described, judged = (source.rows(name, "test") for name in ("description_generation", "esci"))
    assert [row.values for row in described] == [row.values for row in judged]
    assert "product_description" in described[0].values
