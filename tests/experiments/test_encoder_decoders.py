"""Encoder-decoders trained and scored by the commands that decoders are trained and scored by."""

import jax
import pytest

from ecomjax.errors import UserError
from ecomjax.experiments import finetune
from ecomjax.experiments.files import read_json, read_jsonl
from ecomjax.hf.checkpoints import save_pretrained
from ecomjax.hf.tokenizer import Tokenizer
from ecomjax.models import registry
from ecomjax.models.bart import BartConfig
from ecomjax.models.t5 import T5Config
from ecomjax.training.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def configured(make_config, tiny_base, tmp_path_factory):
    """Function (task, model, changes) -> config of a short run on a random model, 32 wide."""
    tokenizer = Tokenizer.from_folder(tiny_base)
    shapes = {
        "t5_small": T5Config(tokenizer.vocab_size, 32, 1, 1, 2, 16, 64),
        "bart_base": BartConfig(tokenizer.vocab_size, 32, 1, 1, 2, 2, 64, 64, 160, start=(1, 0)),
    }
    folder = tmp_path_factory.mktemp("base")
    for name, shape in shapes.items():
        params = jax.device_get(registry.init(registry.build(shape), jax.random.key(0)))
        save_pretrained(folder / name, shape, params, tokenizer)
    shared = {"training.row_length": 160, "training.rows": 2, "training.validation_examples": 0}
    shared |= {"evaluation.split": "validation"}

    def make(task, model, changes=()):
        own = {"model.path": str(folder / model)} | shared | dict(changes)
        return make_config("finetune", f"{task},{model}", own)

    return make


def test_eight_answers_are_learnt_by_heart(configured, run, tmp_path):
    changes = {
        "data.train_size": 8,
        "data.validation_size": 4,
        "evaluation.split": "train",
        "training.epochs": 40,
        "training.batch_size": 8,
        "training.rows": 4,
        "training.evaluate_every": 200,
        "training.checkpoint_every": 200,
        "optimizer.learning_rate": 1e-2,
    }
    run(configured("esci", "bart_base", changes), tmp_path)
    scores = read_json(tmp_path / "eval" / "esci" / "train.metrics.json")
    assert (scores["n"], scores["metrics"]["accuracy"]["value"]) == (8, 1.0)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_an_adapter_for_two_tasks_reads_back(configured, run, tmp_path):
    changes = {"training.tune": "lora", "training.epochs": 1, "data.train_size": 8}
    run(configured("esci+queryner", "t5_small", changes), tmp_path)
    best = Checkpoints(tmp_path / "checkpoints").best()
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    (told,) = (x for x in lines if x["step"] == best and "validation/loss" in x)
    for task, metric in (("esci", "accuracy"), ("queryner", "invalid_rate")):
        path = tmp_path / "eval" / task / "validation.metrics.json"
        found = read_json(path)["metrics"][metric]["value"]
        assert found == pytest.approx(told[f"validation/{task}/{metric}"])


def test_it_is_asked_to_write_and_nothing_else(configured, tmp_path):
    for method in ("likelihood", "constrained"):
        config = configured("esci", "t5_small", {"task.method": method})
        with pytest.raises(UserError, match=f"encoder-decoder, which is not asked by '{method}'"):
            finetune.run(config, str(tmp_path))
