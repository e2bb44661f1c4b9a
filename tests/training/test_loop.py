"""The loop with stand-ins for model and metric: what it does when, and after an interruption."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecomjax.training.checkpoint import Checkpoints
from ecomjax.training.loop import LoopOptions, Selection, fit
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
        seen: (step, batch) of every step taken.
    """

    folder: object
    values: dict
    dies: tuple = ("never", 0)
    seen: list = dataclasses.field(default_factory=list)

    def die(self, what, step):
        if self.dies == (what, step):
            raise Killed

    def train_step(self, state, frozen, batch):
        assert frozen == "frozen"
        step = int(state.step) + 1
        self.die("step", step)
        self.seen.append((step, batch))
        # Depends on the order of all batches so far.
        w = state.trained["w"] * 0.5 + batch
        metrics = {"loss": jnp.sum(w), "tokens": jnp.asarray(10 * batch)}
        return state.replace(step=state.step + 1, trained={"w": w}), metrics

    def evaluate(self, trained):
        step = self.seen[-1][0]
        self.die("evaluation", step)
        return {"score": self.values[step], "w": float(trained["w"][0])}

    def fit(self, **changes):
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
                run.die("after save", step)

        state = new_state({"w": jnp.zeros(2)}, optax.sgd(0.1), jax.random.key(0))
        checkpoints = Dying(self.folder / "checkpoints", keep=2)
        with MetricsWriter(self.folder / "metrics.jsonl") as writer:
            self.selection = fit(
                state,
                "frozen",
                self.train_step,
                Numbers(),
                self.evaluate,
                checkpoints,
                writer,
                options,
            )
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
    assert first == {"step": 1, "train/loss": 2.0, "train/tokens": 10.0}
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
def test_which_evaluation_is_the_best(tmp_path, values, larger, best):
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
def test_a_finished_run_takes_no_further_step(tmp_path, patience):
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
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda m: f"{m[0]} {m[1]}")
def test_killed_at_any_moment_the_next_run_ends_the_same(whole, tmp_path, moment):
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
