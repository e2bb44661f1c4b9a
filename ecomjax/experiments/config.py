"""The config border: a ConfigDict goes in, frozen dataclasses come out.

Whatever a user can write in a config file or on the command line is checked here, once, and
told by its full path (`config.optimizer.learning_rate`). Below this border a config is typed,
complete and immutable.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict

from ecomjax.errors import UserError
from ecomjax.experiments.conversion import Filled, convert, section_of
from ecomjax.experiments.sections import (
    AdapterConfig,
    Count,
    DataConfig,
    EvaluationConfig,
    FewShotConfig,
    GridConfig,
    MergeOptionsConfig,
    MeshConfig,
    MixtureConfig,
    ModelConfig,
    OptimizerConfig,
    SearchConfig,
    TaskConfig,
    TrainingConfig,
)

System = Literal["few_shot", "lora", "mixed", "merged"]
"""What a study can compare, besides floors and conventional models."""


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """One adapter, or one model trained in full, for one task or for a mixture of several."""

    experiment: Literal["finetune"]
    model: ModelConfig
    tasks: dict[str, TaskConfig]
    """By the names they have in reports and in the run folder."""
    data: DataConfig
    mixture: MixtureConfig
    adapter: AdapterConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclasses.dataclass(frozen=True)
class IclConfig:
    """Few-shot prompting of the untuned model."""

    experiment: Literal["icl"]
    model: ModelConfig
    task: TaskConfig
    data: DataConfig
    fewshot: FewShotConfig
    evaluation: EvaluationConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Systems on the same tasks and data: prompted, tuned, mixed, merged, conventional."""

    experiment: Literal["study"]
    model: ModelConfig
    """Of every system but the conventional ones."""
    data: DataConfig
    tasks: tuple[str, ...]
    """What is compared, of the tasks that the sections below are for."""
    systems: Annotated[tuple[System, ...], Filled()]
    grid: GridConfig
    finetune: dict[str, FinetuneConfig]
    """By task: one adapter for it alone."""
    mixed: FinetuneConfig
    """One adapter for all tasks."""
    icl: dict[str, IclConfig]
    """By task: few-shot prompting."""
    conventional: dict[str, FinetuneConfig] = dataclasses.field(default_factory=dict)
    """By task: the model that industry would train for it; tasks may lack one."""
    smoke: bool = False
    """A run that shows that everything works, on too little of everything to be a result."""


@dataclasses.dataclass(frozen=True)
class MergedConfig:
    """Several adapters merged into one, or into the base."""

    experiment: Literal["merged"]
    model: ModelConfig
    """The base: its shape alone, unless it is fused, which its weights are needed for."""
    adapters: tuple[str, ...] = ()
    """Folders in the layout of PEFT, or run folders that hold one."""
    method: str = "linear"
    """As in `adapters/methods.py`."""
    weights: tuple[float, ...] = ()
    """One for each adapter; empty: all adapters count alike, and together as one."""
    weights_by_layer: tuple[tuple[float, ...], ...] = ()
    """Instead of them: for each adapter, one for each layer."""
    options: MergeOptionsConfig = dataclasses.field(default_factory=MergeOptionsConfig)
    seed: Count = 0
    output: Literal["adapter", "model"] = "adapter"
    """What is written: an adapter, or the base with it fused in."""
    search: SearchConfig = dataclasses.field(default_factory=SearchConfig)
    """Of weights, in place of giving them."""
    tasks: dict[str, TaskConfig] = dataclasses.field(default_factory=dict)
    """Whose validation examples weights are searched on."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    similarity: bool = True
    """Whether it is told how alike the adapters are."""
    any_base: bool = False
    """Whether adapters may be of different bases, or of another one than the model."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """An adapter written for other programs."""

    experiment: Literal["export"]
    model: ModelConfig
    """The base: its shape alone, unless the adapter is fused, which its weights are needed for."""
    adapter: str = ""
    """Folder in the layout of PEFT, or a run folder that holds one."""
    output: Literal["adapter", "model"] = "model"
    """What is written: an adapter, or the base with it fused in, in `model.param_dtype`."""
    vllm: bool = False
    """Whether the adapter has to be one that vLLM serves; ranks and scales are made alike."""
    vllm_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16
    """vLLM's `--max-lora-rank`, which takes these alone (vllm/config/lora.py, 0.27; versions
    before may know fewer)."""
    any_base: bool = False
    """Whether the adapter may be of another base than the model."""


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """The untuned model and adapters to it, on the same examples."""

    experiment: Literal["score"]
    model: ModelConfig
    tasks: dict[str, TaskConfig]
    data: DataConfig
    evaluation: EvaluationConfig
    adapters: tuple[str, ...] = ()
    """Folders in the layout of PEFT, or run folders that hold one: trained, or merged."""
    base: bool = True
    """Whether the untuned model is scored too."""
    any_base: bool = False
    """Whether adapters may be of another base than the model."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


Config = FinetuneConfig | IclConfig | StudyConfig | MergedConfig | ExportConfig | ScoreConfig
EXPERIMENTS: dict[str, type] = {
    "finetune": FinetuneConfig,
    "icl": IclConfig,
    "study": StudyConfig,
    "merged": MergedConfig,
    "export": ExportConfig,
    "score": ScoreConfig,
}


