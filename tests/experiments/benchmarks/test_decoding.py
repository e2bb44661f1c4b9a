"""The comparisons with transformers on a model so small that their seconds mean nothing."""

import dataclasses
import itertools

import pytest

from ecomjax.errors import UserError
from ecomjax.experiments.benchmarks import decoding, registry


@pytest.fixture(autouse=True)
def tiny(make_config, monkeypatch):
    pytest.importorskip("torch")
    model = make_config("finetune").model
    monkeypatch.setattr(decoding, "ModelConfig", lambda: model)
    small = {"QUERIES": 6, "BATCH": 4, "PEER_BATCHES": (2, 3), "NEW_TOKENS": 5}
    for name, value in small.items():
        monkeypatch.setattr(decoding, name, value)


def test_both_give_the_same_answers(capsys):
    found = itertools.islice(registry.run(["decode"], "synthetic"), 2)
    results = {result.name: result for result in found}
    assert list(results) == ["decode", "decode_free"]
    for result in results.values():
        told = result.to_dict()
        assert told["ratio"] == told["ours"] / told["peer"] and told["samples"] == 6
        assert {"torch", "transformers"} <= told["versions"].keys()
        assert all(len(seconds) == 3 for seconds in told["details"]["seconds"].values())
        assert told["details"]["peer_batch"] in (2, 3)
    told = capsys.readouterr().err
    assert told.count("1.000 of 6 answers are the same") == 4


def test_other_answers_are_a_defect(monkeypatch):
    generate = decoding.generate_constrained

    def wrong(*arguments, **rows):
        first, *rest = generate(*arguments, **rows)
        return [dataclasses.replace(first, tokens=first.tokens[:-1]), *rest]

    monkeypatch.setattr(decoding, "generate_constrained", wrong)
    with pytest.raises(UserError, match=r"0\.167 of the answers differ"):
        next(registry.run(["decode"], "synthetic"))
