"""One adapter for one task: data, adapter, loop, PEFT folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.data.packing import Encoded, Kept, Plan, fit_window, make_plan, shared_prefix
from ecomjax.data.pipeline import StepSource, iterate
from ecomjax.evaluation.predict import Predictor
from ecomjax.experiments.assembly import (
    Base,
    draw,
    load_base,
    load_examples,
    make_predictor,
    make_source,
    say,
)
from ecomjax.experiments.config import FinetuneConfig, TrainingConfig
from ecomjax.experiments.workdir import Workdir
from ecomjax.hf.peft import write_adapter
from ecomjax.tasks.base import Example, Task, overlap
from ecomjax.tasks.registry import get_task
from ecomjax.training import optim
from ecomjax.training.checkpoint import Checkpoints
from ecomjax.training.loop import LoopOptions, fit
from ecomjax.training.losses import causal_lm
from ecomjax.training.state import new_state
from ecomjax.training.step import make_loss_pass, make_train_step
from ecomjax.training.writers import MetricsWriter
from ecomjax.typing import Adapter, Params

SCORING_ONLY = ("evaluation.split", "evaluation.resamples", "evaluation.batch_size")
"""Keys of the config that training does not depend on."""


def run(config: FinetuneConfig, workdir: str) -> None:
    """Trains an adapter, or goes on where an interrupted run stopped.

    The run folder then holds the adapter of the best evaluation in PEFT layout.
    """
    with Workdir(workdir).writing(config, ignore=SCORING_ONLY) as folder:
        task = get_task(config.task.name)
        train = load_examples(task, config.data, "train")
        validation = load_examples(task, config.data, "validation")
        validation = draw(validation, config.training.validation_examples, config.training.seed)
        base = load_base(config.model)
        predictor = make_predictor(base, task, config.task, config.evaluation)
        kept = _encode(predictor, train, config.training, f"{task.name} train")
        held_out = _encode(predictor, validation, config.training, f"{task.name} validation")
        plan = _plan(kept.sequences, config.training)
        folder.record_start(
            base=base.identity,
            seed=config.training.seed,
            data={
                "train": len(kept.sequences),
                "train_too_long": list(kept.too_long),
                "validation": len(validation),
                "validation_too_long": list(held_out.too_long),
                "validation_inputs_also_in_train": overlap(task, validation, train),
                "train_sha256": make_source(config.data).fingerprint(task.name, "train"),
            },
        )
        say(
            f"{task.name}: {len(kept.sequences)} training examples "
            f"({len(kept.too_long)} longer than "
            f"{min(config.training.row_length, predictor.window)} tokens dropped), "
            f"{len(plan.steps)} steps of {config.training.batch_size} examples in rows of "
            f"{plan.row_length} tokens, {plan.prefix} of them shared"
        )
        if held_out.too_long:
            say(f"{task.name}: validation loss leaves out {len(held_out.too_long)} such examples")
        best = _train(config, base, task, predictor, validation, kept, held_out, plan, folder)
        write_adapter(folder.adapter, best, base.config, base.identity)


def _encode(
    predictor: Predictor, examples: Sequence[Example], config: TrainingConfig, where: str
) -> Kept:
    encoded = [predictor.encode(example) for example in examples]
    # A model knows no position past its own window, and would not say so.
    window = min(config.row_length, predictor.window)
    return fit_window(encoded, window, config.too_long, where)


def _plan(sequences: Sequence[Encoded], config: TrainingConfig, training: bool = True) -> Plan:
    """The rows of training, or those of one ordered pass for the validation loss."""
    return make_plan(
        np.array([len(s.tokens) for s in sequences]),
        prefix=shared_prefix(sequences),
        packing=config.packing,
        row_length=config.row_length,
        batch_size=config.batch_size,
        epochs=config.epochs if training else 1,
        rows_multiple=config.rows,
        seed=config.seed if training else None,
    )


def _train(
    config: FinetuneConfig,
    base: Base,
    task: Task,
    predictor: Predictor,
    validation: Sequence[Example],
    kept: Kept,
    held_out: Kept,
    plan: Plan,
    folder: Workdir,
) -> Adapter:
    """The adapter of the best evaluation.

    Its metrics are of all of `validation`, its loss is of `held_out`, those that fit a row.
    """
    settings, steps = config.training, len(plan.steps)
    schedule = optim.schedule(
        config.optimizer.schedule, config.optimizer.learning_rate, config.optimizer.warmup, steps
    )
    optimizer = optim.adamw(
        schedule,
        weight_decay=config.optimizer.weight_decay,
        clip_norm=config.optimizer.clip_norm,
        beta1=config.optimizer.beta1,
        beta2=config.optimizer.beta2,
    )
    rules = [LoraRule(**dataclasses.asdict(rule)) for rule in config.adapter.all_rules]
    init_key, dropout_key = jax.random.split(jax.random.key(settings.seed))
    params, adapter = lora.init(base.params, base.axes, rules, init_key)
    trained, fixed = lora.split(adapter)
    frozen: dict[str, Params] = {"params": params, "fixed": fixed}
    loss = causal_lm(base.module)
    loss_pass = make_loss_pass(loss)
    held_out_plan = _plan(held_out.sequences, settings, training=False)
    held_out_steps = StepSource(held_out_plan, held_out.sequences, settings.rows)

    def evaluate(trained: Adapter) -> Mapping[str, float]:
        sums = [loss_pass(trained, frozen, held_out_steps[i]) for i in range(len(held_out_steps))]
        total, weight = np.sum(jax.device_get(sums), axis=0)
        variables = {"params": params, "lora": lora.join(trained, fixed)}
        predictions = predictor.predict(variables, validation)
        metrics = task.metrics([p.value for p in predictions], validation)
        say(
            f"{task.name} validation: loss {total / weight:.4f}, "
            f"{task.headline} {metrics[task.headline]:.4f}"
        )
        return {"loss": float(total / weight)} | metrics

    every = settings.evaluate_every
    moments = set(range(every, steps, every)) if every else set(plan.epoch_ends)
    options = LoopOptions(
        steps=steps,
        evaluate_at=frozenset(moments | {steps}),
        checkpoint_every=settings.checkpoint_every,
        select=task.headline if settings.select == "metric" else "loss",
        larger_is_better=settings.select == "metric",
        patience=settings.patience,
    )
    checkpoints = Checkpoints(folder.checkpoints, settings.keep)
    with MetricsWriter(folder.metrics, folder.tensorboard) as writer:
        selection = fit(
            new_state(trained, optimizer, dropout_key),
            frozen,
            make_train_step(loss, optimizer, schedule),
            iterate(plan, kept.sequences, settings.rows),
            evaluate,
            checkpoints,
            writer,
            options,
        )
    say(f"{task.name}: best at step {selection.step} of {steps}")
    best: Any = checkpoints.restore_best(jax.eval_shape(lambda t: t, trained))[0]
    return lora.join(best, fixed)
