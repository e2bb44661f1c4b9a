"""Both sides of a recipe on models so small that their scores mean nothing."""

import dataclasses

import numpy as np
import pytest

from ecomjax.errors import UserError
from ecomjax.experiments.benchmarks import recipe
from ecomjax.experiments.document import Table
from ecomjax.experiments.files import read_json
from ecomjax.training.checkpoint import Checkpoints


@pytest.fixture(autouse=True)
def peers():
    pytest.importorskip("torch")
    pytest.importorskip("peft")


@pytest.fixture
def words(make_config, tiny_encoder):
    own = {"model.path": str(tiny_encoder), "training.row_length": 96, "training.epochs": 1}
    return make_config("finetune", "queryner,minilm_l6", own)


@pytest.mark.parametrize("task", ["esci", "queryner"])
@pytest.mark.usefixtures("loose_promotion")
def test_all_are_trained_scored_and_told_once(make_config, words, tmp_path, capsys, task):
    config = (
        words if task == "queryner" else make_config("finetune", changes={"training.epochs": 1})
    )
    recipe.run(config, str(tmp_path), ["4", "7"])
    told = capsys.readouterr().out
    assert "| side |" in told and "| seed 4 |" in told and "interval" in told
    runs = [f"{task}-{side}-{seed}" for seed in (4, 7) for side in ("ours", "peer")]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == set(runs)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.metrics.json")}
    assert len(kept) == 4 and all(read_json(path)["n"] == 12 for path in kept)
    digests = {read_json(path)["evaluation"]["prompts"] for path in kept}
    assert len(digests) == 1  # All are asked the same.
    # Ours keeps the last step.
    assert Checkpoints(tmp_path / "runs" / f"{task}-ours-4" / "checkpoints").best() == 6

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "SIDES", dict.fromkeys(recipe.SIDES))
        recipe.run(config, str(tmp_path), ["4", "7"])
    assert capsys.readouterr().out == told
    assert kept == {path: path.stat().st_mtime_ns for path in kept}

    other = dataclasses.replace(config.optimizer, learning_rate=0.5)
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        recipe.run(dataclasses.replace(config, optimizer=other), str(tmp_path), ["4"])


def test_what_was_trained_by_the_peer_is_not_trained_again(words, tmp_path, loose_promotion):
    """Where the command was ended while it scored."""
    recipe.run(words, str(tmp_path), ["0"])
    folder = recipe.Workdir(tmp_path).subrun("queryner-peer-0")
    path, (weights,) = folder.scores("queryner", "test"), folder.model.glob("*.safetensors")
    before, scores = weights.stat().st_mtime_ns, read_json(path)
    path.unlink()
    recipe.run(words, str(tmp_path), ["0"])
    assert weights.stat().st_mtime_ns == before and read_json(path) == scores


def test_the_interval_is_that_of_student():
    low, high = recipe.interval([1.0, 2.0, 3.0])
    # 4.3027 is the 97.5 % quantile of two degrees of freedom.
    np.testing.assert_allclose([low, high], [2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5], rtol=1e-4)
    assert recipe.interval([1.0]) is None


@pytest.mark.parametrize(
    ("ours", "peer", "claim"),
    [
        ((0.50, 0.51, 0.52), (0.50, 0.52, 0.51), "each mean is within the other's interval"),
        ((0.50, 0.51, 0.52), (0.60, 0.61, 0.62), "neither mean is within"),
        ((0.50, 0.51, 0.52), (0.45, 0.60, 0.75), "our mean is within the peer's interval, not"),
        ((0.45, 0.60, 0.75), (0.50, 0.51, 0.52), "the peer's mean is within our interval, not"),
    ],
)
def test_the_means_are_held_against_the_intervals(ours, peer, claim):
    found = {
        side: {seed: {"macro_f1": value} for seed, value in enumerate(values)}
        for side, values in (("ours", ours), ("peer", peer))
    }
    table, verdict = recipe.comparison(found, ["macro_f1"])
    assert isinstance(table, Table) and claim in verdict.text
    assert table.rows[0][:5] == ("macro f1", "ours", *(f"{value:.3f}" for value in ours))
    assert table.rows[0][-1] == f"{min(ours):.3f} to {max(ours):.3f}"


@pytest.mark.parametrize("seeds", [[], ["a"], ["-1"], ["0", "0"], ["1.5"]])
def test_bad_seeds(seeds):
    with pytest.raises(UserError, match="--seeds"):
        recipe.seeds_of(seeds)


@pytest.mark.parametrize(
    ("argument", "changes", "told"),
    [
        ("esci+queryner", {}, "a mixture of tasks: config.tasks"),
        ("esci", {"adapter.dora": True}, "config.adapter;"),
        ("esci", {"mixture.cap": 5}, "config.mixture.cap"),
        ("esci", {"optimizer.loraplus_ratio": 16.0}, "config.optimizer.loraplus_ratio"),
        ("esci", {"model.quantization": "nf4"}, "config.model.quantization"),
        ("esci", {"model.compute_dtype": "bfloat16"}, "config.model.compute_dtype"),
        ("esci", {"training.tune": "all"}, "is none of what is compared"),
        ("esci,minilm_l6", {}, "is none of what is compared"),
    ],
)
def test_what_the_peer_cannot_do_is_told(make_config, tiny_encoder, argument, changes, told):
    if "minilm" in argument:
        changes = {"model.path": str(tiny_encoder)}
    with pytest.raises(UserError, match=told):
        recipe.check(make_config("finetune", argument, changes))
