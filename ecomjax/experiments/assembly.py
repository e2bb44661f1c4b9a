"""What every experiment is put together from: base, task, examples, predictor."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from ecomjax import placement, sharding, trees
from ecomjax.adapters.quantize import quantize, ratios
from ecomjax.data.cache import Cache
from ecomjax.data.encoded import Encoded, EncodedSet, read_set, write_set
from ecomjax.data.progress import counting
from ecomjax.data.rows import ChosenRows
from ecomjax.data.sources import HubSource, LocalSource, Source, SyntheticSource
from ecomjax.data.store import Sizes
from ecomjax.data.subsets import draw
from ecomjax.decoding.sampling import Sampling
from ecomjax.errors import UserError
from ecomjax.evaluation.classify import Classifier
from ecomjax.evaluation.predict import Predictor, way_of
from ecomjax.evaluation.respond import Responder
from ecomjax.experiments.sections import (
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    TaskConfig,
    TrainingConfig,
)
from ecomjax.hf.checkpoints import Identity, load_pretrained
from ecomjax.hf.files import sha256_of
from ecomjax.hf.tokenizer import Tokenizer
from ecomjax.models import registry
from ecomjax.models.decoder import Decoder
from ecomjax.models.encoder_decoder import EncoderDecoder
from ecomjax.models.heads import ClassifierConfig
from ecomjax.tasks import prompts
from ecomjax.tasks.base import Example, Reading, Task
from ecomjax.tasks.registry import get_task
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
    mesh: Mesh
    """What the parameters are split over; programs that use them run under `sharding.use`."""


ONE_DEVICE = MeshConfig(data=1)

UNBOUNDED = 1024
"""Window of models that have no table of positions, as T5."""

SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
"""Keys of the config's evaluation that say how tokens are drawn."""

AnyPredictor = Predictor | Classifier | Responder
"""The ways of asking, by the kind of a model."""


@functools.lru_cache(maxsize=1)
def load_base(config: ModelConfig, layout: MeshConfig = ONE_DEVICE, any_kind: bool = False) -> Base:
    """Loads the weights to their devices and says which they are; the last model stays loaded.

    Quantized or not, its identity is that of the weights as they were loaded.

    Args:
        config: names the model.
        layout: of the devices.
        any_kind: whether it may be no decoder.

    Raises:
        UserError: it may not, and is none; see `hf.checkpoints.open_pretrained`.
    """
    mesh = sharding.make_mesh(**dataclasses.asdict(layout))
    placement.meet(mesh)
    # What is to be quantized comes to the devices kernel by kernel, and smaller.
    first = mesh if config.quantization == "none" else None
    loaded = load_pretrained(config.name, config.path, config.param_dtype, first)
    shape, module = configured(loaded.config, config)
    if not any_kind:
        check_decoder(module, config)
    _, axes = registry.describe(module)
    params = loaded.params
    if config.quantization != "none":
        params = quantize(
            params, axes, config.quantization, place=functools.partial(_placed, axes, mesh)
        )
    specs, fallbacks = sharding.specs(axes, params, mesh)
    params = placement.shard_params(params, sharding.shardings(specs, mesh))
    identity = loaded.identity
    # A local folder is what it is, whatever name the config gives it.
    name = "" if identity.source == "local" else f"{identity.name} "
    say(f"base {name}from {identity.source}: {identity.path} ({identity.sha256[:12]})")
    if config.quantization != "none":
        of_kernels, of_model = ratios(params)
        say(
            f"{config.quantization}: linear layers take {of_kernels:.3f} of their bytes in "
            f"bfloat16, the whole model {of_model:.3f}"
        )
    if jax.device_count() > 1:
        _tell_mesh(mesh, params, fallbacks)
    return Base(shape, module, params, axes, loaded.tokenizer, identity, mesh)


def configured(shape: Any, config: ModelConfig) -> tuple[Any, nn.Module]:
    """The shape of a model with the numerics of the config, and its module."""
    known = {field.name for field in dataclasses.fields(shape)}
    ours = {key: value for key, value in dataclasses.asdict(config).items() if key in known}
    shape = dataclasses.replace(shape, **ours)
    return shape, registry.build(shape)


def check_decoder(module: nn.Module, config: ModelConfig) -> None:
    """UserError unless the model continues text."""
    if not isinstance(module, Decoder):
        raise UserError(
            f"{config.name!r} is a {type(module).__name__}, which does not continue text",
            config.path or "model.name",
            "use a decoder, such as those of configs/models.py from smollm2_135m to gpt2_xl",
        )


