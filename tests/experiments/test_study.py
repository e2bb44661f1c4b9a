import contextlib
import re

import pytest

from ecomjax.errors import UserError
from ecomjax.experiments import estimate, study
from ecomjax.experiments.files import read_json, read_jsonl, write_jsonl
from ecomjax.experiments.workdir import Workdir
from ecomjax.preemption import Preempted
from tests.experiments.studies import MadeUp

FIELDS = {
    *("system", "task", "train_size", "seed", "metric", "value", "low", "high", "n"),
    *("invalid_rate", "pretrained", "run"),
}
FLOORS = {"esci": {"majority class", "bag of words"}, "queryner": {"most frequent tag per word"}}
SYSTEMS = {"zero-shot", "2-shot", "LoRA", "mixed (concatenate)", "merged (linear)"}


@pytest.fixture(scope="module")
def config(make_config):
    rates = {"grid.learning_rates": (5e-4, 1e-3), "grid.seeds": (3,)}
    return make_config("study", "smoke", {"tasks": ("esci", "queryner")} | rates)


def put_in(fakes, patch):
    """Puts experiments that take no time in place of the real ones."""
    patch.setattr(study.finetune, "run", fakes.finetune)
    patch.setattr(study.finetune, "run_together", fakes.finetune_together)
    patch.setattr(study.evaluate, "run", fakes.evaluate)
    patch.setattr(study.merged, "run", fakes.merge)


@pytest.fixture
def made_up(monkeypatch):
    """The experiments of this test."""
    fakes = MadeUp()
    put_in(fakes, monkeypatch)
    return fakes


@pytest.fixture(scope="module")
def first(config, tmp_path_factory):
    """The folder of a finished study, and the experiments that it took, in their order."""
    folder, fakes = tmp_path_factory.mktemp("runs") / "study", MadeUp()
    with pytest.MonkeyPatch.context() as patch:
        put_in(fakes, patch)
        study.run(config, str(folder))
    return folder, tuple(fakes.calls)


@pytest.fixture
def finished(first):
    """The folder; tests must leave it as it is."""
    return first[0]


def test_rows_of_ones_own_go_through_a_whole_study(made_up, make_config, tmp_path):
    """Given nothing but their folder, and what kind of answers they have."""
    for split, count in (("train", 12), ("validation", 6), ("test", 9)):
        rows = [
            {
                "instruction": "Good or bad?",
                "input": f"{split} {i}",
                "output": ("good", "bad")[i % 2],
            }
            for i in range(count)
        ]
        write_jsonl(tmp_path / "mine" / "instruction" / f"{split}.jsonl", rows)
    options = "finetune.instruction.tasks.instruction.options"
    config = make_config(
        "study",
        "own",
        {
            "data.path": str(tmp_path / "mine"),
            f"{options}.score": "label",
            f"{options}.labels": ("good", "bad"),
            "icl.instruction.fewshot.shots": (0, 2),
        },
    )
    study.run(config, str(tmp_path / "study"))
    lines = read_jsonl(tmp_path / "study" / "results.jsonl")
    assert {line["system"] for line in lines} == FLOORS["esci"] | {"zero-shot", "2-shot", "LoRA"}
    assert {(line["task"], line["train_size"], line["n"]) for line in lines} == {
        ("instruction", 12, 9)
    }
    # Both learning rates are tried, and the better one is asked for test.
    assert [what for what, _ in made_up.calls].count("train") == 2


def test_results_name_what_is_needed_to_compare_them(finished):
    lines = read_jsonl(finished / "results.jsonl")
    assert all(set(line) == FIELDS for line in lines)
    keys = [(line["task"], line["system"], line["metric"]) for line in lines]
    assert len(set(keys)) == len(keys)
    for task, floors in FLOORS.items():
        found = {line["system"] for line in lines if line["task"] == task}
        assert found == floors | SYSTEMS
    for line in lines:
        assert (line["train_size"], line["n"]) == (24, 12)
        assert line["low"] <= line["high"]
        floor = line["system"] in FLOORS[line["task"]]
        assert line["pretrained"] is (None if floor else True)
        assert bool(line["run"]) is not floor
        assert line["seed"] == (0 if floor or "shot" in line["system"] else 3)
        if line["run"]:
            folder = Workdir(finished / line["run"])
            kept = list((folder.path / "eval" / line["task"]).glob("test*.metrics.json"))
            told = [read_json(path)["metrics"][line["metric"]] for path in kept]
            assert {key: line[key] for key in ("value", "low", "high", "n")} in told


