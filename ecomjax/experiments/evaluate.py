"""Scores of trained adapters and of few-shot prompting, written once into the run folder."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ecomjax import sharding
from ecomjax.data.encoded import key_of
from ecomjax.data.progress import counting
from ecomjax.errors import UserError
from ecomjax.evaluation.fewshot import Chooser
from ecomjax.evaluation.predict import Demonstrations
from ecomjax.evaluation.run import predictions_of_records, score, to_record
from ecomjax.experiments import hosts
from ecomjax.experiments.assembly import (
    AnyPredictor,
    Base,
    check_overlap,
    check_settings,
    choose,
    cut_of,
    load_base,
    load_encoded,
    load_examples,
    make_predictor,
    make_tasks,
    say,
)
from ecomjax.experiments.config import (
    FinetuneConfig,
    IclConfig,
    ScoreConfig,
    check_name,
    to_dict,
)
from ecomjax.experiments.files import jsonable, read_json, read_jsonl, write_json, write_jsonl
from ecomjax.experiments.given import find_adapter, name_of, read_given, sha256_of_adapter
from ecomjax.experiments.partial import Partial
from ecomjax.experiments.sections import EvaluationConfig, TaskConfig
from ecomjax.experiments.tuning import load_trained, with_adapter
from ecomjax.experiments.workdir import Workdir
from ecomjax.hf.files import sha256_of
from ecomjax.models.heads import ClassifierConfig
from ecomjax.tasks.base import Example, Task
from ecomjax.tasks.registry import get_task

Value = TypeVar("Value")

KEPT_AFTER = 16
"""Batches after which their predictions are kept, whatever happens then."""


def run(config: FinetuneConfig | IclConfig | ScoreConfig, workdir: str) -> None:
    """Scores the adapter of a run, few-shot prompting, or any adapters to a base.

    What is scored stays scored.
    """
    folder = Workdir(workdir)
    several = not isinstance(config, IclConfig)
    tasks = config.tasks if several else {config.task.name: config.task}
    check_settings(tasks, config.evaluation)
    if isinstance(config, ScoreConfig):
        ignored = ("adapters", "base", "evaluation.split", "evaluation.batch_size")
        with folder.writing(config, ignore=(*ignored, "data.cache", "mesh")):
            _systems(config, folder)
    elif isinstance(config, FinetuneConfig):
        whole = config.training.tune == "all"
        trained = folder.model if whole else folder.adapter
        if not trained.is_dir():
            raise UserError(f"no {trained.name}", str(trained), "train first, with launch.train")
        with folder.writing(config, ignore=("evaluation", "data.cache", "mesh")):
            _trained(config, folder)
    else:
        ignored = ("evaluation.split", "evaluation.batch_size", "data.cache", "mesh")
        with folder.writing(config, ignore=ignored):
            _fewshot(config, folder)


def _trained(config: FinetuneConfig, folder: Workdir) -> None:
    """Scores what a run has trained."""
    tasks = make_tasks(config.tasks)
    base, variables = load_trained(config, tasks, folder)
    # What is trained in full is the base itself, whose digest scores are kept with anyway.
    of = {}
    if config.training.tune == "lora":
        of["adapter"] = sha256_of_adapter(folder.adapter)
    if "lora" in variables and isinstance(base.config, ClassifierConfig):
        of["head"] = sha256_of([folder.head])
    hosts.check_same("adapter", of)
    split = config.evaluation.split
    for label, task in tasks.items():
        asked = Asked(label, task, config.tasks[label])
        examples = load_examples(task, config.data, split)
        predictor = make_predictor(base, task, asked.config, config.evaluation)
        cut = cut_of(config.training, predictor.window)
        train, _ = load_encoded(label, predictor, asked.config, config.data, "train", cut)
        keys = [key_of(task.user(example)) for example in examples]
        facts = {"inputs_also_in_train": check_overlap(config.data, label, split, keys, train.keys)}
        where = folder, split
        _scored(asked, config.evaluation, base, variables, examples, (), *where, facts, of)


def _systems(config: ScoreConfig, folder: Workdir) -> None:
    """Scores adapters, one after the other over one base, and the base alone.

    Scores are called `<split>-<adapter>`, after the adapter's run folder, and `<split>-base`.
    """
    found = [find_adapter(path) for path in config.adapters]
    names = [*map(name_of, found), *(["base"] if config.base else [])]
    for name in names:
        check_name("adapter in a folder", name, "config.adapters")
        if names.count(name) > 1:
            raise UserError(
                f"two systems called {name!r}", "config.adapters", "rename one of their folders"
            )
    if not names:
        raise UserError("nothing to score", "config.adapters", "name one, or set config.base=True")
    base = load_base(config.model, config.mesh)
    given = [read_given(path, base.config, base.identity, config.any_base) for path in found]
    sources = {one.name: {"path": one.folder, "sha256": one.sha256} for one in given}
    hosts.check_same("adapter", [one.sha256 for one in given])
    folder.record_start(base=base.identity, adapters=sources)
    split = config.evaluation.split
    examples = {
        label: load_examples(task, config.data, split)
        for label, task in make_tasks(config.tasks).items()
    }
    for name, one in itertools.zip_longest(names, given):
        variables = {"params": base.params} if one is None else with_adapter(base, one.adapter)
        for label, task in make_tasks(config.tasks).items():
            asked = Asked(label, task, config.tasks[label])
            where = folder, f"{split}-{name}"
            of = {"adapter": None if one is None else one.sha256}
            _scored(
                asked, config.evaluation, base, variables, examples[label], (), *where, depends=of
            )


def _fewshot(config: IclConfig, folder: Workdir) -> None:
    """Chooses the number of demonstrations on validation, and scores it and zero-shot.

    Every number of demonstrations is compared on the same examples: those that share
    nothing with any demonstration that all are shown.
    """
    task, few = get_task(config.task.name, **config.task.options), config.fewshot
    asked = Asked(task.name, task, config.task)
    base = load_base(config.model, config.mesh)
    train = load_examples(task, config.data, "train")
    folder.record_start(base=base.identity, seed=few.seed, data={"train": len(train)})
    shots = sorted(set(few.shots))
    chooser = Chooser(task, train, shots[-1], few.seed, few.policy, few.order)

    def scored(examples: Sequence[Example], k: int, split: str) -> dict[str, Any]:
        where = folder, f"{split}-{k}-shot"
        variables = {"params": base.params}
        shown = [chooser.of(example, k) for example in examples]
        return _scored(asked, config.evaluation, base, variables, examples, shown, *where)

    validation = load_examples(task, config.data, "validation")
    validation = choose(validation, few.select_examples, few.seed)
    clean = _scorable(chooser, validation, "validation")
    found = {k: scored(clean, k, "validation") for k in shots}
    best = max(shots, key=lambda k: found[k]["metrics"][task.headline]["value"])
    say(f"{task.name}: {best} demonstrations are best on {len(clean)} validation examples")

    split = config.evaluation.split
    examples = load_examples(task, config.data, split)
    clean = _scorable(chooser, examples, split)
    for k in sorted({0, best} & {*shots, best}):
        scored(clean, k, split)
    chosen = {
        "chosen": best,
        "split": split,
        "policy": few.policy,
        "order": few.order,
        "excluded": len(examples) - len(clean),
    }
    hosts.on_main(lambda: write_json(folder.path / "eval" / task.name / "shots.json", chosen))


def _scorable(chooser: Chooser, examples: Sequence[Example], split: str) -> list[Example]:
    """See `Chooser.scorable`; UserError where none is left."""
    clean = chooser.scorable(examples)
    if not clean:
        raise UserError(
            f"every example of {split} shares its id or input with a demonstration",
            "config.fewshot.shots",
            "use fewer shots, config.fewshot.policy=random or similar, or mend the splits",
        )
    return clean


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task, its name in reports, and how it is asked."""

    label: str
    task: Task
    config: TaskConfig


