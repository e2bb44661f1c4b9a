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
from ecomjax.experiments.conversion import Filled, Interval, Regex, convert, section_of

Count = Annotated[int, Interval(0)]
Positive = Annotated[int, Interval(1)]
NonNegative = Annotated[float, Interval(0.0)]
AboveZero = Annotated[float, Interval(0.0, open_low=True)]
Rate = Annotated[float, Interval(0.0, 1.0, open_high=True)]
"""At least 0 and below 1: dropout, warm-up, the betas of Adam."""
Pattern = Annotated[str, Regex()]
FloatType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which pretrained model, and how it computes."""

    name: str = "smollm2_135m"
    path: str = ""
    """Folder or GGUF file of the weights; where empty, the model is found by its name."""
    param_dtype: FloatType = "float32"
    compute_dtype: FloatType = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    dispatch: Literal["ragged", "dense"] = "ragged"
    """How tokens reach their experts, where a model has some."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Of the linear layers, which are frozen; see `adapters.quantize`."""


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A task, and how it is asked."""

    name: str
    """As in `tasks/registry.py`."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the task's class takes, such as the columns that are shown."""
    prompt: Literal["chat", "alpaca"] = "chat"
    method: Literal["auto", "likelihood", "generate"] = "auto"
    """How answers are found; auto: by likelihood where there is a closed set of labels."""
    max_new_tokens: Positive = 64
    """Of a written answer."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where examples come from, and how many of each split are used (0: all)."""

    source: Literal["synthetic", "local", "hub"] = "synthetic"
    path: str = ""
    """Folder of the source `local`."""
    revision: str = ""
    """Commit, tag or branch on the Hub; where empty, the newest, which run.json names."""
    streaming: bool = False
    """Whether data of the Hub are read row by row into the cache, without their own files."""
    stream_limit: Count = 0
    """Rows of a split that are streamed; 0: all."""
    version: Literal["", "small", "large"] = ""
    """Which part of the official ESCI tables; where empty, all of them."""
    locale: str = ""
    """Which locale of the official ESCI tables, such as us; where empty, all of them."""
    seed: Count = 0
    train_size: Count = 0
    validation_size: Count = 0
    test_size: Count = 0
    draw: Literal["independent", "nested"] = "independent"
    """Subsets of different sizes: independent draws, or each within every larger one."""
    on_bad_row: Literal["raise", "drop"] = "raise"
    """What becomes of rows that cannot be read; dropped ones are counted and told."""
    on_overlap: Literal["warn", "raise"] = "warn"
    """What becomes of inputs that are in train and in a split that is scored."""
    cache: str = ""
    """Folder of converted and tokenized data; where empty, `ecomjax` in the user's cache."""


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """How the examples of several tasks are mixed; see `data.mixture.Mixture`."""

    policy: Literal["concatenate", "proportional", "temperature", "weights"] = "concatenate"
    temperature: float = 1.0
    """Under "temperature"; inf: all tasks alike."""
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    """Under "weights": one for each of `tasks`."""
    cap: Count = 0
    """Size from which on a task counts as no larger; 0: none."""
    examples: Count = 0
    """Examples an epoch; 0: the sum of the capped sizes."""


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """LoRA on every kernel whose whole path matches `pattern`."""

    pattern: Pattern
    rank: Positive
    alpha: AboveZero
    dropout: Rate = 0.0
    layers: tuple[Count, ...] = ()
    """Of the stack; empty: all."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """LoRA: kernels matching one of `targets`; `rules` differ from the rest, the last one wins."""

    rank: Positive = 16
    alpha: AboveZero = 32.0
    dropout: Rate = 0.0
    rslora: bool = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank."""
    dora: bool = False
    """Magnitude and direction apart."""
    pissa: bool = False
    """Start from the principal part of each kernel."""
    targets: Annotated[tuple[Pattern, ...], Filled()] = (r"(.*/)?layers/.*(?<!/router)/kernel",)
    """Every linear layer, as `adapters.rules.EVERY_LINEAR`, whose module would import jax here."""
    rules: tuple[RuleConfig, ...] = ()

    @property
    def all_rules(self) -> tuple[RuleConfig, ...]:
        """One rule per target, then `rules`: where several match a kernel, the last wins."""
        shared = (RuleConfig(t, self.rank, self.alpha, self.dropout) for t in self.targets)
        return (*shared, *self.rules)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning rate over the run, and gradient clipping."""

    learning_rate: AboveZero = 5e-4
    warmup: Rate = 0.03
    """Fraction of the steps over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: NonNegative = 0.0
    clip_norm: AboveZero = 1.0
    beta1: Rate = 0.9
    beta2: Rate = 0.999
    loraplus_ratio: AboveZero = 1.0
    """Learning rate of LoRA's b over that of a."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Batches, packing, evaluation and checkpoints while training."""

    epochs: Positive = 3
    batch_size: Positive = 16
    """Examples of an optimizer step."""
    row_length: Positive = 512
    """Slots of a packed row; longer examples fall under `too_long`."""
    rows: Positive = 1
    """Rows of a microbatch."""
    packing: Literal["shared_prefix", "plain", "pad"] = "shared_prefix"
    too_long: Literal["drop", "truncate", "raise"] = "drop"
    """What becomes of examples longer than a row; truncate: input is cut, never answers."""
    seed: Count = 0
    evaluate_every: Count = 0
    """Steps between evaluations; 0: once an epoch."""
    validation_examples: Count = 200
    """Examples of each task that an evaluation looks at; 0: all of the validation split."""
    select: Literal["metric", "loss"] = "metric"
    """What the best checkpoint is best in."""
    patience: Count = 0
    """Evaluations without a gain after which training stops; 0: never."""
    checkpoint_every: Positive = 50
    keep: Positive = 2
    """Checkpoints kept beside the best one."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Scoring of a split."""

    split: Literal["train", "validation", "test"] = "test"
    batch_size: Positive = 16
    """Prompts at once; no score depends on it."""
    too_long: Literal["truncate", "raise"] = "raise"
    """What becomes of prompts that leave no room for an answer; truncate: input is cut."""
    temperature: NonNegative = 0.0
    """0: greedy."""
    top_p: Annotated[float, Interval(0.0, 1.0, open_low=True)] = 1.0
    resamples: Positive = 2000
    """Bootstrap resamples of the intervals."""
    seed: Count = 0


