"""One adapter, or a model in full, for one task or several: data, loop, and what is kept of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from ecomjax import placement, sharding
from ecomjax.data.encoded import Joined
from ecomjax.data.mixture import shares
from ecomjax.data.packing import Plan
from ecomjax.data.pipeline import iterate, one_pass
from ecomjax.errors import UserError
from ecomjax.experiments import hosts
from ecomjax.experiments.assembly import (
    Base,
    check_settings,
    load_base,
    load_examples,
    make_predictor,
    make_tasks,
    say,
)
from ecomjax.experiments.config import FinetuneConfig
from ecomjax.experiments.files import jsonable, read_json, write_json
from ecomjax.experiments.initial import init_state, make_optimizer
from ecomjax.experiments.learners import (
    assemble_of,
    check_suited,
    kind_of,
    known_kind,
    loss_of,
    with_head,
)
from ecomjax.experiments.sections import OptimizerConfig
from ecomjax.experiments.task_data import TaskData, mixture_of, plan_of, prepare
from ecomjax.experiments.tuning import Tuning, make_tuning
from ecomjax.experiments.workdir import Workdir
from ecomjax.tasks.base import Example
from ecomjax.training.checkpoint import Checkpoints
from ecomjax.training.guards import Guard
from ecomjax.training.loop import Course, LoopOptions, fit
from ecomjax.training.state import TrainState
from ecomjax.training.step import (
    JointTrainStep,
    Loss,
    make_joint_train_step,
    make_loss_pass,
    make_train_step,
)
from ecomjax.training.writers import MetricsWriter, NoWriter
from ecomjax.typing import Batch

NO_MATTER = (
    "evaluation.split",
    "evaluation.resamples",
    "evaluation.batch_size",
    "data.cache",
    "mesh",
)
"""Keys of the config that training does not depend on, but for rounding."""


def run(config: FinetuneConfig, workdir: str, allow: Sequence[str] = ()) -> None:
    """Trains an adapter or a whole model, or goes on where an interrupted run stopped.

    The run folder then holds that of the best evaluation, see `tuning.make_tuning`.

    Args:
        config: of the run; on resume, the same.
        workdir: the run folder.
        allow: keys of the config that may change on resume.
    """
    (error,) = run_together([config], [workdir], allow)
    if error is not None:
        raise error


def run_together(
    configs: Sequence[FinetuneConfig], workdirs: Sequence[str], allow: Sequence[str] = ()
) -> list[UserError | None]:
    """As `run`, of several runs over one base in memory, all of whose steps are one program.

    Each has its own folder, in which all is as if it had run alone, but for rounding; each may
    be resumed alone or with others. Only `joinable` runs can go together.

    Returns:
        What ended each of them before its time, if anything did.
    """
    first, *others = configs
    assert all(joinable(first, other) for other in others), "these have no base in common"
    members = [
        Member(config, Workdir(path)) for config, path in zip(configs, workdirs, strict=True)
    ]
    with contextlib.ExitStack() as stack:
        for one in members:
            stack.push(one.held)
            with one.apart():
                folder = one.folder.writing(one.config, ignore=NO_MATTER, allow=allow)
                one.held.enter_context(folder)
        if not any(one.error is None for one in members):
            return [one.error for one in members]
        validation, base = _load(first, alone=not others)
        for one in members:
            if one.error is None:
                with one.apart():
                    one.training = _begin(one.config, one.folder, validation, base, one.held)
        with sharding.use(base.mesh):
            if trainings := [one.training for one in members if one.training is not None]:
                _train(trainings)
            for one in members:
                if one.training is not None:
                    with one.apart():
                        _keep_best(one.training)
    return [one.error for one in members]


@dataclasses.dataclass
class Member:
    """A run, alone or one of several: what goes wrong with it ends it alone.

    Attributes:
        config, folder: of the run.
        held: what it keeps open.
        training: once it is about to train.
        error: that ended it before its time, if one did.
    """

    config: FinetuneConfig
    folder: Workdir
    held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    training: Training | None = None
    error: UserError | None = None

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """What is raised inside ends the run; of several processes, all would wait for it."""
        try:
            yield
        except UserError as error:
            if hosts.several():
                raise
            self.error = error
            # It leaves the folder as on its way out.
            self.held.__exit__(type(error), error, error.__traceback__)


def joinable(one: FinetuneConfig, other: FinetuneConfig) -> bool:
    """Whether two runs can be trained as one program: adapters alike for the same base.

    They may differ in seed, epochs, optimizer and rows of train. Not those of PiSSA, which
    changes the base, and no model in full.
    """

    def common(config: FinetuneConfig) -> FinetuneConfig:
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, train_size=0),
            training=dataclasses.replace(config.training, seed=0, epochs=1),
            optimizer=OptimizerConfig(),
        )

    alone = one.training.tune == "all" or one.adapter.pissa
    return not alone and common(one) == common(other)


def _load(config: FinetuneConfig, alone: bool) -> tuple[dict[str, list[Example]], Base]:
    """Validation examples and base; mistakes in config and data are told before it is loaded."""
    tasks = make_tasks(config.tasks)
    check_settings(config.tasks, config.evaluation)
    shares([1] * len(tasks), mixture_of(config.mixture, list(tasks)))
    if kind := known_kind(config.model):
        check_suited(kind, tasks, config)
    validation = {
        label: load_examples(task, config.data, "validation") for label, task in tasks.items()
    }
    base = load_base(config.model, config.mesh, any_kind=True)
    check_suited(kind_of(base.config), tasks, config)
    if getattr(base.config, "experts", 0) and not alone:
        raise UserError(
            f"{config.model.name} has experts, and is trained for one adapter at a time",
            "config.grid.together",
            "set it to 1",
        )
    return validation, base


def _begin(
    config: FinetuneConfig,
    folder: Workdir,
    validation: Mapping[str, list[Example]],
    base: Base,
    held: contextlib.ExitStack,
) -> Training:
    """Data, plan and state of a run, at the step where it is to go on.

    Args:
        config, folder: of the run.
        validation: examples of each task.
        base: the model.
        held: closes what the run keeps open.
    """
    tasks = make_tasks(config.tasks)
    base = with_head(base, tasks, config.training)
    data = {
        label: prepare(
            label,
            make_predictor(base, task, config.tasks[label], config.evaluation),
            validation[label],
            config,
        )
        for label, task in tasks.items()
    }
    train = Joined([found.train for found in data.values()])
    rows = config.training.rows * sharding.row_parts(base.mesh)
    plan = plan_of(train, [found.prefix for found in data.values()], config, rows)
    facts = {
        "base": base.identity,
        "tokenizer": base.tokenizer.fingerprint,
        "seed": config.training.seed,
        "data": {label: found.facts for label, found in data.items()},
    }
    hosts.check_same("base", base.identity.sha256)
    hosts.check_same("data", facts["data"])
    _check_unchanged(facts, folder)
    folder.record_start(**facts)
    say(
        f"{'+'.join(data)}: {len(plan)} steps of {config.training.batch_size} examples "
        f"in rows of {plan.row_length} tokens"
    )
    with sharding.use(base.mesh):
        return _resume(config, base, data, train, plan, folder, held)


def _check_unchanged(facts: Mapping[str, Any], folder: Workdir) -> None:
    """UserError where a run would go on with another base or other data than it began with."""
    if Checkpoints(folder.checkpoints).latest() is None or not folder.run.exists():
        return
    old, new = (_origins(x) for x in (read_json(folder.run)["starts"][-1], jsonable(facts)))
    changes = [f"{n} {old.get(n)} -> {new[n]}" for n in new if old.get(n) != new[n]]
    if changes:
        raise UserError(
            "model or training data have changed since the run began",
            f"{folder.path}: {', '.join(changes)}",
            "use the old ones, or another --workdir",
        )


def _origins(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Digests of what training starts from."""
    data = {f"{label} train": about["train_sha256"] for label, about in facts["data"].items()}
    return {"base": facts["base"]["sha256"], "tokenizer": facts.get("tokenizer"), **data}