def _scored(
    asked: Asked,
    settings: EvaluationConfig,
    base: Base,
    variables: Any,
    examples: Sequence[Example],
    demonstrations: Sequence[Demonstrations],
    folder: Workdir,
    name: str,
    facts: Mapping[str, Any] | None = None,
    depends: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The scores called `name`, read if they are there and else computed and written.

    Args:
        asked: the task, and how it is asked.
        settings: of the evaluation.
        base: what is asked.
        variables: its weights, and an adapter or several.
        examples: all of them.
        demonstrations: those of each example; empty: none.
        folder: where the scores are or go.
        name: of the scores.
        facts: further ones that are written beside the scores.
        depends: what the scores depend on besides what is said here.

    Raises:
        UserError: they are there, of other settings, other predictions than lie beside or other
            examples.
    """
    label, task = asked.label, asked.task
    path, kept = folder.scores(label, name), folder.predictions(label, name)
    predictor = make_predictor(base, task, asked.config, settings)
    wanted = to_dict(settings) | to_dict(asked.config) | {"split": name}
    wanted |= {"base": base.identity.sha256}
    wanted |= {"prompts": _digest(predictor, examples, demonstrations)}
    wanted |= depends or {}
    del wanted["batch_size"]  # no score depends on it

    def read() -> dict[str, Any] | None:
        if not path.exists():
            return None
        result = read_json(path)
        check_predictions(result, kept)
        _check_examples(examples, kept)
        if result["evaluation"] != wanted:
            raise UserError(
                "scored before with other settings of evaluation, base, adapter, prompts or "
                "demonstrations",
                str(path),
                "use the old ones, or delete the file and its predictions to score again",
            )
        return result

    told = [(e.id, key_of(json.dumps(jsonable([e.inputs, e.target])))) for e in examples]
    partial = Partial(folder.partial(label, name), [wanted, told])

    def write() -> dict[str, Any]:
        by_id = {record["id"]: record for record in partial.read()}
        records = [by_id[example.id] for example in examples]
        write_jsonl(kept, records)
        predictions = predictions_of_records(records)
        result = {
            "task": label,
            "name": name,
            "n": len(examples),
            "demonstrations": max(map(len, demonstrations), default=0),
            "truncated": sum(prediction.lost > 0 for prediction in predictions),
            "with_fewer_demonstrations": sum(p.dropped > 0 for p in predictions),
            "headline": task.headline,
            "metrics": score(
                task,
                predictions,
                examples,
                settings.resamples,
                settings.seed,
                asked.config.label_score,
            ),
            "predictions_sha256": sha256_of([kept]),
            "evaluation": wanted,
            **(facts or {}),
        }
        write_json(path, result)
        partial.remove()
        return read_json(path)

    result = hosts.on_main(read)
    if result is None:
        hosts.check_same("examples", [example.id for example in examples])
        hosts.check_same("prompts", wanted["prompts"])
        with sharding.use(base.mesh):
            _predict(predictor, variables, examples, demonstrations, partial, f"{label} {name}")
        result = hosts.on_main(write)
    say(_told(asked, name, result))
    return result


def _predict(
    predictor: AnyPredictor,
    variables: Any,
    examples: Sequence[Example],
    demonstrations: Sequence[Demonstrations],
    partial: Partial,
    what: str,
) -> None:
    """Adds records of the examples that it lacks, some batches at a time."""
    done = set(hosts.on_main(lambda: [record["id"] for record in partial.start()]))
    shown = demonstrations or [()] * len(examples)
    missing = [pair for pair in zip(examples, shown, strict=True) if pair[0].id not in done]
    if done:
        say(f"{what}: {len(done)} of {len(examples)} examples are there already")
    chunks = list(_chunks(missing, predictor.batch_size))
    for chunk in chunks:
        predictor.fitted(*zip(*chunk, strict=True))  # What cannot be asked is told now.
    with counting(len(missing), what, "example") as on_done:
        for chunk in chunks:
            asked, given = zip(*chunk, strict=True)
            predictions = predictor.predict(variables, asked, given, on_done)
            records = [
                to_record(example, prediction) | {"demonstrations": [each.id for each in few]}
                for example, prediction, few in zip(asked, predictions, given, strict=True)
            ]
            hosts.on_main(lambda records=records: partial.add(records))


def _chunks(examples: Sequence[Value], batch_size: int) -> Iterator[Sequence[Value]]:
    """The examples in parts of KEPT_AFTER batches, of which none is smaller than a batch.

    What is left over goes with the last part: alone it would be a smaller batch, for which
    everything is compiled again.
    """
    size, first = KEPT_AFTER * batch_size, 0
    while first < len(examples):
        rest = len(examples) - first
        last = first + (rest if rest < size + batch_size else size)
        yield examples[first:last]
        first = last


def _digest(
    predictor: AnyPredictor,
    examples: Sequence[Example],
    demonstrations: Sequence[Demonstrations],
) -> str:
    """Changes with all that any example is asked: code of prompts, data and demonstrations."""
    digest = hashlib.sha256()
    for example, shown in zip(examples, demonstrations or [()] * len(examples), strict=True):
        digest.update(json.dumps([example.id, *predictor.texts(example, shown)]).encode())
    return digest.hexdigest()


def check_predictions(result: Mapping[str, Any], predictions: Path) -> None:
    """UserError unless the predictions are those that the scores were computed from."""
    if not predictions.exists() or sha256_of([predictions]) != result["predictions_sha256"]:
        raise UserError(
            "predictions are not those that were scored",
            str(predictions),
            "delete them and the metrics beside them to score again",
        )


def _check_examples(examples: Sequence[Example], predictions: Path) -> None:
    """UserError unless the predictions are of these examples, in their order."""
    scored = [(kept["id"], kept["inputs"], kept["target"]) for kept in read_jsonl(predictions)]
    if scored != [(e.id, jsonable(e.inputs), jsonable(e.target)) for e in examples]:
        raise UserError(
            "the data are not those that were scored",
            str(predictions),
            "use the old data, or delete the file and the metrics beside it to score again",
        )


def _told(asked: Asked, name: str, result: dict[str, Any]) -> str:
    headline = asked.task.headline
    main = result["metrics"][headline]
    invalid = result["metrics"]["invalid_rate"]["value"]
    return (
        f"{asked.label} {name}: {headline} {main['value']:.3f} "
        f"[{main['low']:.3f}, {main['high']:.3f}], invalid {invalid:.1%}, n {result['n']}"
    )


def read_statistics(
    task: Task, predictions: Path, examples: Sequence[Example]
) -> tuple[list[str], Any]:
    """Ids and statistics [n, S] of predictions on disk, in the order of `examples`."""
    by_id = {record["id"]: record for record in read_jsonl(predictions)}
    present = [example for example in examples if example.id in by_id]
    found = predictions_of_records(by_id[example.id] for example in present)
    return [e.id for e in present], task.statistics([p.value for p in found], present)