def test_every_candidate_is_trained_and_the_best_on_validation_alone_scored(first):
    finished, calls = first
    trained = [name for experiment, name in calls if experiment == "train"]
    scored = [name for experiment, name in calls if experiment == "score"]
    assert len(trained) == 6  # Two learning rates, of each of the tasks and of their mixture.
    assert len(set(scored)) == len(scored)
    for system in ("lora-esci", "lora-queryner", "mixed-concatenate"):
        candidates = [name for name in trained if name.startswith(system)]
        told = read_json(finished / "runs" / f"{system}-n24-s3" / "chosen.json")
        assert set(told["validation"]) == set(candidates)
        (chosen,) = set(scored) & set(candidates)
        assert told["chosen"] == chosen == max(candidates, key=told["validation"].__getitem__)
        for name in candidates:
            folder = Workdir(finished / "runs" / name)
            best = study.best_of(folder, "metric")
            assert told["validation"][name] == best
            # 1 - headline, as the experiments here make it up.
            assert study.best_of(folder, "loss") == pytest.approx(best - 1)


def test_merges_are_of_the_chosen_adapters(finished):
    merged = read_json(finished / "runs" / "merged-linear-all-n24-s3" / "config.json")
    chosen = [
        read_json(finished / "runs" / f"lora-{task}-n24-s3" / "chosen.json")["chosen"]
        for task in ("esci", "queryner")
    ]
    assert merged["adapters"] == [str(finished / "runs" / name) for name in chosen]


def test_what_is_finished_is_not_done_again(config, finished, made_up, contents, capsys):
    before = contents(finished)
    study.run(config, str(finished))
    assert made_up.calls == []
    assert contents(finished) == before
    assert "| LoRA " in capsys.readouterr().out


def test_f53_killed_anywhere_and_restarted_it_gives_the_same_results(
    config, first, made_up, tmp_path
):
    """Killed once before each of its experiments."""
    (finished, undisturbed), killed = first, set()

    def kill(call):
        if call not in killed:
            killed.add(call)
            raise Preempted

    made_up.before = kill
    folder = tmp_path / "killed"
    for _ in undisturbed:
        with pytest.raises(Preempted):
            study.run(config, str(folder))
        assert not (folder / "results.jsonl").exists()
    study.run(config, str(folder))
    assert tuple(made_up.calls) == undisturbed
    assert (folder / "results.jsonl").read_bytes() == (finished / "results.jsonl").read_bytes()


@pytest.mark.parametrize("error", [UserError("no memory", "here", "buy some"), ZeroDivisionError()])
def test_f54_a_failed_run_is_told_and_does_not_stop_the_others(
    config, finished, made_up, tmp_path, error
):
    failing, folder = "lora-esci-n24-s3-lr5e-4", tmp_path / "failing"

    def fail(call):
        if call[1] == failing:
            raise error

    made_up.before = fail
    with pytest.raises(UserError, match=f"4 of 13 runs have no result, first {failing}"):
        study.run(config, str(folder))
    told = read_json(folder / "runs" / failing / "failed.json")
    assert ("ZeroDivisionError" in (told["traceback"] or "")) is not isinstance(error, UserError)
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert f"**{failing}:** {told['error']}" in report
    assert f"**lora-esci-n24-s3:** it needs {failing}, which failed" in report
    systems = {(line["task"], line["system"]) for line in read_jsonl(folder / "results.jsonl")}
    assert ("queryner", "LoRA") in systems and ("esci", "mixed (concatenate)") in systems
    assert ("esci", "LoRA") not in systems and ("queryner", "merged (linear)") not in systems

    made_up.before = lambda call: None
    study.run(config, str(folder))
    assert (folder / "results.jsonl").read_bytes() == (finished / "results.jsonl").read_bytes()
    assert not (folder / "runs" / failing / "failed.json").exists()
    mended = (folder / "report.md").read_text(encoding="utf-8")
    assert "Runs without a result" in report and "Runs without a result" not in mended


def test_f55_runs_of_another_process_are_passed_over_and_looked_at_again(
    config, finished, made_up, tmp_path, monkeypatch, capsys
):
    folder, taken = tmp_path / "shared", "lora-queryner-n24-s3-lr1e-3"
    own = study.grid.runs(config)
    (section,) = [run.config for run in own if run.name == taken]
    with contextlib.ExitStack() as other:
        other.enter_context(Workdir(folder / "runs" / taken).writing(section))
        monkeypatch.setattr(study, "_pause", other.close)
        study.run(config, str(folder))
    assert f"{taken}: process" in capsys.readouterr().err
    trained = [name for experiment, name in made_up.calls if experiment == "train"]
    assert trained.count(taken) > 1 and trained[-1] == taken  # Before that in vain.
    assert (folder / "results.jsonl").read_bytes() == (finished / "results.jsonl").read_bytes()


def test_a_study_that_another_process_writes_its_report_of_waits_for_it(
    config, finished, made_up, monkeypatch
):
    with contextlib.ExitStack() as other:
        other.enter_context(Workdir(finished).writing(config))
        waits = []
        monkeypatch.setattr(study, "_pause", lambda: (waits.append(1), other.close()))
        study.run(config, str(finished))
    assert waits == [1]


