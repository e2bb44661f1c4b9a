"""Experiments that take no time: they write what real ones write, made up from their names."""

import hashlib

from ecomjax.errors import UserError
from ecomjax.evaluation.predict import Prediction
from ecomjax.evaluation.run import score, to_record
from ecomjax.experiments.assembly import load_examples, make_tasks
from ecomjax.experiments.config import IclConfig, ScoreConfig
from ecomjax.experiments.files import write_bytes, write_json, write_jsonl
from ecomjax.experiments.workdir import Workdir
from ecomjax.hf.peft import WEIGHTS

BASE = {"name": "tiny", "source": "local", "sha256": "ab" * 32}


def chance(*what):
    """A number in [0, 1) that depends on nothing but what it is of."""
    return hashlib.sha256(repr(what).encode()).digest()[0] / 256


class MadeUp:
    """Stands in for finetune, evaluate and merged.

    Attributes:
        calls: what was done, as (experiment, name of the run folder).
        groups: names of those that were trained together.
        before: called with each of them beforehand; may raise.
    """

    def __init__(self):
        self.calls, self.groups, self.before = [], [], lambda call: None

    def _begin(self, experiment, workdir):
        call = experiment, Workdir(workdir).path.name
        self.before(call)
        self.calls.append(call)
        return Workdir(workdir)

    def finetune(self, config, workdir):
        folder = self._begin("train", workdir)
        with folder.writing(config):
            folder.record_start(base=BASE)
            headline = chance(folder.path.name)
            told = {"validation/headline": headline, "validation/loss": 1 - headline}
            steps = [{"step": 1, "train/tokens": 1000, "train/target_tokens": 40}]
            write_jsonl(folder.metrics, [*steps, {"step": 2} | told])
            write_bytes(folder.adapter / WEIGHTS, bytes(2**20))

    def finetune_together(self, configs, workdirs):
        """As alone; what some of them end in is noted."""
        self.groups.append([Workdir(workdir).path.name for workdir in workdirs])
        ended = []
        for config, workdir in zip(configs, workdirs, strict=True):
            try:
                self.finetune(config, workdir)
                ended.append(None)
            except UserError as error:
                ended.append(error)
        return ended

    def evaluate(self, config, workdir):
        folder = self._begin("score", workdir)
        with folder.writing(config, ignore=("adapters", "evaluation")):
            if isinstance(config, IclConfig):
                self._few_shot(config, folder)
                return
            split = config.evaluation.split
            if isinstance(config, ScoreConfig):
                split = f"{split}-{Workdir(config.adapters[0]).path.name}"
            for task, asked in zip(make_tasks(config.tasks).values(), config.tasks, strict=True):
                assert task.name == asked
                self._scores(task, config, folder, split, config.evaluation.split)

    def merge(self, config, workdir):
        folder = self._begin("merge", workdir)
        with folder.writing(config):
            folder.record_start()
            count = len(config.adapters)
            cosine = [[1.0 if i == j else 0.25 for i in range(count)] for j in range(count)]
            write_json(folder.similarity, {"overall": {"cosine": cosine}})
            write_bytes(folder.adapter / WEIGHTS, bytes(2**21))

    def _few_shot(self, config, folder):
        (task,) = make_tasks({config.task.name: config.task}).values()
        for k in config.fewshot.shots:
            self._scores(task, config, folder, f"validation-{k}-shot", "validation")
            self._scores(task, config, folder, f"test-{k}-shot", "test")
        write_json(folder.path / "eval" / task.name / "shots.json", {"chosen": 2})

    def _scores(self, task, config, folder, name, split):
        examples = load_examples(task, config.data, split)
        predictions = []
        for example in examples:
            drawn = chance(folder.path.name, name, example.id)
            other = examples[0] if drawn < 0.6 else example
            text = "" if drawn < 0.2 else task.answer(other)
            predictions.append(Prediction(task.parse(text, example), text))
        records = [to_record(*pair) for pair in zip(examples, predictions, strict=True)]
        write_jsonl(folder.predictions(task.name, name), records)
        metrics = score(task, predictions, examples, config.evaluation.resamples, 0)
        write_json(folder.scores(task.name, name), {"n": len(examples), "metrics": metrics})
