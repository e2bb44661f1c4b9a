"""What training has of each task: the examples it learns from, and those it is evaluated on."""

from __future__ import annotations

import dataclasses
from typing import Any

from ecomjax.data.encoded import EncodedSet, Joined, Kept, fit_window, shared_prefix
from ecomjax.data.mixture import Mixture, draw_orders
from ecomjax.data.packing import Plan, make_plan
from ecomjax.data.sources import HubSource
from ecomjax.experiments.assembly import (
    AnyPredictor,
    check_overlap,
    choose,
    cut_of,
    encode_to,
    load_encoded,
    make_source,
    say,
)
from ecomjax.experiments.config import FinetuneConfig
from ecomjax.experiments.sections import MixtureConfig
from ecomjax.tasks.base import Example


@dataclasses.dataclass(frozen=True)
class TaskData:
    """What training has of a task.

    Attributes:
        predictor: the way that the model is asked.
        train: the training examples that fit a row.
        prefix: tokens that all of them open with.
        validation: examples that metrics are of.
        held_out: those of them that fit a row, which the loss is of.
        facts: what is recorded of the data.
    """

    predictor: AnyPredictor
    train: EncodedSet
    prefix: int
    validation: list[Example]
    held_out: EncodedSet
    facts: dict[str, Any]


def prepare(
    label: str, predictor: AnyPredictor, validation: list[Example], config: FinetuneConfig
) -> TaskData:
    """The examples of a task, as they are trained on and evaluated.

    Args:
        label: of the task.
        predictor: the way that the model is asked.
        validation: all examples of that split.
        config: of the run.

    Raises:
        UserError: an example cannot be asked, or none fits the window.
    """
    settings, task_config = config.training, config.tasks[label]
    source = make_source(config.data)
    # A model knows no position past its own window, and would not say so.
    window = min(settings.row_length, predictor.window)
    cut = cut_of(settings, window)
    encoded, about = load_encoded(label, predictor, task_config, config.data, "train", cut)
    kept = fit_window(encoded, window, settings.too_long, f"{label} train")
    chosen = choose(validation, settings.validation_examples, settings.seed)
    predictor.fitted(chosen)  # What cannot be asked is told now, and not after an epoch.
    encoded_validation = EncodedSet.of(encode_to(predictor, chosen, cut))
    held_out = fit_window(encoded_validation, window, settings.too_long, f"{label} validation")
    prefix = shared_prefix(kept.sequences) if settings.packing == "shared_prefix" else 0
    say(f"{label}: {about['told']}")
    if about["cut"]:
        say(f"{label}: {about['cut']} inputs cut to the window, {about['lost']} tokens lost")
    say(f"{label}: {_told(kept)}, window of {window} tokens, {prefix} of them in common")
    if held_out.dropped or held_out.truncated:
        say(f"{label} validation loss: {_told(held_out)}")
    facts = {
        "train": len(kept.sequences),
        "train_rows": about,
        "train_too_long": _counts(kept),
        "validation": len(chosen),
        "validation_too_long": _counts(held_out),
        "validation_inputs_also_in_train": check_overlap(
            config.data, label, "validation", encoded_validation.keys, encoded.keys
        ),
        "train_sha256": source.fingerprint(predictor.task.data, "train"),
    }
    if isinstance(source, HubSource):
        facts["commit"] = source.commit(predictor.task.data)
    return TaskData(predictor, kept.sequences, prefix, chosen, held_out.sequences, facts)


def _told(kept: Kept) -> str:
    parts = [f"{len(kept.sequences)} examples"]
    if kept.dropped:
        parts.append(f"{len(kept.dropped)} too long and dropped")
    if kept.truncated:
        parts.append(f"{len(kept.truncated)} truncated")
    if kept.tokens_lost:
        parts.append(f"{kept.tokens_lost} tokens lost")
    return ", ".join(parts)


def _counts(kept: Kept) -> dict[str, Any]:
    """What a run folder says of the window; ids as far as they are few enough to be read."""
    return {
        "dropped": len(kept.dropped),
        "truncated": len(kept.truncated),
        "tokens_lost": kept.tokens_lost,
        "first_dropped": list(kept.dropped[:100]),
    }


def plan_of(train: Joined, prefixes: list[int], config: FinetuneConfig, rows: int) -> Plan:
    """Which examples are in which row of which step, of all tasks and epochs."""
    settings = config.training
    mixture = mixture_of(config.mixture, list(config.tasks))
    return make_plan(
        train.lengths,
        draw_orders([len(s) for s in train.sets], mixture, settings.seed, settings.epochs),
        prefixes=prefixes,
        packing=settings.packing,
        row_length=settings.row_length,
        batch_size=settings.batch_size,
        rows_multiple=rows,
        groups=train.groups,
    )


def mixture_of(config: MixtureConfig, labels: list[str]) -> Mixture:
    """How the tasks of these labels are mixed."""
    weights = tuple(config.weights.get(label, 1.0) for label in labels)
    return Mixture(config.policy, config.temperature, weights, config.cap, config.examples)