def _placed(axes: Params, mesh: Mesh, path: str, kernel: Any) -> Any:
    """A kernel on its devices."""
    own = trees.unflatten({path: trees.flatten(axes)[path]})
    alone = trees.unflatten({path: kernel})
    specs, _ = sharding.specs(own, alone, mesh)
    placed = placement.shard_params(alone, sharding.shardings(specs, mesh))
    return trees.flatten(placed)[path]


def _tell_mesh(mesh: Mesh, params: Params, fallbacks: Sequence[sharding.Fallback]) -> None:
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    held = placement.bytes_per_device(params)
    say(
        f"mesh of {mesh.size} of {jax.device_count()} devices: {sizes}; the base takes "
        f"{held / 2**20:.1f} MiB of each, {trees.bytes_of(params) / 2**20:.1f} MiB in all"
    )
    for fallback in fallbacks:
        say(f"mesh: {fallback}")


def make_source(config: DataConfig) -> Source:
    """The source of rows that a config names."""
    if config.source == "local":
        return LocalSource(config.path, config.cache or None, config.version, config.locale)
    if config.source == "hub":
        return HubSource(
            revision=config.revision or None,
            streaming=config.streaming,
            limit=config.stream_limit,
            cache=config.cache or None,
        )
    given = {
        split: size
        for split in ("train", "validation", "test")
        if (size := getattr(config, f"{split}_size"))
    }
    return SyntheticSource(config.seed, Sizes(**given))


def make_tasks(configs: Mapping[str, TaskConfig]) -> dict[str, Task]:
    """The tasks of a config, by the names they have in reports."""
    return {label: get_task(config.name, **config.options) for label, config in configs.items()}


def check_settings(tasks: Mapping[str, TaskConfig], config: EvaluationConfig) -> None:
    """Each setting of the asking is of use to the task, or of all tasks to one.

    Raises:
        UserError: one would be ignored, or a method does not suit its task.
    """
    ways = {label: way_of(task, tasks[label].method) for label, task in make_tasks(tasks).items()}
    for label, way in ways.items():
        if way != "likelihood" and tasks[label].label_score != TaskConfig.label_score:
            raise UserError(
                "a label_score for answers that are not found by the likelihood of labels",
                f"task {label}",
                "leave its label_score at sum, or set its method to likelihood",
            )
    for name in (*SAMPLING, "stop"):
        value, where = getattr(config, name), f"config.evaluation.{name}"
        if value == getattr(EvaluationConfig, name):
            continue
        if "generate" not in ways.values():
            remedy = "leave it out, or set the method generate"
            raise UserError(f"{value} for answers that are not drawn", where, remedy)
        if name in ("top_k", "top_p", "min_p") and config.temperature == 0.0:
            remedy = "leave it out, or set config.evaluation.temperature"
            raise UserError(f"{value} for answers that are greedy", where, remedy)


def load_examples(
    task: Task, config: DataConfig, split: str, report: Reading | None = None
) -> list[Example]:
    """The examples of a split; of a larger one, as many rows as the config asks for."""
    where = f"{config.source} data, {task.data} {split}"
    report = Reading() if report is None else report
    examples = task.examples(chosen_rows(task, config, split), config.on_bad_row, report)
    if not examples:
        raise UserError("no row gives an example", where, str(report))
    if report.bad:
        say(f"{task.data} {split}: {report}")
    return examples


def chosen_rows(task: Task, config: DataConfig, split: str) -> ChosenRows:
    """The rows of a split that a config asks for, in their order."""
    rows = make_source(config).rows(task.data, split)
    size = getattr(config, f"{split}_size")
    return ChosenRows(rows, draw(len(rows), size, config.seed, config.draw == "nested"))


