"""The comparison: floors, few-shot prompting and a tuned adapter, task by task, and a report.

Every run is a folder of its own below `runs/`; finished ones are read, not repeated, so an
interrupted study goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ecomjax.evaluation.floors import floors
from ecomjax.evaluation.predict import Prediction
from ecomjax.evaluation.run import Score, score
from ecomjax.experiments import evaluate, finetune, hosts, report
from ecomjax.experiments.assembly import load_examples, say
from ecomjax.experiments.config import StudyConfig
from ecomjax.experiments.files import read_json, write_jsonl, write_text
from ecomjax.experiments.workdir import Workdir
from ecomjax.metrics.statistics import paired_bootstrap
from ecomjax.tasks.base import Example, Task, overlap
from ecomjax.tasks.registry import get_task


@dataclasses.dataclass(frozen=True)
class SystemScores:
    """One row of a table: a system on the test split.

    Attributes:
        system: its name.
        metrics: {metric: score}.
        n: test examples.
        pretrained: whether it starts from pretrained weights; None for floors.
        run: its run folder, below the study's; empty for floors.
    """

    system: str
    metrics: dict[str, Score]
    n: int
    pretrained: bool | None
    run: str


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """Everything measured on a task.

    Attributes:
        task: its name.
        headline: its main metric.
        train_size: training examples.
        seed: of the tuning.
        shots: {number of demonstrations: validation score of the main metric}.
        validation_size: examples behind those.
        chosen: the number of demonstrations chosen by them.
        systems: the rows of the table, floors first.
        difference: {metric: (tuned - best few-shot, low, high, p)} on shared examples.
        shared: number of those.
        train_overlap: test inputs that are also in train.
    """

    task: str
    headline: str
    train_size: int
    seed: int
    shots: dict[int, Score]
    validation_size: int
    chosen: int
    systems: tuple[SystemScores, ...]
    difference: dict[str, tuple[float, float, float, float]]
    shared: int
    train_overlap: int


def run(config: StudyConfig, workdir: str) -> None:
    """Runs or finishes the study, prints its tables and writes results.jsonl and report.md."""
    study = Workdir(workdir)
    with study.writing(config):
        study.record_start()
        for name in config.tasks:
            few_shot, tuned = _folders(study, name)
            evaluate.run(config.icl[name], str(few_shot.path))
            finetune.run(config.finetune[name], str(tuned.path))
            evaluate.run(config.finetune[name], str(tuned.path))
        hosts.on_main(lambda: _report(config, study))


def _report(config: StudyConfig, study: Workdir) -> None:
    """Puts together what the runs have written."""
    scores = [_collect(config, name, study) for name in config.tasks]
    write_jsonl(study.results, [line for s in scores for line in _lines(s)])
    text = report.render(config, scores, read_json(study.run), _base(study, config))
    write_text(study.report, text)
    print(report.tables(config, scores))
    say(f"report: {study.report}")


def _folders(study: Workdir, task: str) -> tuple[Workdir, Workdir]:
    return study.subrun(f"{task}-few-shot"), study.subrun(f"{task}-lora")


def _base(study: Workdir, config: StudyConfig) -> dict[str, Any]:
    """What the last start of the first tuned run says of base and data."""
    return read_json(_folders(study, config.tasks[0])[1].run)["starts"][-1]["base"]


def _collect(config: StudyConfig, name: str, study: Workdir) -> TaskScores:
    """Reads what the runs of a task have written, and adds floors and the paired comparison."""
    task = get_task(name, **config.icl[name].task.options)
    few_shot, tuned = _folders(study, name)
    settings = config.finetune[name].evaluation
    train = load_examples(task, config.data, "train")
    test = load_examples(task, config.data, settings.split)
    shots = read_json(few_shot.path / "eval" / name / "shots.json")
    chosen = shots["chosen"]

    rows = []
    for floor, predictions in floors(task, train, test).items():
        guesses = [Prediction(value, "") for value in predictions]
        metrics = score(task, guesses, test, settings.resamples, settings.seed)
        rows.append(SystemScores(floor, metrics, len(test), None, ""))
    for k in sorted({0, chosen} & {*config.icl[name].fewshot.shots, chosen}):
        label = "zero-shot" if k == 0 else f"{k}-shot"
        rows.append(_row(label, few_shot, name, f"{settings.split}-{k}-shot", study))
    rows.append(_row("LoRA", tuned, name, settings.split, study))

    ours = _statistics(task, tuned, settings.split, test)
    theirs = _statistics(task, few_shot, f"{settings.split}-{chosen}-shot", test)
    shared = [id for id in ours if id in theirs]
    difference = paired_bootstrap(
        np.stack([ours[id] for id in shared]),
        np.stack([theirs[id] for id in shared]),
        task.summarize,
        settings.resamples,
        settings.seed,
    )
    validation = {
        k: read_json(few_shot.scores(name, f"validation-{k}-shot"))
        for k in sorted(set(config.icl[name].fewshot.shots))
    }
    return TaskScores(
        task=name,
        headline=task.headline,
        train_size=len(train),
        seed=config.finetune[name].training.seed,
        shots={k: Score(**v["metrics"][task.headline]) for k, v in validation.items()},
        validation_size=next(iter(validation.values()))["n"],
        chosen=chosen,
        systems=tuple(rows),
        difference=difference,
        shared=len(shared),
        train_overlap=overlap(task, test, train),
    )


def _row(system: str, run: Workdir, task: str, name: str, study: Workdir) -> SystemScores:
    result = read_json(run.scores(task, name))
    metrics = {metric: Score(**values) for metric, values in result["metrics"].items()}
    return SystemScores(
        system, metrics, result["n"], True, run.path.relative_to(study.path).as_posix()
    )


def _statistics(
    task: Task, run: Workdir, name: str, examples: Sequence[Example]
) -> dict[str, np.ndarray]:
    ids, statistics = evaluate.read_statistics(task, run.predictions(task.name, name), examples)
    return dict(zip(ids, statistics, strict=True))


def _lines(scores: TaskScores) -> list[dict[str, Any]]:
    """The lines of results.jsonl: one for each system and metric."""
    return [
        {
            "system": row.system,
            "task": scores.task,
            "train_size": scores.train_size,
            "seed": scores.seed,
            "metric": metric,
            "value": found.value,
            "low": found.low,
            "high": found.high,
            "n": found.n,
            "invalid_rate": row.metrics["invalid_rate"].value,
            "pretrained": row.pretrained,
            "run": row.run,
        }
        for row in scores.systems
        for metric, found in row.metrics.items()
    ]