@dataclasses.dataclass(frozen=True)
class Training:
    """A run that is about to train.

    Attributes:
        folder: of the run.
        labels: of its tasks.
        tuning: what is trained.
        loss: of a batch, as `make_train_step` takes it.
        optimizer: and its learning rate by step.
        lies: where the arrays of the state lie.
        course: the rest.
    """

    folder: Workdir
    labels: list[str]
    tuning: Tuning
    loss: Loss
    optimizer: tuple[optax.GradientTransformation, optax.Schedule]
    lies: TrainState
    course: Course


def _resume(
    config: FinetuneConfig,
    base: Base,
    data: Mapping[str, TaskData],
    train: Joined,
    plan: Plan,
    folder: Workdir,
    held: contextlib.ExitStack,
) -> Training:
    settings, steps, mesh = config.training, len(plan), base.mesh
    rows = settings.rows * sharding.row_parts(mesh)
    optimizer = make_optimizer(config.optimizer, steps)
    init_key, dropout_key = jax.random.split(jax.random.key(settings.seed))
    tuning = make_tuning(config, base, init_key)
    state, lies = init_state(tuning.trained, optimizer[0], dropout_key, mesh)
    loss = loss_of(base, tuning.variables_of, len(data) if len(data) > 1 else 0)
    loss_pass = make_loss_pass(loss_of(base, tuning.variables_of))
    assemble = assemble_of(base)
    layout = (settings.packing, settings.row_length, settings.batch_size, rows, assemble)
    held_out = {label: one_pass(found.held_out, *layout) for label, found in data.items()}

    def evaluate(trained: Any) -> Mapping[str, float]:
        variables = tuning.variables_of(trained, tuning.frozen)
        values, sums, headlines = {}, np.zeros(2), []
        for label, found in data.items():
            source, task = held_out[label], found.predictor.task
            placed = (placement.shard_rows(source[i], mesh, axis=1) for i in range(len(source)))
            parts = [loss_pass(trained, tuning.frozen, batch) for batch in placed]
            total, weight = np.sum(jax.device_get(parts), axis=0)
            predictions = found.predictor.predict(variables, found.validation)
            metrics = task.metrics([p.value for p in predictions], found.validation)
            headline = metrics[task.headline]
            say(f"{label} validation: loss {total / weight:.4f}, {task.headline} {headline:.4f}")
            values |= {f"{label}/{name}": value for name, value in metrics.items()}
            values[f"{label}/loss"] = float(total / weight)
            sums += (total, weight)
            headlines.append(headline)
        return values | {"loss": float(sums[0] / sums[1]), "headline": float(np.mean(headlines))}

    def report(steps: Sequence[int]) -> str:
        rows = {step: plan.step(step - 1) for step in steps}
        ids = {step: [train[i].id for row in found for i in row] for step, found in rows.items()}
        hosts.on_main(lambda: write_json(folder.skipped, ids))
        return str(folder.skipped)

    every = settings.evaluate_every
    moments = set(range(every, steps, every)) if every else set(plan.epoch_ends)
    options = LoopOptions(
        steps=steps,
        evaluate_at=frozenset(moments | {steps}),
        checkpoint_every=settings.checkpoint_every,
        select="headline" if settings.select == "metric" else "loss",
        larger_is_better=settings.select == "metric",
        patience=settings.patience,
    )
    batches = iterate(
        plan,
        train,
        rows,
        *placement.row_share(mesh),
        assemble,
        place=lambda batch: placement.shard_rows(batch, mesh, axis=1, share=True),
    )
    writer = MetricsWriter(folder.metrics, folder.tensorboard) if hosts.is_main() else NoWriter()
    held.enter_context(writer)
    checkpoints = Checkpoints(folder.checkpoints, settings.keep)
    guard = Guard(settings.most_skipped, settings.spike, report)
    course = Course(state, batches, evaluate, checkpoints, writer, options, guard)
    return Training(folder, list(data), tuning, loss, optimizer, lies, course)


