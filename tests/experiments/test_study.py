import pytest

from ecomjax.evaluation.predict import Predictor
from ecomjax.experiments import study
from ecomjax.experiments.config import to_json
from ecomjax.experiments.files import read_json, read_jsonl
from ecomjax.hf.files import sha256_of

FIELDS = {
    "system",
    "task",
    "train_size",
    "seed",
    "metric",
    "value",
    "low",
    "high",
    "n",
    "invalid_rate",
    "pretrained",
    "run",
}


@pytest.fixture(scope="module")
def config(make_config):
    return make_config("study", "smoke", {"training.epochs": 1, "training.seed": 3})


@pytest.fixture(scope="module")
def finished(config, as_in_production, tmp_path_factory):
    """The folder of a finished study on both tasks; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "study"
    with as_in_production():
        study.run(config, str(folder))
    return folder


@pytest.fixture
def again(config, finished, monkeypatch, capsys, contents):
    """What the same command prints when it is run again, without asking the model."""

    def no_model(*_, **__):
        raise AssertionError("the model was asked again")

    before = contents(finished)
    monkeypatch.setattr(Predictor, "predict", no_model)
    study.run(config, str(finished))
    assert contents(finished) == before
    return capsys.readouterr().out


def test_tables_show_floors_few_shot_and_adapter_under_a_warning(again):
    assert again.startswith("NOT A RESULT")
    esci, queryner = again.partition("## queryner")[::2]
    assert "## esci" in esci
    for system in ("majority class", "bag of words", "zero-shot", "LoRA"):
        assert f"| {system} " in esci
    for system in ("most frequent tag per word", "zero-shot", "LoRA"):
        assert f"| {system} " in queryner
    assert "macro f1" in esci and "entity f1" in queryner and "invalid rate" in queryner
    assert again.count("paired bootstrap over 12 examples") == 2


def test_results_name_what_is_needed_to_compare_them(config, finished, tiny_base):
    lines = read_jsonl(finished / "results.jsonl")
    assert all(set(line) == FIELDS for line in lines)
    assert {(line["train_size"], line["seed"]) for line in lines} == {(24, 3)}
    ranked = {"ndcg", "no_gain_rate"}  # of the 3 queries; all else of the 12 examples
    assert all(line["n"] == (3 if line["metric"] in ranked else 12) for line in lines)
    keys = [(line["task"], line["system"], line["metric"]) for line in lines]
    assert len(set(keys)) == len(keys)
    for line in lines:
        floor = line["system"] in ("majority class", "bag of words", "most frequent tag per word")
        assert line["pretrained"] is (None if floor else True)
        assert line["low"] <= line["high"]
        if line["run"]:
            assert (finished / line["run"] / "run.json").is_file()
        assert bool(line["run"]) is not floor
    by_key = dict(zip(keys, lines, strict=True))
    for task, metric in (("esci", "macro_f1"), ("queryner", "entity_f1")):
        scores = finished / "runs" / f"{task}-lora" / "eval" / task / "test.metrics.json"
        told = read_json(scores)["metrics"]
        line = by_key[task, "LoRA", metric]
        assert line["value"] == told[metric]["value"]
        assert line["invalid_rate"] == told["invalid_rate"]["value"]
        assert (line["low"], line["high"]) == (told[metric]["low"], told[metric]["high"])


def test_the_report_tells_everything_needed_to_run_it_again(config, finished, again, tiny_base):
    report = (finished / "report.md").read_text(encoding="utf-8")
    assert "NOT A RESULT" in report
    assert again.strip() in report
    assert sha256_of([tiny_base / "model.safetensors"]) in report
    assert to_json(config) in report
    assert read_json(finished / "run.json")["run_id"] in report


def test_a_study_that_is_no_smoke_run_has_no_warning(config, finished, make_config):
    real = make_config("study", "quickstart")
    scores = [study._collect(config, task, study.Workdir(finished)) for task in config.tasks]
    assert "NOT A RESULT" in study.report.tables(config, scores)
    assert "NOT A RESULT" not in study.report.tables(real, scores)


def test_the_difference_is_between_the_tuned_model_and_the_best_few_shot(config, finished):
    for task in config.tasks:
        found = study._collect(config, task, study.Workdir(finished))
        systems = {row.system: row for row in found.systems}
        few_shot = systems["zero-shot" if found.chosen == 0 else f"{found.chosen}-shot"]
        for metric, (difference, low, high, _) in found.difference.items():
            ours, theirs = systems["LoRA"].metrics[metric], few_shot.metrics[metric]
            assert difference == pytest.approx(ours.value - theirs.value, abs=1e-12)
            assert low <= high
        assert found.shared == found.systems[0].n == 12
        assert found.chosen == max(found.shots, key=lambda k: found.shots[k].value)
