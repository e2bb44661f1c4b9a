"""What the kinds of models differ in while they are trained: head, rows, loss.

A decoder is trained as it is, to continue prompts, and an encoder-decoder to answer sources; an
encoder gets a head for the classes of its task. How each of them is asked stands in
`evaluation`, see `assembly.make_predictor`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax

from ecomjax import placement, sharding
from ecomjax.data.labelled import assemble_labelled
from ecomjax.data.packing import assemble
from ecomjax.data.pairs import assemble_pairs
from ecomjax.data.pipeline import Assemble
from ecomjax.errors import UserError
from ecomjax.evaluation.classify import classifies
from ecomjax.experiments.assembly import Base, say
from ecomjax.experiments.config import FinetuneConfig
from ecomjax.experiments.sections import ModelConfig, TrainingConfig
from ecomjax.hf.checkpoints import load_config
from ecomjax.hf.presets import PRESETS
from ecomjax.models import registry
from ecomjax.models.bart import BartConfig
from ecomjax.models.bert import BertConfig
from ecomjax.models.heads import (
    ClassifierConfig,
    SequenceClassifierConfig,
    TokenClassifierConfig,
    with_new_head,
)
from ecomjax.models.t5 import T5Config
from ecomjax.tasks.base import Task
from ecomjax.training import losses
from ecomjax.training.losses import VariablesOf
from ecomjax.training.step import Loss

Kind = Literal["decoder", "encoder", "encoder_decoder"]


def kind_of(shape: Any) -> Kind:
    """The kind of a model, by its config."""
    if isinstance(shape, BertConfig):
        return "encoder"
    return "encoder_decoder" if isinstance(shape, T5Config | BartConfig) else "decoder"


def known_kind(config: ModelConfig) -> Kind | None:
    """The kind of a model before it is loaded; None where that has to be loaded to be known."""
    if not config.path and config.name not in PRESETS:
        return None
    return kind_of(load_config(config.name, config.path))


def check_suited(kind: Kind, tasks: Mapping[str, Task], config: FinetuneConfig) -> None:
    """UserError unless models of this kind can be trained for the tasks as the config says."""
    if kind != "encoder" and config.training.dropout:
        raise UserError(
            f"{config.model.name} is no encoder, whose hidden states are dropped",
            "config.training.dropout",
            "set it to 0, and config.adapter.dropout for adapters",
        )
    if kind == "decoder":
        return
    name = f"{config.model.name} is an {kind.replace('_', '-')}"
    if config.training.packing == "shared_prefix":
        raise UserError(
            f"{name}, whose rows have no shared prefix",
            "config.training.packing",
            "set it to plain or pad",
        )
    methods = ("auto",) if kind == "encoder" else ("auto", "generate")
    for label in tasks:
        if (method := config.tasks[label].method) not in methods:
            raise UserError(
                f"{name}, which is not asked by {method!r}",
                f"config.tasks.{label}.method",
                f"set it to {' or '.join(methods)}",
            )
    if kind == "encoder":
        _check_classes(name, tasks)


def _check_classes(name: str, tasks: Mapping[str, Task]) -> None:
    """UserError unless there is one task, and its answers are classes."""
    for label, task in tasks.items():
        if classifies(task) is None:
            raise UserError(
                f"{name}, which gives classes, and the answers are free text",
                f"config.tasks.{label}",
                "use a model that writes text, such as smollm2_135m",
            )
    if len(tasks) > 1:
        raise UserError(
            f"{name} with a head, which has the classes of one task alone",
            f"config.tasks, {', '.join(tasks)}",
            "name one task, or use a model that writes text",
        )


def with_head(base: Base, tasks: Mapping[str, Task], config: TrainingConfig) -> Base:
    """A base that is trained for the tasks: of an encoder, one with a head for its task.

    A head for the same classes is kept, as in a checkpoint of such a run; another one is left
    out, and a new one drawn.
    """
    if kind_of(base.config) != "encoder":
        return base
    (task,) = tasks.values()
    wanted, labels = _classes_of(task)
    if type(base.config) is wanted and base.config.labels == labels:
        shape = dataclasses.replace(base.config, dropout=config.dropout)
        return dataclasses.replace(base, config=shape, module=registry.build(shape))
    encoder = base.params
    if isinstance(base.config, ClassifierConfig):
        say(f"the head for {', '.join(base.config.labels)} is replaced by a new one")
        encoder = base.params["encoder"]
    shared: dict[str, Any] = {
        f.name: getattr(base.config, f.name) for f in dataclasses.fields(BertConfig)
    }
    shared["dropout"] = config.dropout
    shape = wanted(**shared, labels=labels)
    module = registry.build(shape)
    shapes, axes = registry.describe(module)
    head = with_new_head(module, {}, jax.random.key(config.seed))["head"]
    specs, _ = sharding.specs(axes["head"], shapes["head"], base.mesh)
    head = placement.shard_params(head, sharding.shardings(specs, base.mesh))
    params = {"encoder": encoder, "head": head}
    return dataclasses.replace(base, config=shape, module=module, params=params, axes=axes)


def _classes_of(task: Task) -> tuple[type[ClassifierConfig], tuple[str, ...]]:
    if classifies(task) == "words":
        return TokenClassifierConfig, task.tags or ()
    return SequenceClassifierConfig, task.labels or ()


def assemble_of(base: Base) -> Assemble:
    """What writes the rows that the model is trained on."""
    kind = kind_of(base.config)
    if kind == "encoder_decoder":
        return assemble_pairs(base.config.start)
    return assemble_labelled if kind == "encoder" else assemble


def loss_of(base: Base, variables_of: VariablesOf, groups: int = 0) -> Loss:
    """What the model is trained by, see `training.losses`."""
    by_kind = {
        "decoder": losses.causal_lm,
        "encoder": losses.classes,
        "encoder_decoder": losses.pairs,
    }
    return by_kind[kind_of(base.config)](base.module, groups, variables_of)
