"""The runs of a study: what each of them does, where it lies, and which others it needs.

A run is a folder of its own, and its name says what it is: `lora-esci-n1500-s0-lr5e-4` is a
candidate, of the adapter for ESCI tuned on 1,500 rows with seed 0, with a learning rate of
its own; `lora-esci-n1500-s0` chooses among the candidates on validation and scores that one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from ecomjax.experiments.config import (
    FinetuneConfig,
    IclConfig,
    MergedConfig,
    ScoreConfig,
    StudyConfig,
    System,
)
from ecomjax.experiments.sections import DataConfig, MixturePolicy


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which of several trained systems is best on validation; it alone is scored on test.

    Attributes:
        candidates: names of their runs.
        select: what is compared, as in `training.select`.
    """

    candidates: tuple[str, ...]
    select: str


Kind = System | str
"""A system of the config, or "conventional"."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        name: of its folder, which no other run has.
        system: what it is a part of.
        label: what the system is called in tables; few-shot prompting is called by its shots.
        tasks: what it is about.
        train_size: rows of each task, as `data.train_size`; 0: all.
        seed: of the training; of few-shot prompting that of the demonstrations.
        config: what is run. A `MergedConfig` and a `ScoreConfig` name no adapters yet: they get
            those of the runs that they need.
        needs: names of runs that have to be finished before.
    """

    name: str
    system: Kind
    label: str
    tasks: tuple[str, ...]
    train_size: int
    seed: int
    config: IclConfig | FinetuneConfig | MergedConfig | ScoreConfig | Choice
    needs: tuple[str, ...] = ()

    @property
    def scored(self) -> bool:
        """Whether the run ends in scores on the test split."""
        return not isinstance(self.config, FinetuneConfig | MergedConfig)


def runs(config: StudyConfig) -> tuple[Run, ...]:
    """All runs of a study, each behind those that it needs."""
    sizes = config.grid.train_sizes or (config.data.train_size,)
    found = list(_few_shot(config, sizes)) if "few_shot" in config.systems else []
    for size in sizes:
        for seed in config.grid.seeds:
            for section in (config.conventional.get(task) for task in config.tasks):
                if section is None:
                    continue
                found += _tuned(config, "conventional", section.model.name, section, size, seed)
            if "lora" in config.systems:
                for task in config.tasks:
                    found += _tuned(config, "lora", "LoRA", config.finetune[task], size, seed)
            if "mixed" in config.systems:
                for policy in config.grid.mixtures:
                    section = _mixed(config, policy)
                    found += _tuned(config, "mixed", f"mixed ({policy})", section, size, seed)
            if "merged" in config.systems:
                for tasks in _merged_tasks(config):
                    adapters = [_name("lora", task, size, seed) for task in tasks]
                    found += _merges(config, tasks, size, seed, adapters)
        if "merged" in config.systems and len(config.grid.seeds) > 1:
            for task in config.tasks:
                adapters = [_name("lora", task, size, seed) for seed in config.grid.seeds]
                found += _merges(config, (task,), size, config.grid.seeds[0], adapters)
    return tuple(found)


def _merged_tasks(config: StudyConfig) -> Iterator[tuple[str, ...]]:
    if len(config.tasks) > 1:
        yield config.tasks
    if config.grid.merge_pairs and len(config.tasks) > 2:
        yield from itertools.combinations(config.tasks, 2)


def _few_shot(config: StudyConfig, sizes: Sequence[int]) -> Iterator[Run]:
    """Prompts draw their demonstrations from the largest training set."""
    size = 0 if 0 in sizes else max(sizes)
    for task in config.tasks:
        section = config.icl[task]
        seed = section.fewshot.seed
        yield Run(
            _name("few-shot", task, size, seed),
            "few_shot",
            "few-shot",
            (task,),
            size,
            seed,
            dataclasses.replace(section, data=_sized(section.data, size)),
        )


def _mixed(config: StudyConfig, policy: MixturePolicy) -> FinetuneConfig:
    """Of the tasks of the study, mixed in one way."""
    section = config.mixed
    weights = {task: w for task, w in section.mixture.weights.items() if task in config.tasks}
    return dataclasses.replace(
        section,
        tasks={task: section.tasks[task] for task in config.tasks},
        mixture=dataclasses.replace(section.mixture, policy=policy, weights=weights),
    )


def _tuned(
    config: StudyConfig, system: Kind, label: str, section: FinetuneConfig, size: int, seed: int
) -> Iterator[Run]:
    """Candidates that differ in learning rate and epochs, and the choice among them."""
    tasks, grid = tuple(section.tasks), config.grid
    middle = section.mixture.policy if system == "mixed" else tasks[0]
    of = tasks, size, seed
    if system == "conventional":
        name, rates = _name(label, middle, size, seed), grid.conventional_learning_rates
    else:
        name, rates = _name(system, middle, size, seed), grid.learning_rates
    rates = rates or (section.optimizer.learning_rate,)
    lengths = grid.epochs or (section.training.epochs,)
    candidates = []
    for rate, epochs in itertools.product(rates, lengths):
        own = f"{name}-lr{_short(rate)}" + (f"-e{epochs}" if len(lengths) > 1 else "")
        changed = dataclasses.replace(
            section,
            data=_sized(section.data, size),
            optimizer=dataclasses.replace(section.optimizer, learning_rate=rate),
            training=dataclasses.replace(section.training, epochs=epochs, seed=seed),
        )
        candidates.append(own)
        yield Run(own, system, label, *of, changed)
    choice = Choice(tuple(candidates), section.training.select)
    yield Run(name, system, label, *of, choice, tuple(candidates))


def _merges(
    config: StudyConfig, tasks: tuple[str, ...], size: int, seed: int, adapters: Sequence[str]
) -> Iterator[Run]:
    """A merge by every method, and the scores of each on its tasks."""
    within = len(tasks) == 1
    what = "all" if tasks == config.tasks and not within else "+".join(tasks)
    for method in config.grid.merge_methods:
        name = _name(f"merged-{method}", f"{what}-seeds" if within else what, size, seed)
        label = f"merged ({method}{'' if what == 'all' else f', {what}'})"
        of = (f"merged seeds ({method})" if within else label), tasks, size, seed
        merged = MergedConfig("merged", config.model, method=method, seed=seed)
        yield Run(name, "merged", *of, merged, tuple(adapters))
        settings = config.finetune[tasks[0]] if within else config.mixed
        scored = ScoreConfig(
            "score",
            config.model,
            {task: config.finetune[task].tasks[task] for task in tasks},
            _sized(config.data, size),
            settings.evaluation,
            base=False,
            mesh=settings.mesh,
        )
        yield Run(f"{name}-scores", "merged", *of, scored, (name,))


def _sized(data: DataConfig, size: int) -> DataConfig:
    return dataclasses.replace(data, train_size=size)


def _name(system: str, what: str, size: int, seed: int) -> str:
    return f"{system}-{what}-{f'n{size}' if size else 'all'}-s{seed}"


def _short(rate: float) -> str:
    """5e-4 rather than 0.0005."""
    digits, exponent = f"{rate:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"
