"""The training loop, told in order: resume, then step, tell, evaluate, save, stop when asked to."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from ecomjax import preemption
from ecomjax.errors import UserError
from ecomjax.preemption import Preempted
from ecomjax.training.checkpoint import Checkpoints, better
from ecomjax.training.guards import Guard, Seen
from ecomjax.training.state import TrainState
from ecomjax.training.writers import MetricsWriter, Progress
from ecomjax.typing import Batch

TrainStep = Callable[
    [Sequence[int], Sequence[TrainState], Sequence[Batch]],
    Sequence[tuple[TrainState, dict[str, jax.Array]]],
]
logger = logging.getLogger(__name__)

Evaluate = Callable[[Any], Mapping[str, float]]
Tell = Callable[[float, int], None]
"""(loss, tokens) of a step, once they are known."""


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


class Course:
    """A run between its steps: resumed from its newest checkpoint, if there is one, when it is
    made, then told of each step.

    An interrupted run that is started again writes the same metrics and checkpoints as an
    uninterrupted one: the position in the data and the selection so far are saved with the
    state, and whatever was written after the restored step is cut back.

    Attributes:
        state: after the last step.
        step: its number.
        selection: the best evaluation so far; its trained parameters are
            `checkpoints.restore_best`.
        error: that ended the run before its time, if one did.
    """

    def __init__(
        self,
        state: TrainState,
        batches: Any,
        evaluate: Evaluate,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
        options: LoopOptions,
        guard: Guard,
    ):
        """Resumes.

        Args:
            state: the state before the first step.
            batches: iterator with `get_state` and `set_state`.
            evaluate: trained parameters -> validation metrics.
            checkpoints: where states go.
            writer: where metrics go.
            options: when to do what.
            guard: when to warn and when to give up.
        """
        self.state, self.batches, self.checkpoints = state, batches, checkpoints
        self.options, self.step, self.selection = options, 0, Selection()
        self.error: UserError | None = None
        self._evaluate, self._writer, self._guard = evaluate, writer, guard
        self._seen, self._stopped = Seen(), False
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        if checkpoints.latest() is not None:
            self.state, data, self.step = checkpoints.restore(None, state)
            batches.set_state(data["batches"])
            self.selection, self._seen = Selection(**data["selection"]), Seen(**data["seen"])
            self._stopped = data["stopped"]
        checkpoints.cut_back(self.step)
        writer.cut_back(self.step)

    @property
    def ended(self) -> bool:
        """Whether there is no further step: all are done, or it stopped early, or failed."""
        return self._stopped or self.error is not None or self.step >= self.options.steps

    def take(self, state: TrainState, metrics: dict[str, jax.Array], tell: Tell) -> None:
        """A step is done, or at least under way; the one before is told.

        If this one is to be evaluated, it is, and saved.
        """
        self.state, self.step = state, self.step + 1
        self._tell(tell)  # The step before: the device computes this one meanwhile.
        self._pending = (self.step, metrics)
        if self.step in self.options.evaluate_at:
            self._tell(tell)
            # Evaluations may last longer than the grace that a signal leaves.
            with preemption.raised_alone():
                values = self._evaluate(state.trained)
            self._writer.write(self.step, {f"validation/{k}": v for k, v in values.items()})
            self._select(values)
            self._stopped = 0 < self.options.patience <= self.selection.since
            self._save()

    def save(self, ending: bool, tell: Tell) -> None:
        """Begins a checkpoint where one is due, or where the process is about to end."""
        if self.step in self.options.evaluate_at:
            return  # It has begun.
        if ending or self.step % self.options.checkpoint_every == 0:
            self._tell(tell)
            self._save()

    def _save(self) -> None:
        bookkeeping = {
            "batches": self.batches.get_state(),
            "selection": dataclasses.asdict(self.selection),
            "seen": dataclasses.asdict(self._seen),
            "stopped": self._stopped,
        }
        self.checkpoints.save(self.step, self.state, bookkeeping)

    def _tell(self, tell: Tell) -> None:
        if self._pending is None:
            return
        values = {k: float(v) for k, v in jax.device_get(self._pending[1]).items()}
        number, self._pending = self._pending[0], None
        self._guard.watch(self._seen, number, values)
        values["spikes"] = self._seen.spikes
        self._writer.write(number, {f"train/{k}": v for k, v in values.items()})
        tell(values["loss"], int(values["tokens"]))
        self._guard.check(self._seen, number, values)

    def _select(self, values: Mapping[str, float]) -> None:
        """Keeps the trained parameters if this evaluation is the best so far."""
        value = values[self.options.select]
        score = value if self.options.larger_is_better else -value
        if better(math.nan if score is None else score, self.selection.score):
            self.selection = Selection(score, self.step)
            self.checkpoints.save_best(self.step, self.state.trained, {"validation": dict(values)})
        else:
            self.selection.since += 1


def fit(courses: Sequence[Course], train_step: TrainStep) -> None:
    """Trains to the last step or early stop: one run, or several side by side.

    What goes wrong with one of them is noted as its `error`, and ends that one alone.

    Args:
        courses: the runs.
        train_step: (places among the courses, their states, their batches) -> (state, metrics)
            of each.

    Raises:
        Preempted: the process was asked to end; a checkpoint of the current step is saved, but
            for an evaluation that was underway.
    """
    done = sum(course.step for course in courses)
    with contextlib.ExitStack() as stack:
        for course in courses:
            stack.enter_context(course.checkpoints)
        preempted = stack.enter_context(preemption.noted())
        steps = sum(course.options.steps for course in courses)
        progress = stack.enter_context(Progress(steps, start=done))

        def tell(loss: float, tokens: int) -> None:
            nonlocal done
            done += 1
            progress.update(done, loss, tokens)

        rounds = max(course.step for course in courses)
        while going := [i for i, course in enumerate(courses) if not course.ended]:
            rounds += 1
            for i in going:
                with _noting(courses[i]):
                    courses[i].checkpoints.check()
            if not (going := [i for i in going if courses[i].error is None]):
                break
            states = [courses[i].state for i in going]
            taken = train_step(going, states, [next(courses[i].batches) for i in going])
            for i, (state, metrics) in zip(going, taken, strict=True):
                with _noting(courses[i]):
                    courses[i].take(state, metrics, tell)
            ending = preempted(rounds)
            for i in going:
                if courses[i].error is None:
                    with _noting(courses[i]):
                        courses[i].save(ending, tell)
            for i in going:
                if ending or courses[i].ended:
                    with _noting(courses[i]):
                        courses[i].checkpoints.wait()
            if ending and len(courses) == 1:
                if courses[0].error is not None:
                    return
                raise Preempted(courses[0].step)
            if ending:
                raise Preempted


@contextlib.contextmanager
def _noting(course: Course) -> Iterator[None]:
    """Notes what ends a run; of several processes, the others would go on with it and wait."""
    try:
        yield
    except UserError as error:
        if jax.process_count() > 1:
            raise
        if course.error is not None:
            logger.warning("%s", error)
        else:
            course.error = error
