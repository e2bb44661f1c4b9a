import dataclasses
import json
import shutil
from unittest import mock

import pytest

from ecomjax.data.sources import SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.errors import UserError
from ecomjax.evaluation.predict import Prediction, Predictor
from ecomjax.evaluation.run import predictions_of_records, score
from ecomjax.experiments import evaluate, finetune
from ecomjax.experiments.assembly import check_settings, load_examples
from ecomjax.experiments.files import read_json, read_jsonl
from ecomjax.experiments.given import sha256_of_adapter
from ecomjax.tasks import prompts
from ecomjax.tasks.base import Invalid
from ecomjax.tasks.registry import get_task

TASK = get_task("esci")


@pytest.fixture(scope="module")
def config(make_config):
    return make_config("finetune", changes={"training.epochs": 1})


@pytest.fixture(scope="module")
def adapted(config, as_in_production, tmp_path_factory):
    """A trained and scored run; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "esci"
    with as_in_production():
        finetune.run(config, str(folder))
        evaluate.run(config, str(folder))
    return folder


def no_model(*_, **__):
    raise AssertionError("the model was asked again")


@pytest.fixture
def asked(monkeypatch):
    """Puts a stand-in for the model: function (example, demonstrations) -> prediction.

    Returns the list of requests as (examples, demonstrations of the first).
    """
    requests = []

    def use(answer):
        def predict(self, variables, examples, demonstrations=(), on_done=None):
            shown = demonstrations or [[]] * len(examples)
            requests.append((list(examples), list(shown[0])))
            values = [answer(*each) for each in zip(examples, shown, strict=True)]
            return [Prediction(value, str(value)) for value in values]

        monkeypatch.setattr(Predictor, "predict", predict)
        return requests

    return use


def test_an_adapter_is_scored_on_the_split_and_the_records_tell_the_score(config, adapted):
    result = read_json(adapted / "eval" / "esci" / "test.metrics.json")
    records = read_jsonl(adapted / "eval" / "esci" / "test.predictions.jsonl")
    examples = load_examples(TASK, config.data, "test")
    assert [record["id"] for record in records] == [example.id for example in examples]
    assert result["n"] == len(examples) == 12
    assert (result["inputs_also_in_train"], result["truncated"]) == (0, 0)
    for record in records:
        assert record["prediction"] == max(record["scores"], key=lambda k: record["scores"][k])
    again = score(TASK, predictions_of_records(records), examples, 50, 0)
    assert {"macro_f1", "ece", "ndcg"} <= again.keys()
    for name, found in again.items():
        told = result["metrics"][name]
        assert (found.value, found.low, found.high) == (told["value"], told["low"], told["high"])


def test_what_is_scored_stays_scored(config, adapted, contents, monkeypatch, capsys):
    before = contents(adapted)
    monkeypatch.setattr(Predictor, "predict", no_model)
    evaluate.run(config, str(adapted))
    assert contents(adapted) == before
    assert "esci test: macro_f1" in capsys.readouterr().err


def test_it_is_the_adapter_that_is_scored(config, adapted, make_config, tmp_path):
    """Its label scores differ from the untuned model's on the same prompts."""
    evaluate.run(make_config("icl", changes={"fewshot.shots": (0,)}), str(tmp_path))
    tuned, untuned = (
        {r["id"]: r["scores"]["Exact"] for r in read_jsonl(folder / "eval" / "esci" / name)}
        for folder, name in (
            (adapted, "test.predictions.jsonl"),
            (tmp_path, "test-0-shot.predictions.jsonl"),
        )
    )
    assert tuned.keys() == untuned.keys()
    assert min(abs(tuned[id] - untuned[id]) for id in tuned) > 1e-3


def test_other_settings_do_not_pass_for_the_scores_on_disk(make_config, adapted, contents):
    before = contents(adapted)
    other = make_config("finetune", changes={"training.epochs": 1, "evaluation.resamples": 51})
    with pytest.raises(UserError, match=r"other settings of evaluation.*test\.metrics\.json"):
        evaluate.run(other, str(adapted))
    assert contents(adapted) == before


