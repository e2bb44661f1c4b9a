"""The loop with stand-ins for model and metric: what it does when, and after an interruption."""

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecomjax import preemption
from ecomjax.errors import UserError
from ecomjax.preemption import Preempted
from ecomjax.training import manifest
from ecomjax.training.checkpoint import Checkpoints
from ecomjax.training.guards import Guard
from ecomjax.training.loop import Course, LoopOptions, Selection, fit
from ecomjax.training.state import new_state
from ecomjax.training.writers import MetricsWriter

STEPS = 7


class Killed(BaseException):
    """No handler of ours may catch it."""


class Numbers:
    """Batches 1, 2, 3, ... from a position that can be read and set."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return self.position

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


@dataclasses.dataclass
class Run:
    """A run in a folder, with a scripted validation metric.

    Attributes:
        folder: of the run.
        values: validation value by step.
        dies: (what, step): where the process dies.
        losses: training loss by step, 1 elsewhere.
        empty: steps whose batches have no targets.
        after_step: called after every step.
        waits: whether a save is over before the next step.
        seen: (step, batch) of every step taken.
        reported: steps whose examples were asked for.
    """

    folder: object
    values: dict
    dies: tuple = ("never", 0)
    losses: dict = dataclasses.field(default_factory=dict)
    empty: tuple = ()
    after_step: Callable = lambda step: None
    waits: bool = True
    seen: list = dataclasses.field(default_factory=list)
    reported: list = dataclasses.field(default_factory=list)

    def die(self, what, step):
        if self.dies == (what, step):
            raise Killed

    def train_step(self, state, batch):
        step = int(state.step) + 1
        self.die("step", step)
        self.seen.append((step, batch))
        # Depends on the order of all batches so far.
        w = state.trained["w"] * 0.5 + batch
        metrics = {
            "loss": jnp.float32(self.losses.get(step, 1.0)),
            "tokens": jnp.asarray(10 * batch),
            "target_tokens": jnp.asarray(0 if step in self.empty else 5 * batch),
        }
        skipped = state.skipped + int(not math.isfinite(self.losses.get(step, 1.0)))
        state = state.replace(step=state.step + 1, skipped=skipped, trained={"w": w})
        self.after_step(step)
        return state, metrics | {"skipped": skipped}

    def report(self, steps):
        self.reported = list(steps)
        return "skipped.json"

    def evaluate(self, trained):
        step = self.seen[-1][0]
        self.die("evaluation", step)
        return {"score": self.values[step], "w": float(trained["w"][0])}

    def course(self, writer, most_skipped=3, spike=0.0, **changes):
        options = LoopOptions(
            **{
                "steps": STEPS,
                "evaluate_at": frozenset(self.values),
                "checkpoint_every": 3,
                "select": "score",
                "larger_is_better": True,
                "patience": 0,
            }
            | changes
        )
        run = self

        class Dying(Checkpoints):
            def save(self, step, state, data):
                run.die("before save", step)
                super().save(step, state, data)
                run.die("while saving", step)
                if run.waits:
                    self.wait()
                run.die("after save", step)

        state = new_state({"w": jnp.zeros(2)}, optax.sgd(0.1), jax.random.key(0))
        checkpoints = Dying(self.folder / "checkpoints", keep=2)
        guard = Guard(most_skipped, spike, self.report)
        return Course(state, Numbers(), self.evaluate, checkpoints, writer, options, guard)

    def fit(self, **changes):
        with MetricsWriter(self.folder / "metrics.jsonl") as writer:
            course = self.course(writer, **changes)
            fit([course], lambda _, states, batches: [self.train_step(*states, *batches)])
        if course.error is not None:
            raise course.error
        return self.read(course)

    def read(self, course):
        self.selection, state, checkpoints = course.selection, course.state, course.checkpoints
        abstract = jax.eval_shape(lambda s: s, state)
        self.best, _, self.best_step = checkpoints.restore_best(abstract.trained)
        self.state = checkpoints.restore(None, abstract)[0]
        return self

    def lines(self):
        return [json.loads(line) for line in self.written().splitlines()]

    def written(self):
        return (self.folder / "metrics.jsonl").read_bytes()


VALUES = {2: 0.1, 4: 0.5, 5: 0.3, 7: 0.4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    return Run(tmp_path_factory.mktemp("whole"), VALUES).fit()


def w_after(step):
    w = 0.0
    for batch in range(1, step + 1):
        w = w * 0.5 + batch
    return w


def test_every_step_takes_the_next_batch_and_is_told_before_its_evaluation(whole):
    assert whole.seen == [(n, n) for n in range(1, STEPS + 1)]
    told = [(line["step"], "train/loss" in line) for line in whole.lines()]
    expected = []
    for step in range(1, STEPS + 1):
        expected += [(step, True)] + ([(step, False)] if step in VALUES else [])
    assert told == expected
    first, *_, last = whole.lines()
    assert first == {
        "step": 1, "train/loss": 1.0, "train/tokens": 10.0, "train/target_tokens": 5.0,
        "train/skipped": 0.0, "train/spikes": 0.0,
    }  # fmt: skip
    assert last == {"step": 7, "validation/score": 0.4, "validation/w": w_after(7)}


def test_the_best_evaluation_is_kept_with_what_was_trained_there(whole):
    assert whole.selection == Selection(score=0.5, step=4, since=2)
    assert whole.best_step == 4
    np.testing.assert_array_equal(whole.best["w"], np.full(2, w_after(4), np.float32))
    np.testing.assert_array_equal(whole.state.trained["w"], np.full(2, w_after(7), np.float32))


@pytest.mark.parametrize(
    ("values", "larger", "best"),
    [
        ({2: 3.0, 4: 1.0, 7: 2.0}, False, 4),
        ({2: 1.0, 4: 1.0, 7: 1.0}, True, 2),
        ({2: math.nan, 4: 1.0, 7: math.nan}, True, 4),
        ({2: math.nan, 4: 1.0, 7: 2.0}, False, 4),
        ({2: -math.inf, 4: -1.0, 7: -2.0}, True, 4),
    ],
    ids=["loss", "the first of equals", "not a number", "not a loss", "infinity"],
)
def test_f15_which_evaluation_is_the_best(tmp_path, values, larger, best):
    assert Run(tmp_path, values).fit(larger_is_better=larger).best_step == best


@pytest.mark.parametrize(("patience", "last"), [(0, 7), (1, 5), (2, 7), (3, 7)])
def test_training_stops_after_so_many_evaluations_without_a_gain(tmp_path, patience, last):
    run = Run(tmp_path, VALUES).fit(patience=patience)
    assert run.seen[-1][0] == last and run.best_step == 4


def test_a_gain_gives_new_patience(tmp_path):
    values = {1: 0.2, 2: 0.1, 3: 0.3, 4: 0.2, 5: 0.4, 6: 0.3, 7: 0.2}
    run = Run(tmp_path, values).fit(patience=2)
    assert run.seen[-1][0] == 7 and run.best_step == 5


@pytest.mark.parametrize("patience", [0, 1])
def test_f11_a_finished_run_takes_no_further_step(tmp_path, patience):
    first = Run(tmp_path, VALUES).fit(patience=patience)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    second = Run(tmp_path, VALUES).fit(patience=patience)
    assert second.seen == []
    assert second.selection == first.selection
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files


MOMENTS = [
    *[("step", n) for n in range(1, STEPS + 1)],
    *[("evaluation", n) for n in VALUES],
    *[(when, n) for n in (2, 3, 4, 5, 6, 7) for when in ("before save", "after save")],
    *[("while saving", n) for n in (3, 4)],
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda m: f"{m[0]} {m[1]}")
def test_f01_f02_killed_at_any_moment_the_next_run_ends_the_same(whole, tmp_path, moment):
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        Run(folder, VALUES, moment).fit()
    again = Run(folder, VALUES).fit()
    steps = [step for step, _ in again.seen]
    assert again.seen == [(n, n) for n in steps] and steps == sorted(steps)
    assert again.written() == whole.written()
    assert again.selection == whole.selection
    assert again.best_step == whole.best_step
    np.testing.assert_array_equal(again.best["w"], whole.best["w"])
    for one, other in zip(jax.tree.leaves(again.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_checkpoint_saves_the_steps_before_it(tmp_path):
    with pytest.raises(Killed):
        Run(tmp_path, VALUES, ("after save", 5)).fit()
    assert [step for step, _ in Run(tmp_path, VALUES).fit().seen] == [6, 7]


def test_an_early_stop_is_remembered_by_the_checkpoint(tmp_path):
    """Killed after the evaluation that ends the run, it must not go on training."""
    with pytest.raises(Killed):
        Run(tmp_path, VALUES, ("after save", 5)).fit(patience=1)
    assert Run(tmp_path, VALUES).fit(patience=1).seen == []


def signalled(number, at):
    """What to do after a step: sends the process a signal after one of them."""
    return lambda step: os.kill(os.getpid(), number) if step == at else None


@pytest.mark.parametrize(
    ("number", "at"), list(zip(itertools.cycle(preemption.SIGNALS), (1, 3, 4, 5), strict=False))
)
def test_f03_a_signal_to_end_saves_the_step_underway_and_the_next_run_goes_on(
    whole, tmp_path, number, at
):
    handler = signal.getsignal(number)
    run = Run(tmp_path, VALUES, after_step=signalled(number, at))
    with pytest.raises(Preempted) as caught:
        run.fit()
    assert caught.value.step == at == run.seen[-1][0]
    assert str(caught.value) == f"preempted at step {at}; the same command resumes"
    assert Checkpoints(tmp_path / "checkpoints").latest() == at
    assert signal.getsignal(number) == handler
    again = Run(tmp_path, VALUES).fit()
    assert again.seen[0] == (at + 1, at + 1)
    assert again.written() == whole.written() and again.selection == whole.selection
    for one, other in zip(jax.tree.leaves(again.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_f04_a_failed_save_stops_the_run_at_the_next_step(tmp_path, monkeypatch):
    """And not at its end; the steps before stay, and a run with room goes on from them."""
    commit = manifest.commit

    def full(temporary, place):
        if place.name == "00000003":
            raise OSError(errno.ENOSPC, "full")
        commit(temporary, place)

    monkeypatch.setattr(manifest, "commit", full)
    run = Run(tmp_path, {7: 0.0}, waits=False)
    run.after_step = lambda step: time.sleep(1.0) if step == 4 else None
    with pytest.raises(UserError, match=r"No space left on device.*00000003"):
        run.fit()
    assert run.seen[-1][0] == 4
    monkeypatch.undo()
    assert Run(tmp_path, {7: 0.0}).fit().seen[-1][0] == STEPS


def test_f33_skipped_updates_are_counted_and_so_many_in_a_row_end_the_run(tmp_path, caplog):
    nan = {2: math.nan, 4: math.inf, 5: math.nan, 6: math.nan}
    run = Run(tmp_path, {7: 0.0}, losses=nan)
    with pytest.raises(UserError, match=r"steps 4 to 6.*skipped\.json"):
        run.fit()
    assert run.reported == [4, 5, 6] and run.seen[-1][0] == 6
    told = [(line["step"], line["train/loss"], line["train/skipped"]) for line in run.lines()]
    assert told == [
        (1, 1.0, 0.0), (2, None, 1.0), (3, 1.0, 1.0),
        (4, None, 2.0), (5, None, 3.0), (6, None, 4.0),
    ]  # fmt: skip
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [f"step {n}" for n in nan]


def test_f33_steps_in_a_row_are_counted_across_a_resume(tmp_path):
    nan = dict.fromkeys((2, 3, 4, 5), math.nan)
    with pytest.raises(Killed):
        Run(tmp_path, {7: 0.0}, ("after save", 3), losses=nan).fit()
    run = Run(tmp_path, {7: 0.0}, losses=nan)
    with pytest.raises(UserError, match="steps 2 to 4"):
        run.fit()
    assert [line["train/skipped"] for line in run.lines()] == [0.0, 1.0, 2.0, 3.0]
    assert Run(tmp_path, {7: 0.0}, losses=nan).fit(most_skipped=5).seen[-1][0] == STEPS


def test_f26_a_batch_without_targets_ends_the_run(tmp_path):
    run = Run(tmp_path, {7: 0.0}, empty=(3,))
    with pytest.raises(UserError, match=r"without a token to learn.*step 3.*skipped\.json"):
        run.fit()
    assert run.reported == [3]


def test_f33_spikes_are_told_and_counted(tmp_path, caplog):
    """Against the median of the losses before, across a resume; one that is skipped is none."""
    losses = {n: 1.0 + 0.01 * n for n in range(1, 31)}
    losses |= {5: 9.0, 15: 3.4, 20: 1e6, 21: math.inf, 25: 3.0, 28: 4.0}
    options = {"steps": 30, "spike": 3.0, "most_skipped": 2}
    with pytest.raises(Killed):
        Run(tmp_path, {30: 0.0}, ("after save", 18), losses=losses).fit(**options)
    run = Run(tmp_path, {30: 0.0}, losses=losses)
    run.fit(**options)
    counts = {line["step"]: line["train/spikes"] for line in run.lines() if "train/loss" in line}
    rises = [n for n in range(2, 31) if counts[n] > counts[n - 1]]
    assert rises == [15, 20, 28] and counts[30] == 3.0
    told = [r.getMessage() for r in caplog.records]
    assert told[0] == "step 15: loss 3.4, the median before it 1.085"
    assert len(told) == 4 and "not finite" in told[2]


def test_runs_side_by_side_end_like_each_alone(whole, tmp_path):
    """One goes on from an earlier start, one stops early, one fails: none disturbs the others."""
    with pytest.raises(Killed):
        Run(tmp_path / "a", VALUES, ("after save", 3)).fit()
    nan = dict.fromkeys((2, 3), math.nan)
    runs = [
        Run(tmp_path / "a", VALUES),
        Run(tmp_path / "b", VALUES),
        Run(tmp_path / "c", VALUES, losses=nan),
    ]
    together = []

    def step(places, states, batches):
        together.append(places)
        return [runs[i].train_step(*each) for i, *each in zip(places, states, batches, strict=True)]

    with contextlib.ExitStack() as stack:
        courses = []
        for run, changes in zip(runs, ({}, {"patience": 1}, {"most_skipped": 2}), strict=True):
            writer = stack.enter_context(MetricsWriter(run.folder / "metrics.jsonl"))
            courses.append(run.course(writer, **changes))
        fit(courses, step)
    assert together == [*[[0, 1, 2]] * 3, [0, 1], [1]]
    assert [course.error is None for course in courses] == [True, True, False]
    assert "steps 2 to 3" in str(courses[2].error)
    assert runs[0].read(courses[0]).written() == whole.written()
    assert runs[0].selection == whole.selection
    alone = Run(tmp_path / "alone", VALUES).fit(patience=1)
    assert runs[1].read(courses[1]).written() == alone.written()
    assert runs[1].selection == alone.selection


def test_a_signal_to_end_saves_all_runs_side_by_side(tmp_path):
    runs = [Run(tmp_path / name, VALUES) for name in "ab"]
    runs[0].after_step = signalled(signal.SIGTERM, 4)

    def step(places, states, batches):
        return [runs[i].train_step(*each) for i, *each in zip(places, states, batches, strict=True)]

    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(MetricsWriter(r.folder / "metrics.jsonl")) for r in runs]
        courses = [run.course(writer) for run, writer in zip(runs, writers, strict=True)]
        with pytest.raises(Preempted):
            fit(courses, step)
    assert [course.checkpoints.latest() for course in courses] == [4, 4]
