"""About how long the runs of a study take, counted before any of them is started."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ecomjax import trees
from ecomjax.experiments.assembly import load_examples
from ecomjax.experiments.config import (
    FinetuneConfig,
    IclConfig,
    MergedConfig,
)
from ecomjax.experiments.grid import Choice, Run
from ecomjax.experiments.sections import DataConfig, ModelConfig, TaskConfig
from ecomjax.hf.checkpoints import load_config
from ecomjax.models import registry
from ecomjax.tasks.registry import get_task

BYTES_A_TOKEN = 4
"""Of English text, about; nothing is tokenized to estimate."""

LABEL_TOKENS = 8
"""About what all labels of a task together have."""

SAMPLE = 64
"""Examples that lengths are averaged over."""

SHARE = 0.4
"""Of the speed of a matrix product, what a whole run reaches: a guess."""

BASIS = (
    "a rough guess: 4 N operations a token in training and 2 N in answering, N the parameters of "
    f"the model, at {SHARE:g} of the speed of a matrix product measured now; a token is taken to "
    f"be {BYTES_A_TOKEN} bytes, an answer as long as it may be; compiling comes on top"
)


def operations(runs: Sequence[Run]) -> dict[str, float]:
    """Floating-point operations that each run takes, about, by its name.

    What all prompts of a task have in common is computed once, and left out; so is merging.
    """
    counter, named = _Counter(), {run.name: run for run in runs}
    return {run.name: counter.of(run, named) for run in runs}


def speed() -> float:
    """Operations a second that runs are taken to reach: a share of a matrix product's."""
    size, times = 1024, 8
    product = jax.jit(lambda x: x @ x)
    x = jnp.ones((size, size), jnp.float32)
    product(x).block_until_ready()
    start = time.perf_counter()
    for _ in range(times):
        product(x).block_until_ready()
    return SHARE * times * 2 * size**3 / (time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class _Lengths:
    """Examples of a split, and tokens of one of them."""

    examples: int
    asked: float
    answered: float


class _Counter:
    """Counts the operations of runs, reading every split and every model's shape once."""

    def __init__(self) -> None:
        self._lengths: dict[tuple[str, DataConfig, str], _Lengths] = {}
        self._parameters: dict[ModelConfig, int] = {}

    def of(self, run: Run, named: Mapping[str, Run]) -> float:
        config = run.config
        if isinstance(config, MergedConfig):
            return 0.0
        if isinstance(config, FinetuneConfig):
            return sum(self._training(config, task) for task in config.tasks.values())
        if isinstance(config, IclConfig):
            few = config.fewshot
            shots = len(set(few.shots))
            asked = shots * self._answering(config, config.task, "validation", few.select_examples)
            return asked + 2 * self._answering(config, config.task, config.evaluation.split)
        if isinstance(config, Choice):
            return self._scoring(named[config.candidates[0]].config)
        return self._scoring(config)

    def _training(self, config: FinetuneConfig, task: TaskConfig) -> float:
        settings, train = config.training, self._of_split(task, config.data, "train")
        tokens = settings.epochs * train.examples * (train.asked + train.answered)
        watched = self._answering(config, task, "validation", settings.validation_examples)
        return 4.0 * self._size(config.model) * tokens + settings.epochs * watched

    def _scoring(self, config: Any) -> float:
        split = config.evaluation.split
        return sum(self._answering(config, task, split) for task in config.tasks.values())

    def _answering(self, config: Any, task: TaskConfig, split: str, most: int = 0) -> float:
        """Operations of asking a split, or `most` of its examples."""
        found = self._of_split(task, config.data, split)
        examples = min(most or found.examples, found.examples)
        answered = found.answered
        if get_task(task.name, **task.options).labels is not None:
            answered = LABEL_TOKENS
        elif isinstance(config, IclConfig):
            answered = task.max_new_tokens
        return 2.0 * self._size(config.model) * examples * (found.asked + answered)

    def _of_split(self, config: TaskConfig, data: DataConfig, split: str) -> _Lengths:
        key = f"{config.name} {sorted(config.options.items())}", data, split
        if key not in self._lengths:
            task = get_task(config.name, **config.options)
            examples = load_examples(task, data, split)
            sample = examples[:SAMPLE]
            asked, answered = (
                sum(len(text(e).encode()) for e in sample) / len(sample) / BYTES_A_TOKEN
                for text in (task.user, task.answer)
            )
            self._lengths[key] = _Lengths(len(examples), asked, answered)
        return self._lengths[key]

    def _size(self, model: ModelConfig) -> int:
        if model not in self._parameters:
            module = registry.build(load_config(model.name, model.path))
            shapes, _ = registry.describe(module)
            leaves = trees.flatten(shapes).values()
            self._parameters[model] = sum(math.prod(leaf.shape) for leaf in leaves)
        return self._parameters[model]
