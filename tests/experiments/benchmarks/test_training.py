"""The comparisons with PEFT on a model so small that their seconds mean nothing."""

import pytest

from ecomjax.errors import UserError
from ecomjax.experiments.benchmarks import registry, training

pytestmark = pytest.mark.usefixtures("loose_promotion")


@pytest.fixture(autouse=True)
def tiny(make_config, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    model = make_config("finetune").model
    monkeypatch.setattr(training, "ModelConfig", lambda: model)
    small = {"EXAMPLES": 6, "PEER_BATCHES": (2, 4), "RAW_BATCH": 2, "RAW_LENGTH": 12}
    for name, value in small.items():
        monkeypatch.setattr(training, name, value)


@pytest.mark.parametrize("name", ["train", "raw_step"])
def test_both_train_alike(name, capsys):
    (result,) = registry.run([name], registry.Given("synthetic"))
    told = result.to_dict()
    assert told["name"] == name and told["ratio"] == told["ours"] / told["peer"]
    assert {"torch", "transformers", "peft"} <= told["versions"].keys()
    losses = [line.split() for line in capsys.readouterr().err.splitlines() if "loss" in line]
    assert len(losses) == len(result.details["peer_seconds_by_batch"]) > 0
    if name == "train":
        # The instruction stands once in a row.
        assert result.samples == 6 and result.details["slots"] < result.details["tokens"]
    else:
        assert result.samples == 2 and result.details["slots"] == 12


def test_another_optimizer_is_a_defect(monkeypatch):
    """The first loss is that of the same weights; the second follows an update."""
    run = training.our_step

    def slower(base, work, params, adapter):
        monkeypatch.setattr(training, "OPTIMIZER", training.OptimizerConfig(learning_rate=1e-7))
        made = run(base, work, params, adapter)
        monkeypatch.setattr(training, "OPTIMIZER", training.OptimizerConfig(learning_rate=0.1))
        return made

    monkeypatch.setattr(training, "our_step", slower)
    with pytest.raises(UserError, match="losses differ by"):
        list(registry.run(["raw_step"], registry.Given("synthetic")))