def _train(trainings: Sequence[Training]) -> None:
    """All steps, of one run by themselves, of several as one program."""
    first = trainings[0]
    groups = first.labels if len(first.labels) > 1 else []

    @functools.cache
    def alone(place: int) -> Any:
        one = trainings[place]
        return make_train_step(one.loss, *one.optimizer, groups, one.lies)

    @functools.cache
    def joint(places: tuple[int, ...]) -> JointTrainStep:
        those = [trainings[place] for place in places]
        optimizers, lies = [one.optimizer for one in those], [one.lies for one in those]
        return make_joint_train_step(first.loss, optimizers, groups, lies)

    def step(places: Sequence[int], states: Sequence[TrainState], batches: Sequence[Batch]):
        frozen = [trainings[place].tuning.frozen for place in places]
        if len(places) == 1:
            return [alone(places[0])(states[0], frozen[0], batches[0])]
        # The base is the same in all of them, see `joinable`.
        base, own = {"params": frozen[0]["params"]}, [{"fixed": x["fixed"]} for x in frozen]
        return joint(tuple(places))(states, base, own, batches)

    fit([one.course for one in trainings], step)


def _keep_best(one: Training) -> None:
    """Writes what the best evaluation was of, or raises what ended the training before."""
    if one.course.error is not None:
        raise one.course.error
    course, mesh = one.course, jax.tree.leaves(one.lies)[0].mesh
    say(f"{'+'.join(one.labels)}: best at step {course.selection.step} of {course.options.steps}")
    lies = sharding.whole(mesh)  # Every process reads all of it.
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), one.tuning.trained
    )
    one.tuning.write(course.checkpoints.restore_best(shapes)[0], one.folder)
