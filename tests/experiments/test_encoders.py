"""Encoders trained and scored by the commands that decoders are trained and scored by."""

import dataclasses

import jax
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.experiments import evaluate, finetune, learners
from ecomjax.experiments.assembly import load_base, make_tasks
from ecomjax.experiments.files import read_json, read_jsonl
from ecomjax.hf.checkpoints import load_config, load_pretrained
from ecomjax.hf.safetensors_io import SafetensorsFile
from ecomjax.models import registry
from ecomjax.models.heads import SequenceClassifierConfig, TokenClassifierConfig
from ecomjax.tasks.esci import LABELS
from ecomjax.tasks.queryner import TAGS
from ecomjax.tasks.registry import get_task
from ecomjax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def configured(make_config, tiny_encoder):
    """Function (task, changes) -> config of a short run on the tiny encoder."""
    shared = {
        "model.path": str(tiny_encoder),
        "training.row_length": 96,
        "training.epochs": 2,
        "training.validation_examples": 0,
        "evaluation.split": "validation",
        "optimizer.learning_rate": 1e-2,
    }

    def make(task, changes=()):
        return make_config("finetune", f"{task},minilm_l6", shared | dict(changes))

    return make


def told(folder, task, metric):
    """What the best evaluation of training told, and the same of the file of scores."""
    best = Checkpoints(folder / "checkpoints").best()
    lines = read_jsonl(folder / "metrics.jsonl")
    (line,) = (x for x in lines if x["step"] == best and "validation/loss" in x)
    (path,) = (folder / "eval" / task).glob("*.metrics.json")
    return line[f"validation/{task}/{metric}"], read_json(path)["metrics"][metric]["value"]