def from_config(config: Mapping[str, Any] | ConfigDict) -> Config:
    """The checked and typed form of a config, by its key `experiment`.

    Raises:
        UserError: an unknown or missing key, a value of another type or out of its range.
    """
    # A ConfigDict is no mapping, whatever it looks like.
    if isinstance(config, ConfigDict):
        config = config.to_dict(preserve_field_references=False)
    plain = section_of(config, "config")
    kind = plain.get("experiment")
    if not isinstance(kind, str) or kind not in EXPERIMENTS:
        what = "missing key" if kind is None else f"unknown experiment {kind!r}"
        raise UserError(what, "config.experiment", f"choose one of {', '.join(EXPERIMENTS)}")
    result = convert(plain, EXPERIMENTS[kind], "config")
    if isinstance(result, StudyConfig):
        _check_study(result)
    if isinstance(result, FinetuneConfig | ScoreConfig):
        _check_tasks(result.tasks)
    if isinstance(result, FinetuneConfig):
        _check_finetune(result)
    if isinstance(result, ExportConfig):
        _check_export(result)
        return result
    if result.data.source == "local" and not result.data.path:
        raise UserError("empty folder", "config.data.path", "name the folder of the local data")
    return result


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass in the types of JSON, keys in the order of the fields."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_json(config: Any) -> str:
    """A config dataclass as the text of `config.json`."""
    return json.dumps(to_dict(config), indent=2, ensure_ascii=False) + "\n"


def check_name(kind: str, name: str, where: str) -> None:
    """UserError unless it can be part of a file's name and of a line of a report."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{kind} named {name!r}", where, "use letters, digits, _, - and .")


def _check_tasks(tasks: Mapping[str, TaskConfig]) -> None:
    """There are tasks, with names that can be folders."""
    for label in tasks:
        check_name("task", label, "config.tasks")
    if not tasks:
        raise UserError("no tasks", "config.tasks", "name one or more")


def _check_finetune(finetune: FinetuneConfig) -> None:
    """There is a weight for each task if any is weighed; the adapter suits the base."""
    if finetune.adapter.pissa and finetune.model.quantization != "none":
        raise UserError(
            "PiSSA takes a part out of the base, which a quantized one cannot give",
            "config.adapter.pissa",
            "set config.model.quantization=none, or leave PiSSA out",
        )
    if finetune.training.tune == "all":
        for key, given, wanted in (
            ("quantization", finetune.model.quantization, "none"),
            ("param_dtype", finetune.model.param_dtype, "float32"),
        ):
            if given != wanted:
                raise UserError(
                    f"{given} parameters cannot be trained in full",
                    f"config.model.{key}",
                    f"set it to {wanted}, or config.training.tune=lora",
                )
    mixture, weighed = finetune.mixture, finetune.mixture.weights
    unused = {
        "temperature": mixture.temperature != 1.0 and mixture.policy != "temperature",
        "weights": len(set(weighed.values())) > 1 and mixture.policy != "weights",
        "examples": mixture.examples and mixture.policy == "concatenate",
    }
    for key, given in unused.items():
        if given:
            raise UserError(
                f"policy {mixture.policy!r} does not use it",
                f"config.mixture.{key}",
                "set config.mixture.policy too",
            )
    if mixture.policy == "weights" and set(weighed) != set(finetune.tasks):
        raise UserError(
            f"weights for {sorted(weighed)}",
            "config.mixture.weights",
            f"give one to each of config.tasks, that is {sorted(finetune.tasks)}",
        )


def _check_export(export: ExportConfig) -> None:
    """Nothing is said of how vLLM serves adapters where none is written."""
    unused = {"vllm": export.vllm, "vllm_rank": export.vllm_rank != ExportConfig.vllm_rank}
    for key, given in unused.items():
        if given and export.output == "model":
            raise UserError(
                "a fused model does not use it",
                f"config.{key}",
                "leave it out, or set config.output=adapter",
            )


def _check_study(study: StudyConfig) -> None:
    """Every task has its experiments, on the data of the study and, but for those of
    conventional models, on its model."""
    if not study.tasks or len(set(study.tasks)) < len(study.tasks):
        raise UserError(f"tasks {list(study.tasks)}", "config.tasks", "name each task once")
    for name in ("finetune", "icl"):
        if not set(getattr(study, name)) >= set(study.tasks):
            raise UserError(
                f"sections for {sorted(getattr(study, name))}",
                f"config.{name}",
                f"give one to each of config.tasks, that is {sorted(study.tasks)}",
            )
    for key, values in vars(study.grid).items():
        if isinstance(values, tuple) and len(set(values)) < len(values):
            raise UserError(f"values {list(values)}", f"config.grid.{key}", "give each once")
    if "merged" in study.systems and "lora" not in study.systems:
        raise UserError("nothing to merge", "config.systems", "add lora, whose adapters are merged")
    for name in ("finetune", "icl", "conventional"):
        for task, section in getattr(study, name).items():
            found = [section.task.name] if name == "icl" else list(section.tasks)
            if found != [task]:
                path = f"config.{name}.{task}"
                raise UserError(f"tasks {found}", path, f"it has to be {task!r} alone")
    if not set(study.mixed.tasks) >= set(study.tasks):
        raise UserError(
            f"tasks {sorted(study.mixed.tasks)}",
            "config.mixed.tasks",
            f"give all of config.tasks, that is {sorted(study.tasks)}",
        )
    sections: dict[str, Any] = {"mixed": study.mixed}
    for name in ("finetune", "icl", "conventional"):
        sections |= {f"{name}.{task}": found for task, found in getattr(study, name).items()}
    for name, section in sections.items():
        own_model = name.startswith("conventional.")
        if section.data != study.data or (section.model != study.model and not own_model):
            raise UserError(
                "another model or other data than the study's",
                f"config.{name}",
                "set config.model and config.data, which all experiments share",
            )
        if isinstance(section, FinetuneConfig):
            _check_finetune(section)
