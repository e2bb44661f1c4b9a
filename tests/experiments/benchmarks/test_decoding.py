"""The comparisons with transformers on a model so small that their seconds mean nothing."""

import dataclasses

import pytest

from ecomjax.errors import UserError
from ecomjax.experiments.benchmarks import decoding, registry


@pytest.fixture(autouse=True)
def tiny(make_config, monkeypatch):
    pytest.importorskip("torch")
    model = make_config("finetune").model
    monkeypatch.setattr(decoding, "ModelConfig", lambda: model)
    small = {
        "QUERIES": 6,
        "CONSTRAINED_BATCH": 4,
        "FREE_BATCH": 4,
        "PEER_BATCHES": (2, 3),
        "NEW_TOKENS": 5,
    }
    small |= {"PLAIN": {2: 1.0, 1: 1.0}, "PLAIN_PROMPTS": 6}
    for name, value in small.items():
        monkeypatch.setattr(decoding, name, value)


def test_both_give_the_same_answers(capsys):
    names = ["decode", "decode_free", "decode_plain"]
    results = {r.name: r for r in registry.run(names, registry.Given("synthetic"))}
    assert list(results) == [*names[:2], "decode_plain_2", "decode_plain_1"]
    for result in results.values():
        told = result.to_dict()
        assert told["ratio"] == told["ours"] / told["peer"] and told["samples"] == 6
        assert {"torch", "transformers"} <= told["versions"].keys()
        assert all(len(seconds) == 3 for seconds in told["details"]["seconds"].values())
        assert told["details"]["peer_batch"] in (2, 3, 1)
    told = capsys.readouterr().err
    assert told.count("0 of 6 answers differ") == 6


def test_other_answers_are_a_defect(monkeypatch):
    generate = decoding.generate_constrained

    def wrong(*arguments, **rows):
        found = generate(*arguments, **rows)
        cut = [dataclasses.replace(answer, tokens=answer.tokens[:-1]) for answer in found[:2]]
        return [*cut, *found[2:]]

    monkeypatch.setattr(decoding, "generate_constrained", wrong)
    with pytest.raises(UserError, match="2 of 6 answers differ"):
        next(registry.run(["decode"], registry.Given("synthetic")))
