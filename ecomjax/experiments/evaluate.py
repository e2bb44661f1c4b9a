"""Scores of trained adapters and of few-shot prompting, written once into the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ecomjax.adapters import lora
from ecomjax.errors import UserError
from ecomjax.evaluation.fewshot import fixed_demonstrations, without_leaks
from ecomjax.evaluation.run import score, statistics_of_records, to_record
from ecomjax.experiments.assembly import (
    Base,
    counting,
    draw,
    load_base,
    load_examples,
    make_predictor,
    say,
)
from ecomjax.experiments.config import FinetuneConfig, IclConfig, to_dict
from ecomjax.experiments.files import read_json, read_jsonl, write_json, write_jsonl
from ecomjax.experiments.workdir import Workdir
from ecomjax.hf.peft import read_adapter
from ecomjax.tasks.base import Example, Task
from ecomjax.tasks.registry import get_task


def run(config: FinetuneConfig | IclConfig, workdir: str) -> None:
    """Scores the adapter of a run, or few-shot prompting; what is scored stays scored."""
    folder = Workdir(workdir)
    if isinstance(config, FinetuneConfig):
        if not folder.adapter.is_dir():
            raise UserError("no adapter", str(folder.adapter), "train first, with launch.train")
        with folder.writing(config, ignore=("evaluation",)):
            _adapter(config, folder)
    else:
        with folder.writing(config, ignore=("evaluation.split",)):
            _fewshot(config, folder)


def _adapter(config: FinetuneConfig, folder: Workdir) -> None:
    task = get_task(config.task.name)
    base = load_base(config.model)
    adapter = jax.tree.map(jnp.asarray, read_adapter(folder.adapter, base.config, base.identity))
    lora.check_paths(base.params, adapter)
    split = config.evaluation.split
    examples = load_examples(task, config.data, split)
    variables = {"params": base.params, "lora": adapter}
    _scored(config, base, variables, task, examples, (), folder, split)


def _fewshot(config: IclConfig, folder: Workdir) -> None:
    """Chooses the number of demonstrations on validation, and scores it and zero-shot.

    Every number of demonstrations is compared on the same examples: those that share
    nothing with any demonstration.
    """
    task = get_task(config.task.name)
    base = load_base(config.model)
    train = load_examples(task, config.data, "train")
    folder.record_start(base=base.identity, seed=config.fewshot.seed, data={"train": len(train)})
    shots = sorted(set(config.fewshot.shots))
    shown = fixed_demonstrations(train, shots[-1], config.fewshot.seed)
    variables = {"params": base.params}

    validation = load_examples(task, config.data, "validation")
    validation = draw(validation, config.fewshot.select_examples, config.fewshot.seed)
    clean = without_leaks(task, validation, shown)
    found = {
        k: _scored(config, base, variables, task, clean, shown[:k], folder, f"validation-{k}-shot")
        for k in shots
    }
    best = max(shots, key=lambda k: found[k]["metrics"][task.headline]["value"])
    say(f"{task.name}: {best} demonstrations are best on {len(clean)} validation examples")

    split = config.evaluation.split
    examples = load_examples(task, config.data, split)
    clean = without_leaks(task, examples, shown)
    for k in sorted({0, best} & {*shots, best}):
        _scored(config, base, variables, task, clean, shown[:k], folder, f"{split}-{k}-shot")
    write_json(
        folder.path / "eval" / task.name / "shots.json",
        {
            "chosen": best,
            "split": split,
            "demonstrations": [example.id for example in shown],
            "excluded": len(examples) - len(clean),
        },
    )


def _scored(
    config: FinetuneConfig | IclConfig,
    base: Base,
    variables: Any,
    task: Task,
    examples: Sequence[Example],
    demonstrations: Sequence[Example],
    folder: Workdir,
    name: str,
) -> dict[str, Any]:
    """The scores called `name`, read if they are there and else computed and written."""
    settings = config.evaluation
    path = folder.scores(task.name, name)
    asked = to_dict(settings) | {"split": name}
    if path.exists():
        result = read_json(path)
        if result["evaluation"] != asked:
            raise UserError(
                "scored before with other settings of evaluation",
                str(path),
                "use the old settings, or delete the file and its predictions to score again",
            )
        say(_told(task, name, result))
        return result
    predictor = make_predictor(base, task, config.task, settings)
    with counting(len(examples), f"{task.name} {name}") as on_done:
        predictions = predictor.predict(variables, examples, demonstrations, on_done)
    records = [to_record(e, p) for e, p in zip(examples, predictions, strict=True)]
    statistics = task.statistics([p.value for p in predictions], examples)
    result = {
        "task": task.name,
        "name": name,
        "n": len(examples),
        "demonstrations": len(demonstrations),
        "headline": task.headline,
        "metrics": score(task, statistics, settings.resamples, settings.seed),
        "evaluation": asked,
    }
    write_jsonl(folder.predictions(task.name, name), records)
    write_json(path, result)
    result = read_json(path)
    say(_told(task, name, result))
    return result


def _told(task: Task, name: str, result: dict[str, Any]) -> str:
    main = result["metrics"][task.headline]
    invalid = result["metrics"]["invalid_rate"]["value"]
    return (
        f"{task.name} {name}: {task.headline} {main['value']:.3f} "
        f"[{main['low']:.3f}, {main['high']:.3f}], invalid {invalid:.1%}, n {result['n']}"
    )


def read_statistics(
    task: Task, predictions: Path, examples: Sequence[Example]
) -> tuple[list[str], Any]:
    """Ids and statistics [n, S] of predictions on disk, in the order of `examples`."""
    by_id = {record["id"]: record for record in read_jsonl(predictions)}
    present = [example for example in examples if example.id in by_id]
    records = [by_id[example.id] for example in present]
    return [e.id for e in present], statistics_of_records(task, records, present)