def load_encoded(
    label: str,
    predictor: AnyPredictor,
    task_config: TaskConfig,
    config: DataConfig,
    split: str,
    cut: int | None = None,
) -> tuple[EncodedSet, dict[str, Any]]:
    """The examples of a split as the model is trained on them, and what became of the rows.

    They are tokenized once and kept in the cache, by all that they depend on.

    Args:
        label: of the task, for progress.
        predictor: of the model.
        task_config, config: name task and data.
        split: of the data.
        cut: see `encode_to`.
    """
    task, source = predictor.task, make_source(config)
    # A prompt is what its code says: a change there is another text.
    code = {*Path(prompts.__file__).parent.glob("*.py")}
    kinds = (type(task), type(predictor), EncodedSet)
    code |= {Path(str(inspect.getsourcefile(kind))) for kind in kinds}
    depends = [
        source.fingerprint(task.data, split),
        json.dumps([split, dataclasses.asdict(task_config)], sort_keys=True),
        json.dumps([getattr(config, f"{split}_size"), config.seed, config.draw, cut]),
        config.on_bad_row,
        predictor.tokenizer.fingerprint,
        sha256_of(code),
    ]

    def make(folder: Path) -> None:
        report, about = Reading(), {}
        rows = chosen_rows(task, config, split)

        def examples() -> Iterator[Example]:
            with counting(len(rows), f"{label} {split}: tokenizing") as on_row:
                yield from task.read(rows, report, config.on_bad_row, on_row)
            about.update(vars(report), told=str(report))

        about["cut"] = about["lost"] = 0

        def encoded() -> Iterator[Encoded]:
            for example in encode_to(predictor, examples(), cut):
                about["cut"] += example.lost > 0
                about["lost"] += example.lost
                yield example

        write_set(folder, encoded(), about)

    sequences, about = read_set(Cache(config.cache).made("encoded", depends, make))
    if not len(sequences):
        where = f"{config.source} data, {task.data} {split}"
        raise UserError("no row gives an example", where, about["told"])
    return sequences, about


def cut_of(config: TrainingConfig, window: int) -> int | None:
    """Tokens beyond which training examples are cut as they are encoded, see `encode_to`."""
    return min(config.row_length, window) if config.too_long == "truncate" else None


def encode_to(
    predictor: AnyPredictor, examples: Iterable[Example], cut: int | None
) -> Iterator[Encoded]:
    """The examples as the model is trained on them.

    Args:
        predictor: of the model.
        examples: with their targets.
        cut: tokens beyond which what an encoder reads, or a source and its answer, are cut;
            None: none is. Prompts of decoders are cut later, see `data.encoded.fit_window`.
    """
    if isinstance(predictor, Predictor):
        return predictor.encode(examples)
    return predictor.encode(examples, cut)


def check_overlap(config: DataConfig, label: str, split: str, keys: Any, train: Any) -> int:
    """How many examples of a split have an input that is in train too; told if there are any.

    Args:
        config: says whether that is an error.
        label: of the task.
        split: which the keys are of.
        keys: digests of the inputs, see `data.encoded.key_of`.
        train: those of the training examples.
    """
    count = int(np.isin(np.asarray(keys, np.uint64), train).sum())
    if count:
        what = f"{count} of {len(keys)} inputs of {split} are also in train"
        if config.on_overlap == "raise":
            raise UserError(what, label, "mend the splits, or set config.data.on_overlap=warn")
        say(f"{label}: {what}")
    return count


def choose(examples: Sequence[Example], size: int, seed: int) -> list[Example]:
    """`size` examples drawn without replacement, in their order; all of them for size 0."""
    return [examples[i] for i in draw(len(examples), size, seed)]


def sampling_of(config: EvaluationConfig) -> Sampling:
    """How the tokens of answers that are written freely are drawn."""
    return Sampling(**{name: getattr(config, name) for name in SAMPLING})


def make_predictor(
    base: Base, task: Task, task_config: TaskConfig, config: EvaluationConfig
) -> AnyPredictor:
    """The way the base, adapted or not, is asked."""
    if isinstance(base.config, ClassifierConfig):
        return Classifier(
            model=base.module,
            tokenizer=base.tokenizer,
            task=task,
            batch_size=config.batch_size,
            window=base.config.max_positions,
            too_long=config.too_long,
        )
    if isinstance(base.module, EncoderDecoder):
        return Responder(
            model=base.module,
            tokenizer=base.tokenizer,
            task=task,
            batch_size=config.batch_size,
            window=getattr(base.config, "max_positions", UNBOUNDED),
            max_new_tokens=task_config.max_new_tokens,
            too_long=config.too_long,
            sampling=sampling_of(config),
            stop=config.stop,
            seed=config.seed,
        )
    return Predictor(
        model=base.module,
        tokenizer=base.tokenizer,
        task=task,
        prompt_format=task_config.prompt,
        method=task_config.method,
        batch_size=config.batch_size,
        window=base.config.max_positions,
        max_new_tokens=task_config.max_new_tokens,
        too_long=config.too_long,
        sampling=sampling_of(config),
        stop=config.stop,
        seed=config.seed,
        label_score=task_config.label_score,
    )


def say(line: str) -> None:
    """Tells the user one thing, at once."""
    print(line, file=sys.stderr, flush=True)
