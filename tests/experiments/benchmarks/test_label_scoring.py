"""The comparisons with transformers on a model so small that their seconds mean nothing."""

import pytest

from ecomjax.errors import UserError
from ecomjax.experiments.benchmarks import label_scoring, registry


@pytest.fixture(autouse=True)
def tiny(make_config, monkeypatch):
    pytest.importorskip("torch")
    model = make_config("finetune").model
    monkeypatch.setattr(label_scoring, "ModelConfig", lambda: model)
    for name, value in {"EXAMPLES": 5, "SHOTS": 1, "BATCH": 2, "PEER_EXAMPLES": 2}.items():
        monkeypatch.setattr(label_scoring, name, value)


def test_both_give_the_same_scores():
    """Eight examples of the peer are five, and three of them once more."""
    results = list(registry.run(["icl", "icl_onepass"], registry.Given("synthetic")))
    assert [result.name for result in results] == ["icl", "icl_onepass"]
    assert [result.target for result in results] == [0.05, 0.25]
    for result in results:
        assert 0 < result.details["difference"] < 1e-5
        assert result.samples == 5 and result.details["peer_examples"] == 6


def test_other_scores_are_a_defect(monkeypatch):
    score = label_scoring.label_log_likelihoods
    monkeypatch.setattr(
        label_scoring, "label_log_likelihoods", lambda *given, **rows: score(*given, **rows) + 0.01
    )
    with pytest.raises(UserError, match="log-likelihoods differ by"):
        list(registry.run(["icl"], registry.Given("synthetic")))
