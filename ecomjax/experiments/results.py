"""What the runs of a study have measured, put together: floors, scores, paired comparisons."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecomjax.evaluation.floors import floors
from ecomjax.evaluation.predict import Prediction
from ecomjax.evaluation.run import Score, score
from ecomjax.experiments import evaluate
from ecomjax.experiments.assembly import load_examples
from ecomjax.experiments.config import IclConfig, ScoreConfig, StudyConfig
from ecomjax.experiments.files import read_json
from ecomjax.experiments.grid import Choice, Run
from ecomjax.experiments.sections import EvaluationConfig
from ecomjax.experiments.workdir import Workdir
from ecomjax.metrics.statistics import paired_bootstrap, verdict
from ecomjax.tasks.base import Example, Task, overlap
from ecomjax.tasks.registry import get_task


@dataclasses.dataclass(frozen=True)
class Result:
    """A system's scores on the test split of a task.

    Attributes:
        system: what it is called in tables.
        kind: "floor", "conventional", or a system of the config.
        size: rows of the training split asked for, as `data.train_size`; 0: all.
        train_size: training examples that these are.
        seed: of its training; of floors that of the data, of prompts that of demonstrations.
        metrics: {metric: score}.
        n: test examples.
        pretrained: whether it starts from pretrained weights; None for floors.
        run: the folder of its scores, below the study's; empty for floors.
        predictions: the file of them; None for floors.
        statistics: of each example by id, as of `Task.statistics`.
    """

    system: str
    kind: str
    size: int
    train_size: int
    seed: int
    metrics: dict[str, Score]
    n: int
    pretrained: bool | None
    run: str
    predictions: Path | None
    statistics: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shots:
    """How few-shot prompting was chosen.

    Attributes:
        scores: {number of demonstrations: validation score of the main metric}.
        n: examples behind those.
        chosen: the number that was best.
    """

    scores: dict[int, Score]
    n: int
    chosen: int


@dataclasses.dataclass(frozen=True)
class TaskResults:
    """Everything measured on a task.

    Attributes:
        task: the task.
        settings: of its evaluation.
        test: the examples that were scored.
        results: one for each system, training size and seed; floors of a size first.
        shots: of few-shot prompting, where it was asked for and has ended.
        train_overlap: {size: test inputs that are also among so many training rows}.
    """

    task: Task
    settings: EvaluationConfig
    test: list[Example]
    results: tuple[Result, ...]
    shots: Shots | None
    train_overlap: dict[int, int]

    @property
    def headline(self) -> str:
        return self.task.headline

    def of(self, kind: str, size: int | None = None, seed: int | None = None) -> list[Result]:
        """The results of a kind; of one size or one seed, where that is given."""
        return [
            result
            for result in self.results
            if result.kind == kind
            and size in (None, result.size)
            and (seed is None or result.seed == seed)
        ]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One system minus another, of the main metric, on the examples that both have answered.

    Attributes:
        difference, low, high, p: see `metrics.statistics.paired_bootstrap`.
        n: those examples.
    """

    difference: float
    low: float
    high: float
    p: float
    n: int

    @property
    def verdict(self) -> str:
        """What may be claimed, see `metrics.statistics.verdict`."""
        return verdict(self.difference, self.low, self.high, self.p, self.n)


def compare(ours: Result, theirs: Result, found: TaskResults) -> Comparison:
    """The paired comparison of two systems on a task."""
    shared = [id for id in ours.statistics if id in theirs.statistics]
    told = paired_bootstrap(
        np.stack([ours.statistics[id] for id in shared]),
        np.stack([theirs.statistics[id] for id in shared]),
        found.task.summarize,
        found.settings.resamples,
        found.settings.seed,
    )
    return Comparison(*told[found.headline], len(shared))


def collect(config: StudyConfig, runs: Sequence[Run], study: Workdir) -> tuple[TaskResults, ...]:
    """Reads what the finished runs of a study have written, and adds floors."""
    return tuple(_collect(config, name, runs, study) for name in config.tasks)


