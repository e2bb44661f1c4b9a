"""One recipe, ours beside the Trainer of transformers: scores by seed, and over seeds.

Both sides learn from the same examples, are taken at their last step, and are scored by us on the
same test rows. Each run has a folder, `runs/<task>-<side>-<seed>`, and what stands there is kept.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ecomjax.errors import UserError
from ecomjax.evaluation.classify import classifies
from ecomjax.experiments import evaluate, finetune, hosts
from ecomjax.experiments.assembly import make_tasks, say
from ecomjax.experiments.benchmarks import trainer
from ecomjax.experiments.benchmarks.peer import imported
from ecomjax.experiments.config import FinetuneConfig
from ecomjax.experiments.document import Block, Paragraph, Table, markdown
from ecomjax.experiments.files import read_json
from ecomjax.experiments.learners import kind_of
from ecomjax.experiments.sections import AdapterConfig
from ecomjax.experiments.tables import BESIDE, spelled
from ecomjax.experiments.workdir import Workdir
from ecomjax.hf.checkpoints import load_config
from ecomjax.models.heads import ClassifierConfig

NEVER = 10**9
"""Steps between evaluations. There is one, after the last step, which so is the best."""

SIDES: Mapping[str, Callable[[FinetuneConfig, Workdir], None]] = {
    "ours": lambda config, folder: finetune.run(config, str(folder.path)),
    "peer": trainer.train,
}

Scores = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Metrics by side and seed."""


def run(config: FinetuneConfig, workdir: str, seeds: Sequence[str]) -> None:
    """Trains and scores what is not yet, seed by seed, and prints the comparison.

    Args:
        config: the recipe, whose own seed is of no matter.
        workdir: of all runs; other tasks may be there too.
        seeds: whole numbers.

    Raises:
        UserError: the sides cannot do the same by this config, or a folder is that of another.
    """
    numbers = seeds_of(seeds)
    check(config)
    ((label, task),) = make_tasks(config.tasks).items()
    found: dict[str, dict[int, dict[str, float]]] = {side: {} for side in SIDES}
    for seed in numbers:
        for side in SIDES:
            folder = Workdir(workdir).subrun(f"{label}-{side}-{seed}")
            found[side][seed] = scores(at_last_step(config, seed), folder, side)
    columns = (task.headline, *BESIDE.get(task.name, ()))
    print(markdown(comparison(found, columns), Path(workdir)), end="", flush=True)


def seeds_of(texts: Sequence[str]) -> list[int]:
    """The seeds that a user wrote."""
    if not texts or not all(text.isdecimal() for text in texts) or len(set(texts)) < len(texts):
        raise UserError(f"bad seeds {','.join(texts)!r}", "--seeds", "write some, such as 0,1,2")
    return [int(text) for text in texts]


def check(config: FinetuneConfig) -> None:
    """UserError unless the peer can do what the config says."""
    imported("torch")
    if hosts.several():
        raise UserError("several processes", "the peer of this comparison", "start one")
    if len(config.tasks) != 1:
        raise UserError("a mixture of tasks", "config.tasks", "name one")
    kept = ("rank", "alpha", "dropout")
    plain = AdapterConfig(**{name: getattr(config.adapter, name) for name in kept})
    asked = {
        "adapter": (dataclasses.asdict(config.adapter), dataclasses.asdict(plain)),
        "mixture.cap": (config.mixture.cap, 0),
        "mixture.examples": (config.mixture.examples, 0),
        "model.param_dtype": (config.model.param_dtype, "float32"),
        "model.compute_dtype": (config.model.compute_dtype, "float32"),
        "model.quantization": (config.model.quantization, "none"),
        "optimizer.loraplus_ratio": (config.optimizer.loraplus_ratio, 1.0),
    }
    for key, (value, same) in asked.items():
        if value != same:
            raise UserError(
                "the peer of this comparison has no equal", f"config.{key}", "use its default"
            )
    (task,) = make_tasks(config.tasks).values()
    shape = load_config(config.model.name, config.model.path)
    whole, kind = config.training.tune == "all", kind_of(shape)
    if kind == "decoder" and not whole:
        return
    of_words = kind == "encoder" and whole and classifies(task) == "words"
    if not of_words or shape.model_type == "distilbert":
        raise UserError(
            f"{config.model.name}, tuned so for {task.name}, is none of what is compared",
            "config.training.tune, config.model",
            "adapt a decoder, or train BERT or RoBERTa in full for classes of words",
        )
    if isinstance(shape, ClassifierConfig) and shape.labels != task.tags:
        raise UserError(
            "the encoder has a head for other classes", "config.model", "use one without a head"
        )


def at_last_step(config: FinetuneConfig, seed: int) -> FinetuneConfig:
    """The recipe with a seed; what it keeps is the last step, whatever validation says."""
    last = {"evaluate_every": NEVER, "patience": 0}
    training = dataclasses.replace(config.training, seed=seed, **last)
    return dataclasses.replace(config, training=training)


def scores(config: FinetuneConfig, folder: Workdir, side: str) -> dict[str, float]:
    """The metrics of a run, which is trained and scored unless it has been."""
    (label,) = config.tasks
    path = folder.scores(label, config.evaluation.split)
    if path.exists():
        with folder.writing(config, ignore=("evaluation", *finetune.NO_MATTER)):
            say(f"{folder.path}: scored before")
    else:
        say(f"{folder.path}: {side}, seed {config.training.seed}")
        SIDES[side](config, folder)
        evaluate.run(config, str(folder.path))
    return {name: score["value"] for name, score in read_json(path)["metrics"].items()}


def comparison(found: Scores, metrics: Sequence[str]) -> list[Block]:
    """The scores of both sides, and whether each mean is within the other's interval."""
    seeds = list(next(iter(found.values())))
    rows, told = [], []
    for metric in metrics:
        by_side = {side: [own[seed][metric] for seed in seeds] for side, own in found.items()}
        for side, values in by_side.items():
            numbers = (f"{value:.3f}" for value in (*values, statistics.fmean(values)))
            spans = (interval(values), (min(values), max(values)))
            rows.append((spelled(metric), side, *numbers, *map(_span, spans)))
        if len(seeds) > 1:
            told.append(Paragraph(f"{spelled(metric)}: {_verdict(**by_side)}."))
    header = ("metric", "side", *(f"seed {seed}" for seed in seeds), "mean")
    spans = ("95 % t interval over seeds", "least to most")
    return [Table((*header, *spans), tuple(rows)), *told]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % Student's t interval of the mean; None of one value."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    reach = float(t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
    return mean - reach, mean + reach


def _verdict(ours: Sequence[float], peer: Sequence[float]) -> str:
    """Whether each mean is within the other's interval."""

    def within(one: Sequence[float], other: Sequence[float]) -> bool:
        span = interval(other)
        return span is not None and span[0] <= statistics.fmean(one) <= span[1]

    both = within(ours, peer), within(peer, ours)
    difference = statistics.fmean(ours) - statistics.fmean(peer)
    claim = {
        (True, True): "each mean is within the other's interval",
        (True, False): "our mean is within the peer's interval, not the other way round",
        (False, True): "the peer's mean is within our interval, not the other way round",
        (False, False): "neither mean is within the other's interval",
    }[both]
    return f"ours - peer {difference:+.3f}, {claim}"


def _span(span: tuple[float, float] | None) -> str:
    return "" if span is None else f"{span[0]:.3f} to {span[1]:.3f}"