def test_another_adapter_of_the_run_does_not_pass_for_the_one_scored(
    config, adapted, make_adapter, tmp_path
):
    run = shutil.copytree(adapted, tmp_path / "run")
    evaluate.run(config, str(run))
    shutil.copytree(make_adapter(3), run / "adapter", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"other settings of .*adapter.*test\.metrics\.json"):
        evaluate.run(config, str(run))


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(type(TASK), "system", "Judge."),
        lambda patch: patch.setattr(prompts, "ALPACA", prompts.ALPACA.replace("Below", "Here")),
        lambda patch: patch.setattr(type(TASK), "user", lambda self, e: e.inputs["query"]),
    ],
    ids=["system text", "wrapper", "what is shown"],
)
def test_scores_of_other_prompts_do_not_pass_for_those_asked(
    make_config, asked, tmp_path, monkeypatch, change
):
    asked(lambda example, shown: example.target)
    icl = make_config("icl", changes={"fewshot.shots": (0,), "task.prompt": "alpaca"})
    evaluate.run(icl, str(tmp_path))
    change(monkeypatch)
    with pytest.raises(UserError, match=r"other settings of .*prompts or.*validation-0-shot"):
        evaluate.run(icl, str(tmp_path))


def test_demonstrations_are_told_apart_by_all_that_is_shown_of_them(make_config, asked, tmp_path):
    """Such as their instruction, which is neither their input nor their answer."""
    place = tmp_path / "data" / "instruction"
    place.mkdir(parents=True)

    def write(split, instruction):
        rows = [
            {"example_id": f"{split}{i}", "instruction": instruction, "output": "yes"}
            | {"input": f"{split} {i}"}
            for i in range(3)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{split}.jsonl").write_text(lines, encoding="utf-8")

    for split in ("train", "validation", "test"):
        write(split, "Answer it")
    local = {"data.source": "local", "data.path": str(tmp_path / "data"), "fewshot.shots": (1,)}
    config = make_config("icl", "instruction", local)
    asked(lambda example, shown: example.target[0])
    evaluate.run(config, str(tmp_path / "run"))
    write("train", "Answer")
    with pytest.raises(UserError, match=r"or demonstrations: .*validation-1-shot"):
        evaluate.run(config, str(tmp_path / "run"))


def test_hosts_compare_their_adapters_and_prompts(
    config, adapted, make_config, make_adapter, asked, tmp_path, monkeypatch
):
    compared = []
    monkeypatch.setattr(evaluate.hosts, "check_same", lambda *given: compared.append(given))
    asked(lambda example, shown: example.target)
    run = shutil.copytree(adapted, tmp_path / "run")
    shutil.rmtree(run / "eval")
    evaluate.run(config, str(run))
    adapter = sha256_of_adapter(run / "adapter")
    wanted = read_json(run / "eval" / "esci" / "test.metrics.json")["evaluation"]
    assert wanted["adapter"] == adapter
    assert {"adapter", "examples", "prompts"} == dict(compared).keys()
    assert dict(compared)["adapter"] == {"adapter": adapter}
    assert dict(compared)["prompts"] == wanted["prompts"]
    compared.clear()
    other = make_adapter(3)
    evaluate.run(make_config("score", changes={"adapters": (str(other),)}), str(tmp_path / "two"))
    assert dict(compared)["adapter"] == [sha256_of_adapter(other)]


def test_predictions_of_another_run_do_not_pass_for_those_that_were_scored(
    config, adapted, contents
):
    kept = adapted / "eval" / "esci" / "test.predictions.jsonl"
    before = kept.read_bytes()
    try:
        for changed in (before + b"\n", b""):
            kept.write_bytes(changed)
            with pytest.raises(UserError, match=r"not those .* scored: .*predictions\.jsonl"):
                evaluate.run(config, str(adapted))
        kept.unlink()
        with pytest.raises(UserError, match="not those that were scored"):
            evaluate.run(config, str(adapted))
    finally:
        kept.write_bytes(before)
    evaluate.run(config, str(adapted))


def test_other_data_do_not_pass_for_those_that_were_scored(config, adapted, monkeypatch):
    changed = load_examples(TASK, config.data, "test")
    other = "Exact" if changed[0].target != "Exact" else "Irrelevant"
    changed[0] = dataclasses.replace(changed[0], target=other)
    for examples in (changed, changed[1:]):
        monkeypatch.setattr(evaluate, "load_examples", lambda *_, found=examples: found)
        with pytest.raises(UserError, match=r"the data are not those .* scored: .*predictions"):
            evaluate.run(config, str(adapted))


def test_another_batch_size_is_no_other_setting(make_config, adapted, contents):
    before = contents(adapted)
    other = make_config("finetune", changes={"training.epochs": 1, "evaluation.batch_size": 3})
    evaluate.run(other, str(adapted))
    assert contents(adapted) == before


def test_another_split_is_scored_beside_it(make_config, adapted, asked, tmp_path):
    changes = {"training.epochs": 1, "evaluation.split": "validation"}
    requests = asked(lambda example, shown: example.target)
    evaluate.run(make_config("finetune", changes=changes), str(adapted))
    ((examples, shown),) = requests
    assert not shown and len(examples) == 8
    place = adapted / "eval" / "esci"
    assert read_json(place / "validation.metrics.json")["metrics"]["accuracy"]["value"] == 1.0
    for kind in ("metrics.json", "predictions.jsonl"):
        (place / f"validation.{kind}").unlink()


@pytest.mark.parametrize(
    ("task", "changes", "told"),
    [
        ("queryner", {"task.label_score": "mean"}, r"task queryner; leave its label_score"),
        (
            "esci",
            {"task.label_score": "mean", "task.method": "constrained"},
            r"not found by .*task esci; leave its label_score at sum",
        ),
        ("esci", {"evaluation.temperature": 0.5}, r"not drawn: config\.evaluation\.temperature"),
        (
            "queryner",
            {"evaluation.top_p": 0.5, "task.method": "constrained"},
            r"not drawn: config\.evaluation\.top_p",
        ),
        ("esci", {"evaluation.top_k": 5}, r"5 for .*not drawn: config\.evaluation\.top_k"),
        ("esci", {"evaluation.stop": ("x",)}, r"not drawn: config\.evaluation\.stop"),
        ("queryner", {"task.method": "likelihood"}, r"no closed set.*queryner; set its method"),
        ("queryner", {"evaluation.min_p": 0.1}, r"0\.1 for .* greedy: config\.evaluation\.min_p"),
    ],
)
def test_settings_that_would_be_ignored_are_told_before_a_model_is_loaded(
    make_config, tmp_path, monkeypatch, task, changes, told
):
    for experiment, module in (("icl", evaluate), ("finetune", finetune)):
        monkeypatch.setattr(module, "load_base", no_model)
        with pytest.raises(UserError, match=told):
            module.run(make_config(experiment, task, changes), str(tmp_path))


def test_one_task_of_several_may_use_a_setting(make_config):
    config = make_config("finetune", "esci+queryner", {"evaluation.temperature": 0.5})
    check_settings(config.tasks, config.evaluation)


def test_without_an_adapter_nothing_is_made(config, tmp_path):
    with pytest.raises(UserError, match=r"no adapter.*launch\.train"):
        evaluate.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_dying_between_the_two_files_leaves_no_scores(config, make_config, asked, tmp_path):
    """The scores are written last: with them, the predictions are there, and not asked again."""
    requests = asked(lambda example, shown: example.target)
    icl = make_config("icl", changes={"fewshot.shots": (0,)})
    with mock.patch.object(evaluate, "write_json", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(icl, str(tmp_path))
    names = {path.name for path in (tmp_path / "eval" / "esci").iterdir()}
    assert names == {f"validation-0-shot.{kind}.jsonl" for kind in ("predictions", "partial")}
    requests.clear()
    evaluate.run(icl, str(tmp_path))
    assert [len(examples) for examples, _ in requests] == [12]  # of test alone


def test_an_interrupted_evaluation_asks_for_what_is_missing_and_ends_alike(
    make_config, asked, tmp_path, contents, monkeypatch
):
    monkeypatch.setattr(evaluate, "KEPT_AFTER", 2)
    changes = {"fewshot.shots": (0,), "evaluation.batch_size": 2}
    config, left = make_config("icl", changes=changes), [5]

    def answer(example, shown):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return example.target

    requests = asked(answer)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config, str(tmp_path / "run"))
    (partial,) = (tmp_path / "run" / "eval" / "esci").iterdir()
    # The process may have died while it wrote.
    partial.write_bytes(partial.read_bytes() + b'{"id": "half a li')
    first = [e.id for e in requests[0][0]]
    requests.clear()
    left[0] = 99
    evaluate.run(config, str(tmp_path / "run"))
    assert [len(examples) for examples, _ in requests] == [4, 4, 4, 4]
    assert not set(first) & {e.id for e in requests[0][0]}
    evaluate.run(config, str(tmp_path / "whole"))
    same, whole = (contents(tmp_path / folder / "eval") for folder in ("run", "whole"))
    assert same == whole and not any("partial" in str(path) for path in same)


def test_no_smaller_batch_is_left_for_the_end(make_config, asked, tmp_path, monkeypatch):
    """It would be another shape: what is left over goes with the batches before it."""
    monkeypatch.setattr(evaluate, "KEPT_AFTER", 1)
    requests = asked(lambda example, shown: example.target)
    changes = {"fewshot.shots": (0,), "evaluation.batch_size": 5}
    evaluate.run(make_config("icl", changes=changes), str(tmp_path))
    assert [len(examples) for examples, _ in requests] == [8, 5, 7]


def test_a_prompt_that_is_too_long_is_told_before_any_is_asked(
    config, make_config, asked, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "KEPT_AFTER", 1)
    requests = asked(lambda example, shown: example.target)
    *examples, last = load_examples(TASK, config.data, "validation")
    last = dataclasses.replace(last, inputs={**last.inputs, "query": "shoe " * 1024})
    monkeypatch.setattr(evaluate, "load_examples", lambda *_: [*examples, last])
    changes = {"fewshot.shots": (0,), "evaluation.batch_size": 2}
    with pytest.raises(UserError, match=rf"no room .* esci, example {last.id}"):
        evaluate.run(make_config("icl", changes=changes), str(tmp_path))
    assert not requests


def test_what_was_begun_with_other_settings_is_begun_anew(make_config, asked, tmp_path, capsys):
    requests = asked(lambda example, shown: example.target)
    icl = make_config("icl", changes={"fewshot.shots": (0,)})
    with mock.patch.object(evaluate, "write_json", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(icl, str(tmp_path))
    path = tmp_path / "eval" / "esci" / "validation-0-shot.partial.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"resamples": 50', b'"resamples": 51', 1))
    requests.clear()
    evaluate.run(icl, str(tmp_path))
    assert [len(examples) for examples, _ in requests] == [8, 12]


@pytest.mark.parametrize(
    ("right", "chosen"),
    [
        (lambda shots, split: shots == 2, 2),
        (lambda shots, split: shots == 0, 0),
        (lambda shots, split: True, 0),
        (lambda shots, split: (shots == 2) == (split == "validation"), 2),
    ],
    ids=["the most", "none", "the fewest of equals", "whatever is better on test"],
)
def test_demonstrations_are_counted_by_validation(
    make_config, asked, tmp_path, monkeypatch, right, chosen
):
    config = make_config("icl", changes={"fewshot.shots": (0, 1, 2)})
    validation = {e.id for e in load_examples(TASK, config.data, "validation")}

    def answer(example, shown):
        split = "validation" if example.id in validation else "test"
        return example.target if right(len(shown), split) else Invalid("?", "not asked for")

    requests = asked(answer)
    evaluate.run(config, str(tmp_path))
    shots = read_json(tmp_path / "eval" / "esci" / "shots.json")
    assert (shots["chosen"], shots["split"], shots["excluded"]) == (chosen, "test", 0)
    on_test = [len(shown) for found, shown in requests if found[0].id not in validation]
    assert on_test == sorted({0, chosen})
    assert [len(shown) for found, shown in requests if found[0].id in validation] == [0, 1, 2]


def test_fewer_demonstrations_are_the_first_of_more_and_come_from_train(
    make_config, asked, tmp_path
):
    config = make_config("icl", changes={"fewshot.shots": (3, 1), "data.train_size": 5})
    requests = asked(lambda example, shown: example.target)
    evaluate.run(config, str(tmp_path))
    train = {example.id for example in load_examples(TASK, config.data, "train")}
    longest = max((shown for _, shown in requests), key=len)
    assert {example.id for example in longest} <= train and len(longest) == 3
    for _, shown in requests:
        assert shown == longest[: len(shown)]
    names = {path.name for path in (tmp_path / "eval" / "esci").glob("test-*.metrics.json")}
    assert names == {"test-1-shot.metrics.json"}


@pytest.fixture
def leaky_data(tmp_path):
    """A folder whose test and validation splits hold rows of train, by text or by id."""
    rows = {
        split: [dict(row.values) for row in SyntheticSource(0, Sizes(4, 4, 6)).rows("esci", split)]
        for split in ("train", "validation", "test")
    }
    train = rows["train"]
    rows["validation"].append(train[0] | {"example_id": 900})
    rows["test"].append(train[1] | {"example_id": 901, "esci_label": "I"})
    rows["test"].append(rows["test"][0] | {"example_id": train[2]["example_id"]})
    folder = tmp_path / "data" / "esci"
    folder.mkdir(parents=True)
    for split, values in rows.items():
        lines = "".join(json.dumps(value) + "\n" for value in values)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder.parent


def test_scores_after_other_demonstrations_do_not_pass_for_those_asked(
    make_config, asked, leaky_data, tmp_path
):
    """A mended demonstration is another one, even under the same id."""
    local = {"data.source": "local", "data.path": str(leaky_data), "fewshot.shots": (0, 4)}
    asked(lambda example, shown: example.target)
    evaluate.run(make_config("icl", changes=local), str(tmp_path / "run"))
    path = leaky_data / "esci" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[3]["product_brand"] = "Another"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError, match=r"or demonstrations: .*validation-4-shot\.metrics"):
        evaluate.run(make_config("icl", changes=local), str(tmp_path / "run"))


def test_no_example_is_scored_that_a_demonstration_shows(make_config, asked, leaky_data, tmp_path):
    local = {"data.source": "local", "data.path": str(leaky_data), "fewshot.shots": (0, 4)}
    requests = asked(lambda example, shown: example.target)
    evaluate.run(make_config("icl", changes=local), str(tmp_path / "run"))
    demonstrations = max((shown for _, shown in requests), key=len)
    assert len(demonstrations) == 4
    for examples, _ in requests:
        assert not {e.id for e in examples} & {e.id for e in demonstrations}
        assert not {TASK.user(e) for e in examples} & {TASK.user(e) for e in demonstrations}
    shots = read_json(tmp_path / "run" / "eval" / "esci" / "shots.json")
    assert shots["excluded"] == 2
    # Zero-shot is scored on the same examples as the rest.
    assert sorted({len(examples) for examples, _ in requests}) == [4, 6]


def test_what_each_example_was_shown_is_kept_and_never_shares_its_text(
    make_config, asked, leaky_data, tmp_path
):
    """Under a policy of its own for each example no example is left out."""
    changes = {"data.source": "local", "data.path": str(leaky_data), "fewshot.shots": (0, 2)}
    asked(lambda example, shown: example.target if shown else Invalid("?", "no label"))
    config = make_config("icl", changes=changes | {"fewshot.policy": "similar"})
    evaluate.run(config, str(tmp_path / "run"))
    place = tmp_path / "run" / "eval" / "esci"
    shots = read_json(place / "shots.json")
    assert (shots["policy"], shots["excluded"], shots["chosen"]) == ("similar", 0, 2)
    train = {e.id: TASK.user(e) for e in load_examples(TASK, config.data, "train")}
    records = read_jsonl(place / "test-2-shot.predictions.jsonl")
    examples = {e.id: TASK.user(e) for e in load_examples(TASK, config.data, "test")}
    assert [record["id"] for record in records] == list(examples) and len(records) == 8
    for record in records:
        assert len(record["demonstrations"]) == 2 and record["id"] not in record["demonstrations"]
        shown = [train[id] for id in record["demonstrations"]]
        assert examples[record["id"]] not in shown


def test_invalid_outputs_are_wrong_and_stay_in_the_denominator(make_config, asked, tmp_path):
    places = {}

    def answer(example, shown):
        places.setdefault(example.id, len(places))
        even = places[example.id] % 2 == 0
        return example.target if even else Invalid("no idea", "no label")

    asked(answer)
    evaluate.run(make_config("icl", changes={"fewshot.shots": (0,)}), str(tmp_path))
    found = read_json(tmp_path / "eval" / "esci" / "test-0-shot.metrics.json")
    assert found["n"] == 12
    assert found["metrics"]["accuracy"]["value"] == 0.5
    assert found["metrics"]["invalid_rate"]["value"] == 0.5
    records = read_jsonl(tmp_path / "eval" / "esci" / "test-0-shot.predictions.jsonl")
    invalid = [record for record in records if record["invalid"]]
    assert len(invalid) == 6 and all(record["prediction"] is None for record in invalid)


def test_a_few_shot_run_tells_its_base(make_config, asked, tmp_path, tiny_base):
    asked(lambda example, shown: example.target)
    evaluate.run(make_config("icl", changes={"fewshot.shots": (0,)}), str(tmp_path))
    (start,) = read_json(tmp_path / "run.json")["starts"]
    assert start["base"]["path"] == str(tiny_base) and len(start["base"]["sha256"]) == 64


def test_adapters_and_their_base_are_scored_on_the_same_examples(
    config, adapted, make_config, make_adapter, tmp_path, contents, monkeypatch
):
    """A run's own adapter gets the scores that its run has; the base those of zero-shot."""
    other = make_adapter(3)
    chosen = {"adapters": (str(adapted), str(other))}
    evaluate.run(make_config("score", changes=chosen), str(tmp_path / "run"))
    place = tmp_path / "run" / "eval" / "esci"
    names = [f"test-{name}" for name in (adapted.name, other.name, "base")]
    assert {path.name for path in place.glob("*.metrics.json")} == {
        f"{name}.metrics.json" for name in names
    }
    scores = [
        {r["id"]: list(r["scores"].values()) for r in read_jsonl(path)}
        for path in (
            adapted / "eval" / "esci" / "test.predictions.jsonl",
            *(place / f"{name}.predictions.jsonl" for name in names),
        )
    ]
    for id, values in scores[0].items():
        assert scores[1][id] == pytest.approx(values, rel=1e-5)
        for unlike in scores[2:]:
            assert unlike[id] != pytest.approx(values, rel=1e-3)
    before = contents(tmp_path / "run" / "eval")
    evaluate.run(make_config("score", changes={"adapters": (str(other),)}), str(tmp_path / "run"))
    assert contents(tmp_path / "run" / "eval") == before
    monkeypatch.setattr(evaluate, "load_base", no_model)
    for name in ("line\nbreak", "a b", ".adapter"):
        strange = shutil.copytree(other, tmp_path / name)
        with pytest.raises(UserError, match=r"adapter in a folder named .*: config\.adapters"):
            evaluate.run(make_config("score", changes={"adapters": (str(strange),)}), str(tmp_path))
    with pytest.raises(UserError, match="two systems called"):
        twice = make_config("score", changes={"adapters": (str(other), str(other))})
        evaluate.run(twice, str(tmp_path / "run"))


def test_another_adapter_in_the_same_folder_does_not_pass_for_the_one_scored(
    make_config, asked, make_adapter, tmp_path
):
    asked(lambda example, shown: example.target)
    given = {"adapters": (str(make_adapter(3)),), "base": False}
    evaluate.run(make_config("score", changes=given), str(tmp_path / "run"))
    make_adapter(3, alpha=1.0)
    with pytest.raises(UserError, match=r"scored before with other.*adapter-3\.metrics"):
        evaluate.run(make_config("score", changes=given), str(tmp_path / "run"))


def test_draws_depend_neither_on_batches_nor_on_where_an_evaluation_was_interrupted(
    make_config, tmp_path, monkeypatch, as_in_production
):
    monkeypatch.setattr(evaluate, "KEPT_AFTER", 1)
    sampled = {"fewshot.shots": (0,), "evaluation.temperature": 1.0, "data.test_size": 6}
    texts = []
    for size in (4, 6):
        config = make_config("icl", "queryner", sampled | {"evaluation.batch_size": size})
        with as_in_production():
            evaluate.run(config, str(tmp_path / str(size)))
        kept = tmp_path / str(size) / "eval" / "queryner" / "test-0-shot.predictions.jsonl"
        texts.append([record["text"] for record in read_jsonl(kept)])
    assert texts[0] == texts[1] and len(set(texts[0])) == 6


def test_where_every_example_is_shown_there_is_nothing_to_score(make_config, asked, tmp_path):
    folder = tmp_path / "data" / "esci"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        rows = [
            dict(row.values) for row in SyntheticSource(0, Sizes(2, 2, 2)).rows("esci", "train")
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = {"data.source": "local", "data.path": str(folder.parent), "fewshot.shots": (0, 2)}
    with pytest.raises(UserError, match=r"every example of validation.*config\.fewshot\.shots"):
        evaluate.run(make_config("icl", changes=local), str(tmp_path / "run"))
