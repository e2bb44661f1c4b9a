"""The training loop, told in order: resume, then step, tell, evaluate, save, stop when asked to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ecomjax import preemption
from ecomjax.preemption import Preempted
from ecomjax.training.checkpoint import Checkpoints, better
from ecomjax.training.guards import Guard, Seen
from ecomjax.training.state import TrainState
from ecomjax.training.writers import MetricsWriter, Progress
from ecomjax.typing import Batch

TrainStep = Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]
Evaluate = Callable[[Any], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """When the loop does what.

    Attributes:
        steps: number of optimizer steps.
        evaluate_at: steps after which to evaluate.
        checkpoint_every: steps between checkpoints; evaluations are saved as well.
        select: the validation metric whose best value picks the adapter.
        larger_is_better: whether a larger value of it is better.
        patience: evaluations without a gain after which training stops; 0 for never.
    """

    steps: int
    evaluate_at: frozenset[int]
    checkpoint_every: int
    select: str
    larger_is_better: bool
    patience: int


@dataclasses.dataclass
class Selection:
    """The best evaluation so far; part of every checkpoint.

    Attributes:
        score: value of the selecting metric there, higher is better.
        step: the optimizer step it was taken at.
        since: evaluations since then.
    """

    score: float | None = None
    step: int = 0
    since: int = 0


def fit(
    state: TrainState,
    frozen: Any,
    train_step: TrainStep,
    batches: Any,
    evaluate: Evaluate,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    options: LoopOptions,
    guard: Guard,
) -> Selection:
    """Trains from the newest checkpoint, if there is one, to the last step or early stop.

    An interrupted run that is started again writes the same metrics and checkpoints as an
    uninterrupted one: the position in the data and the selection so far are saved with the
    state, and whatever was written after the restored step is cut back.

    Args:
        state: the state before the first step.
        frozen: what the loss needs beside the trained parameters.
        train_step: (state, frozen, batch) -> (state, metrics), see `make_train_step`.
        batches: iterator with `get_state` and `set_state`.
        evaluate: trained parameters -> validation metrics.
        checkpoints: where states go.
        writer: where metrics go.
        options: when to do what.
        guard: when to warn and when to give up.

    Returns:
        The best evaluation; its trained parameters are `checkpoints.restore_best`.

    Raises:
        Preempted: the process was asked to end; a checkpoint of the current step is saved, but
            for an evaluation that was underway.
        UserError: a checkpoint cannot be written, or the guard gives up.
    """
    selection, seen, step, stopped = Selection(), Seen(), 0, False
    if checkpoints.latest() is not None:
        state, data, step = checkpoints.restore(None, state)
        batches.set_state(data["batches"])
        selection, seen = Selection(**data["selection"]), Seen(**data["seen"])
        stopped = data["stopped"]
    checkpoints.cut_back(step)
    writer.cut_back(step)

    with (
        checkpoints,
        preemption.noted() as preempted,
        Progress(options.steps, start=step) as progress,
    ):
        pending: tuple[int, dict[str, jax.Array]] | None = None

        def tell() -> None:
            nonlocal pending
            if pending is not None:
                values = {k: float(v) for k, v in jax.device_get(pending[1]).items()}
                number, pending = pending[0], None
                guard.watch(seen, number, values)
                values["spikes"] = seen.spikes
                writer.write(number, {f"train/{k}": v for k, v in values.items()})
                progress.update(number, values["loss"], int(values["tokens"]))
                guard.check(seen, number, values)

        while step < options.steps and not stopped:
            checkpoints.check()
            state, metrics = train_step(state, frozen, next(batches))
            step += 1
            tell()  # The step before: the device computes this one meanwhile.
            pending = (step, metrics)
            evaluated = step in options.evaluate_at
            if evaluated:
                tell()
                # Evaluations may last longer than the grace that a signal leaves.
                with preemption.raised_alone():
                    values = evaluate(state.trained)
                writer.write(step, {f"validation/{k}": v for k, v in values.items()})
                _select(selection, step, state, values, checkpoints, options)
                stopped = 0 < options.patience <= selection.since
            ending = preempted(step)
            if evaluated or ending or step % options.checkpoint_every == 0:
                tell()
                bookkeeping = {
                    "batches": batches.get_state(),
                    "selection": dataclasses.asdict(selection),
                    "seen": dataclasses.asdict(seen),
                    "stopped": stopped,
                }
                checkpoints.save(step, state, bookkeeping)
            if ending:
                checkpoints.wait()
                raise Preempted(step)
    return selection


def _select(
    selection: Selection,
    step: int,
    state: TrainState,
    values: Mapping[str, float],
    checkpoints: Checkpoints,
    options: LoopOptions,
) -> None:
    """Keeps the trained parameters if this evaluation is the best so far."""
    value = values[options.select]
    score = value if options.larger_is_better else -value
    if better(math.nan if score is None else score, selection.score):
        selection.score, selection.step, selection.since = score, step, 0
        checkpoints.save_best(step, state.trained, {"validation": dict(values)})
    else:
        selection.since += 1
