"""What every experiment is put together from: base, task, examples, predictor."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecomjax.data.sources import HubSource, LocalSource, Source, SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.errors import UserError
from ecomjax.evaluation.predict import Predictor
from ecomjax.experiments.config import DataConfig, EvaluationConfig, ModelConfig, TaskConfig
from ecomjax.hf.checkpoints import Identity, load_pretrained
from ecomjax.hf.tokenizer import Tokenizer
from ecomjax.models import registry
from ecomjax.models.decoder import Decoder
from ecomjax.tasks.base import Example, Task
from ecomjax.typing import Params


@dataclasses.dataclass(frozen=True)
class Base:
    """A pretrained model, ready to run."""

    config: Any
    module: nn.Module
    params: Params
    axes: Params
    tokenizer: Tokenizer
    identity: Identity


@functools.lru_cache(maxsize=1)
def load_base(config: ModelConfig) -> Base:
    """Loads the weights and says which ones they are; the last model stays loaded."""
    loaded = load_pretrained(config.name, config.path, config.param_dtype)
    known = {field.name for field in dataclasses.fields(loaded.config)}
    ours = {key: value for key, value in dataclasses.asdict(config).items() if key in known}
    shape = dataclasses.replace(loaded.config, **ours)
    module = registry.build(shape)
    if not isinstance(module, Decoder):
        raise UserError(
            f"{config.name!r} is a {type(module).__name__}, which does not continue text",
            config.path or "model.name",
            "use a decoder, such as those of configs/models.py from smollm2_135m to gpt2_xl",
        )
    _, axes = registry.describe(module)
    params = jax.tree.map(jnp.asarray, loaded.params)
    identity = loaded.identity
    # A local folder is what it is, whatever name the config gives it.
    name = "" if identity.source == "local" else f"{identity.name} "
    say(f"base {name}from {identity.source}: {identity.path} ({identity.sha256[:12]})")
    return Base(shape, module, params, axes, loaded.tokenizer, identity)


def make_source(config: DataConfig) -> Source:
    """The source of rows that a config names."""
    if config.source == "local":
        return LocalSource(config.path)
    if config.source == "hub":
        return HubSource(revision=config.revision or None)
    given = {
        split: size
        for split in ("train", "validation", "test")
        if (size := getattr(config, f"{split}_size"))
    }
    return SyntheticSource(config.seed, Sizes(**given))


def load_examples(task: Task, config: DataConfig, split: str) -> list[Example]:
    """The examples of a split; of a larger one, as many as the config asks for.

    The draw depends on the seed, the size and the ids alone, and keeps the split's order.
    """
    examples = task.load(make_source(config), split)
    size = getattr(config, f"{split}_size")
    return draw(examples, size, config.seed)


def draw(examples: Sequence[Example], size: int, seed: int) -> list[Example]:
    """`size` examples drawn without replacement, in their order; all of them for size 0."""
    if not 0 < size < len(examples):
        return list(examples)
    chosen = random.Random(f"{seed}/{size}").sample(range(len(examples)), size)
    return [examples[i] for i in sorted(chosen)]


def make_predictor(
    base: Base, task: Task, task_config: TaskConfig, config: EvaluationConfig
) -> Predictor:
    """The way the base, adapted or not, is asked."""
    return Predictor(
        model=base.module,
        tokenizer=base.tokenizer,
        task=task,
        prompt_format=task_config.prompt,
        method=config.method,
        batch_size=config.batch_size,
        window=base.config.max_positions,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
    )


def say(line: str) -> None:
    """Tells the user one thing, at once."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def counting(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A progress bar with time left; yields the function that adds to its count."""
    from tqdm import tqdm

    # A file would otherwise fill with bars: there, a line every half minute will do.
    pause = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, desc=what, unit="example", mininterval=pause, leave=False) as bar:
        yield cast(Callable[[int], Any], bar.update)