@pytest.fixture(scope="module")
def trained(configured, run, tmp_path_factory):
    """A finished run; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "queryner"
    run(configured("queryner"), folder)
    return folder


def test_eight_examples_are_learnt_by_heart(configured, run, tmp_path):
    changes = {
        "data.train_size": 8,
        "evaluation.split": "train",
        "training.epochs": 40,
        "training.dropout": 0.0,
        "training.batch_size": 8,
        "training.evaluate_every": 100,
        "training.checkpoint_every": 100,
    }
    run(configured("queryner", changes), tmp_path)
    scores = read_json(tmp_path / "eval" / "queryner" / "train.metrics.json")
    assert (scores["n"], scores["metrics"]["entity_f1"]["value"]) == (8, 1.0)


def test_two_devices_learn_what_one_does(configured, run, trained, tmp_path):
    """With a head that is drawn on them."""
    run(configured("queryner", {"mesh.data": 2}), tmp_path / "two")
    one, two = (read_jsonl(folder / "metrics.jsonl") for folder in (trained, tmp_path / "two"))
    losses = [[x["train/loss"] for x in lines if "train/loss" in x] for lines in (one, two)]
    assert len(losses[0]) == len(losses[1]) > 2
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_a_model_trained_in_full_is_a_folder_of_transformers(trained, tiny_encoder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    assert not (trained / "adapter").exists()
    inner, outer = told(trained, "queryner", "entity_f1")
    assert inner == pytest.approx(outer)
    assert load_config("x", str(trained / "model")).labels == TAGS
    model, info = transformers.AutoModelForTokenClassification.from_pretrained(
        trained / "model", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "model")
    path = trained / "eval" / "queryner" / "validation.predictions.jsonl"
    for record in read_jsonl(path)[:3]:
        fields = tokenizer(" ".join(record["inputs"]["tokens"]), return_tensors="pt")
        with torch.no_grad():
            logits = model.eval()(**fields).logits[0].numpy()
        spans = [fields.word_ids(0)[1:-1], record["inputs"]["tokens"]]
        if len(spans[0]) == len(spans[1]):  # one token a word
            expected = [TAGS[i] for i in logits[1:-1].argmax(-1)]
            assert record["prediction"] == expected
    old = trees.flatten(load_pretrained("x", str(tiny_encoder)).params)
    new = trees.flatten(load_pretrained("x", str(trained / "model")).params["encoder"])
    assert all(np.abs(new[path] - old[path]).max() > 0 for path in old if path != "type_embed")


class Killed(BaseException):
    """No handler of ours may catch it."""


def test_an_interrupted_run_ends_like_one_that_was_not(
    configured, run, trained, contents, tmp_path, monkeypatch
):
    """Dies in the second epoch."""
    make_train_step = finetune.make_train_step

    def dying(*arguments):
        step, left = make_train_step(*arguments), 7

        def die(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return step(*arguments)

        return die

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "make_train_step", dying)
        with pytest.raises(Killed):
            run(configured("queryner"), tmp_path)
    assert not (tmp_path / "model").exists()
    run(configured("queryner"), tmp_path)
    found, expected = contents(tmp_path), contents(trained)
    scores = "eval/queryner/validation.metrics.json"
    for name in ("metrics.jsonl", "model/model.safetensors", "config.json", scores):
        assert found[name] == expected[name], name


def test_an_adapter_is_trained_with_a_head_and_both_read_back(
    configured, run, tmp_path, tiny_encoder
):
    config = configured("queryner", {"training.tune": "lora"})
    run(config, tmp_path)
    assert (tmp_path / "adapter").is_dir() and not (tmp_path / "model").exists()
    inner, outer = told(tmp_path, "queryner", "entity_f1")
    assert inner == pytest.approx(outer)
    head = SafetensorsFile(tmp_path / "head.safetensors")
    base = load_base(config.model, any_kind=True)
    start = learners.with_head(base, make_tasks(config.tasks), config.training)
    assert {*head} == {"out/kernel", "out/bias"}
    assert np.abs(head["out/kernel"] - start.params["head"]["out"]["kernel"]).max() > 1e-3
    (tmp_path / "head.safetensors").unlink()
    (tmp_path / "eval" / "queryner" / "validation.metrics.json").unlink()
    with pytest.raises(UserError, match="no head"):
        evaluate.run(config, str(tmp_path))


def test_pairs_have_scores_of_their_labels(configured, run, tmp_path):
    run(configured("esci", {"training.too_long": "truncate"}), tmp_path)
    inner, outer = told(tmp_path, "esci", "macro_f1")
    assert inner == pytest.approx(outer)
    assert load_config("x", str(tmp_path / "model")).labels == LABELS
    for record in read_jsonl(tmp_path / "eval" / "esci" / "validation.predictions.jsonl"):
        assert record["prediction"] == max(record["scores"], key=record["scores"].get)
        assert np.exp([*record["scores"].values()]).sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("tasks", "changes", "match"),
    [
        ("review_summarization", {}, "encoder, which gives classes, and the answers are free"),
        ("queryner", {"task.method": "generate"}, "not asked by 'generate'"),
        ("esci", {"task.method": "likelihood"}, "not asked by 'likelihood'"),
        ("esci+queryner", {}, "classes of one task alone"),
        ("esci", {"training.packing": "shared_prefix"}, "no shared prefix"),
    ],
)
def test_what_an_encoder_cannot_do_is_told_before_it_is_loaded(
    configured, tmp_path, monkeypatch, tasks, changes, match
):
    def refuse(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(finetune, "load_base", refuse)
    with pytest.raises(UserError, match=match):
        finetune.run(configured(tasks, changes), str(tmp_path))
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model.quantization": "int8"}, "int8 parameters cannot be trained in full"),
        ({"model.param_dtype": "bfloat16"}, "bfloat16 parameters cannot be trained in full"),
    ],
)
def test_what_cannot_be_trained_in_full_is_told(configured, changes, match):
    with pytest.raises(UserError, match=match):
        configured("queryner", changes)


def test_a_head_for_the_same_classes_is_kept_and_another_replaced(configured, trained, capsys):
    config = configured("queryner", {"model.path": str(trained / "model")})
    base = load_base(config.model, any_kind=True)
    kept = learners.with_head(base, make_tasks(config.tasks), config.training)
    assert kept.params is base.params and kept.config.dropout == config.training.dropout > 0
    pairs = learners.with_head(base, {"esci": get_task("esci")}, config.training)
    assert type(base.config) is TokenClassifierConfig
    assert type(pairs.config) is SequenceClassifierConfig and pairs.config.labels == LABELS
    assert pairs.params["encoder"] is base.params["encoder"]
    shapes, _ = registry.describe(pairs.module)
    found = jax.tree.map(lambda x: x.shape, pairs.params)
    assert found == jax.tree.map(lambda x: x.shape, shapes)
    assert "is replaced by a new one" in capsys.readouterr().err
    assert dataclasses.asdict(pairs.config)["width"] == 32