def lines(found: Sequence[TaskResults]) -> list[dict[str, Any]]:
    """The lines of results.jsonl: one for each system, task, size, seed and metric."""
    return [
        {
            "system": result.system,
            "task": results.task.name,
            "train_size": result.train_size,
            "seed": result.seed,
            "metric": metric,
            "value": found.value,
            "low": found.low,
            "high": found.high,
            "n": found.n,
            "invalid_rate": result.metrics["invalid_rate"].value,
            "pretrained": result.pretrained,
            "run": result.run,
        }
        for results in found
        for result in results.results
        for metric, found in result.metrics.items()
    ]


def _collect(config: StudyConfig, name: str, runs: Sequence[Run], study: Workdir) -> TaskResults:
    task = get_task(name, **config.icl[name].task.options)
    settings = config.finetune[name].evaluation
    test = load_examples(task, config.data, settings.split)
    ours = [run for run in runs if name in run.tasks and run.scored]
    done = [run for run in ours if study.subrun(run.name).done.exists()]
    sizes = dict.fromkeys(config.grid.train_sizes or (config.data.train_size,))
    rows, overlaps, trained_on = [], {}, {}
    for size in sizes:
        data = dataclasses.replace(config.data, train_size=size)
        train = load_examples(task, data, "train")
        overlaps[size], trained_on[size] = overlap(task, test, train), len(train)
        of = size, len(train), config.data.seed
        for floor, values in floors(task, train, test).items():
            metrics = score(
                task, [Prediction(v, "") for v in values], test, settings.resamples, settings.seed
            )
            statistics = dict(zip([e.id for e in test], task.statistics(values, test), strict=True))
            rows.append(Result(floor, "floor", *of, metrics, len(test), None, "", None, statistics))
    shots = None
    for run in done:
        if isinstance(run.config, IclConfig):
            shots = _shots(run, study.subrun(run.name), task)
        for label, folder, split in _scores(run, settings.split, name, study):
            rows.append(
                _result(run, label, folder, split, task, test, trained_on[run.train_size], study)
            )
    return TaskResults(task, settings, test, tuple(rows), shots, overlaps)


def _scores(run: Run, split: str, task: str, study: Workdir) -> Iterator[tuple[str, Workdir, str]]:
    """What a finished run is called in tables, and where its scores on a task are."""
    folder = study.subrun(run.name)
    if isinstance(run.config, IclConfig):
        chosen = read_json(folder.path / "eval" / task / "shots.json")["chosen"]
        for k in sorted({0, chosen} & {*run.config.fewshot.shots, chosen}):
            yield ("zero-shot" if k == 0 else f"{k}-shot"), folder, f"{split}-{k}-shot"
    elif isinstance(run.config, ScoreConfig):
        yield run.label, folder, f"{split}-{run.needs[0]}"
    elif isinstance(run.config, Choice):
        yield run.label, study.subrun(read_json(folder.chosen)["chosen"]), split


def _shots(run: Run, folder: Workdir, task: Task) -> Shots:
    assert isinstance(run.config, IclConfig)
    told = {
        k: read_json(folder.scores(task.name, f"validation-{k}-shot"))
        for k in sorted(set(run.config.fewshot.shots))
    }
    scores = {k: Score(**one["metrics"][task.headline]) for k, one in told.items()}
    chosen = read_json(folder.path / "eval" / task.name / "shots.json")["chosen"]
    return Shots(scores, next(iter(told.values()))["n"], chosen)


def _result(
    run: Run,
    label: str,
    folder: Workdir,
    split: str,
    task: Task,
    test: Sequence[Example],
    train_size: int,
    study: Workdir,
) -> Result:
    told: Mapping[str, Any] = read_json(folder.scores(task.name, split))
    predictions = folder.predictions(task.name, split)
    ids, statistics = evaluate.read_statistics(task, predictions, test)
    return Result(
        label,
        run.system,
        run.train_size,
        train_size,
        run.seed,
        {metric: Score(**values) for metric, values in told["metrics"].items()},
        told["n"],
        True,
        folder.path.relative_to(study.path).as_posix(),
        predictions,
        dict(zip(ids, statistics, strict=True)),
    )