@dataclasses.dataclass(frozen=True)
class FewShotConfig:
    """Demonstrations in the prompt: the numbers tried, and how one of them is chosen."""

    shots: Annotated[tuple[Count, ...], Filled()] = (0, 1, 3, 8)
    select_examples: Positive = 200
    """Validation examples by which the number of shots is chosen."""
    seed: Count = 0


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """One adapter for one task, or for a mixture of several."""

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


@dataclasses.dataclass(frozen=True)
class IclConfig:
    """Few-shot prompting of the untuned model."""

    experiment: Literal["icl"]
    model: ModelConfig
    task: TaskConfig
    data: DataConfig
    fewshot: FewShotConfig
    evaluation: EvaluationConfig


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Few-shot prompting against one adapter per task, on the same model and data."""

    experiment: Literal["study"]
    model: ModelConfig
    data: DataConfig
    tasks: tuple[str, ...]
    finetune: dict[str, FinetuneConfig]
    icl: dict[str, IclConfig]
    smoke: bool = False
    """A run that shows that everything works, on too little of everything to be a result."""


@dataclasses.dataclass(frozen=True)
class MergeOptionsConfig:
    """What a method of merging leaves open, see `adapters.methods.Options`."""

    rank: Count = 0
    """Of the result; 0: the default of the method."""
    density: Annotated[float, Interval(0.0, 1.0, open_low=True)] = 0.5
    gamma: Rate = 0.01
    epsilon: Annotated[float, Interval(0.0, 1.0)] = 0.1
    rescale: Literal["expectation", "l1", "none"] = "expectation"
    elect: Literal["weighted", "unweighted"] = "weighted"
    votes: Literal["total", "frequency"] = "total"
    normalise: Literal["method", "weights", "count", "none"] = "method"
    """What the sum is divided by; method: what the method divides by."""


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Merge weights found on validation examples; see `adapters.search`."""

    kind: Literal["none", "gradient_free", "gradient"] = "none"
    by_layer: bool = False
    """Whether each layer has weights of its own."""
    budget: Positive = 60
    """Most evaluations of the loss."""
    penalty: NonNegative = 0.05
    bound: AboveZero = 1.5
    examples: Count = 64
    """Of the validation split of each task; 0: all."""
    row_length: Positive = 512


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


Config = FinetuneConfig | IclConfig | StudyConfig | MergedConfig
EXPERIMENTS: dict[str, type] = {
    "finetune": FinetuneConfig,
    "icl": IclConfig,
    "study": StudyConfig,
    "merged": MergedConfig,
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
    if isinstance(result, FinetuneConfig):
        _check_finetune(result)
    if result.data.source == "local" and not result.data.path:
        raise UserError("empty folder", "config.data.path", "name the folder of the local data")
    return result


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass in the types of JSON, keys in the order of the fields."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_json(config: Any) -> str:
    """A config dataclass as the text of `config.json`."""
    return json.dumps(to_dict(config), indent=2, ensure_ascii=False) + "\n"


def _check_finetune(finetune: FinetuneConfig) -> None:
    """There are tasks, with names that can be folders and a weight for each if any is weighed;
    the adapter suits the base."""
    for label in finetune.tasks:
        if not re.fullmatch(r"\w[\w.-]*", label):
            raise UserError(
                f"task named {label!r}", "config.tasks", "use letters, digits, _, - and ."
            )
    if not finetune.tasks:
        raise UserError("no tasks", "config.tasks", "name one or more")
    if finetune.adapter.pissa and finetune.model.quantization != "none":
        raise UserError(
            "PiSSA takes a part out of the base, which a quantized one cannot give",
            "config.adapter.pissa",
            "set config.model.quantization=none, or leave PiSSA out",
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


def _check_study(study: StudyConfig) -> None:
    """Every task has its two experiments, on the model and data of the study."""
    if not study.tasks or len(set(study.tasks)) < len(study.tasks):
        raise UserError(f"tasks {list(study.tasks)}", "config.tasks", "name each task once")
    for name in ("finetune", "icl"):
        sections = getattr(study, name)
        if set(sections) != set(study.tasks):
            raise UserError(
                f"sections for {sorted(sections)}",
                f"config.{name}",
                f"give one to each of config.tasks, that is {sorted(study.tasks)}",
            )
        for task, section in sections.items():
            path = f"config.{name}.{task}"
            found = [section.task.name] if name == "icl" else list(section.tasks)
            if found != [task]:
                raise UserError(f"tasks {found}", path, f"it has to be {task!r} alone")
            if section.model != study.model or section.data != study.data:
                raise UserError(
                    "another model or other data than the study's",
                    path,
                    "set config.model and config.data, which all experiments share",
                )