@pytest.mark.parametrize("most", [2, 3])
def test_adapters_trained_together_have_the_same_results(
    make_config, first, made_up, tmp_path, most
):
    """Three learning rates of each; the merges of two seeds want both of them first."""
    rates = {"grid.learning_rates": (5e-4, 1e-3, 2e-3), "grid.seeds": (3, 4)}
    changes = {"tasks": ("esci", "queryner")} | rates
    study.run(make_config("study", "smoke", changes), str(tmp_path / "alone"))
    assert made_up.groups == []
    changes["grid.together"] = most
    study.run(make_config("study", "smoke", changes), str(tmp_path / "study"))
    assert [len(group) for group in made_up.groups] == [most] * (18 // most)
    for group in made_up.groups:
        assert len({name.partition("-n24-")[0] for name in group}) == 1, "one system and task"
    one, other = (tmp_path / name / "results.jsonl" for name in ("alone", "study"))
    assert one.read_bytes() == other.read_bytes()
    study.run(make_config("study", "smoke", changes | {"grid.together": 1}), str(other.parent))


def test_f54_one_of_several_trained_together_fails_alone(make_config, finished, made_up, tmp_path):
    rates = {"grid.learning_rates": (5e-4, 1e-3), "grid.seeds": (3,), "grid.together": 2}
    config = make_config("study", "smoke", {"tasks": ("esci", "queryner")} | rates)
    failing, folder = "lora-esci-n24-s3-lr5e-4", tmp_path / "failing"

    def fail(call):
        if call[1] == failing:
            raise UserError("no memory", "here", "buy some")

    made_up.before = fail
    with pytest.raises(UserError, match=f"of 13 runs have no result, first {failing}"):
        study.run(config, str(folder))
    assert (folder / "runs" / "lora-esci-n24-s3-lr1e-3" / "done.json").exists()
    made_up.before = lambda call: None
    study.run(config, str(folder))
    assert (folder / "results.jsonl").read_bytes() == (finished / "results.jsonl").read_bytes()


def test_progress_tells_place_and_time_left(config, made_up, tmp_path, capsys):
    study.run(config, str(tmp_path / "study"))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run ")]
    assert len(told) == 13
    assert told[0] == "run 1 of 13: few-shot-esci-n24-s0"
    assert re.fullmatch(r"run 3 of 13: lora-esci-n24-s3-lr5e-4, about \d+ s left", told[2])


def test_a_dry_run_lists_everything_and_leaves_nothing(config, made_up, tmp_path, capsys):
    study.dry_run(config, str(tmp_path / "study"))
    told = capsys.readouterr().out.splitlines()
    assert made_up.calls == [] and not (tmp_path / "study").exists()
    assert len(told) == 14
    assert re.match(
        r"run 5 of 13: lora-esci-n24-s3: about \d+ s, after lora-esci-n24-s3-lr", told[4]
    )
    assert "a rough guess" in told[-1]


def test_what_takes_longer_is_estimated_to_take_longer(make_config):
    def needed(**changes):
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        config = make_config("study", "smoke", {"tasks": ("esci", "queryner")} | changed)
        return estimate.operations(study.grid.runs(config))

    once, twice = needed(training__epochs=1), needed(training__epochs=2)
    name = "lora-esci-n24-s0-lr1e-3"
    assert twice[name] == 2 * once[name] > 0
    assert twice["lora-esci-n24-s0"] == once["lora-esci-n24-s0"] > 0
    few = needed(fewshot__shots=(0,))["few-shot-queryner-n24-s0"]
    assert once["few-shot-queryner-n24-s0"] > few > 0


@pytest.mark.slow
def test_a_real_study_of_tiny_models(
    make_config, tiny_encoder, as_in_production, tmp_path, contents
):
    sizes = {"data.train_size": 8, "data.test_size": 6, "data.validation_size": 4}
    few = {"fewshot.shots": (0, 1), "training.epochs": 1, "training.validation_examples": 4}
    tasks = {"tasks": ("esci", "queryner")}
    config = make_config("study", "smoke", sizes | few | tasks, tiny_encoder)
    folder = tmp_path / "study"
    with as_in_production():
        study.run(config, str(folder))
        before = contents(folder)
        study.run(config, str(folder))
    assert contents(folder) == before
    lines = read_jsonl(folder / "results.jsonl")
    for task, floors in FLOORS.items():
        found = {line["system"] for line in lines if line["task"] == task}
        assert found >= floors | {"minilm_l6"} | (SYSTEMS - {"2-shot"})
    for line in lines:
        if line["run"]:
            (kept,) = (folder / line["run"] / "eval" / line["task"]).glob(
                "test-0-shot.metrics.json"
                if line["system"] == "zero-shot"
                else "test*.metrics.json"
            )
            assert read_json(kept)["metrics"][line["metric"]]["value"] == line["value"]
