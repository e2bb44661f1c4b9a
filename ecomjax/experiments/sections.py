"""The sections that configs consist of, as frozen dataclasses.

Below the config border (`experiments.config`) a config is typed, complete and immutable.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from ecomjax.experiments.conversion import Filled, Interval, Regex

Count = Annotated[int, Interval(0)]
Positive = Annotated[int, Interval(1)]
NonNegative = Annotated[float, Interval(0.0)]
AboveZero = Annotated[float, Interval(0.0, open_low=True)]
Rate = Annotated[float, Interval(0.0, 1.0, open_high=True)]
"""At least 0 and below 1: dropout, warm-up, the betas of Adam."""
Size = Annotated[int, Interval(-1)]
"""Of an axis of the mesh: 1 or more, or -1 for the rest."""
Pattern = Annotated[str, Regex()]
FloatType = Literal["float32", "bfloat16"]
MixturePolicy = Literal["concatenate", "proportional", "temperature", "weights"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which pretrained model, and how it computes."""

    name: str = "smollm2_135m"
    path: str = ""
    """Folder or GGUF file of the weights; where empty, the model is found by its name."""
    param_dtype: FloatType = "float32"
    compute_dtype: FloatType = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again: nothing, all but what linear layers and attention
    return, or everything."""
    dispatch: Literal["ragged", "dense"] = "ragged"
    """How tokens reach their experts, where a model has some."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Of the linear layers, which are frozen; see `adapters.quantize`."""
    kv_cache: Literal["compute", "int8"] = "compute"
    """How the keys and values of prompts and answers are held: as computed, or as int8."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out; see `sharding.RULES` for what is split over which axis.

    Rows are split over data, fsdp and expert.
    """

    data: Size = -1
    """Copies of the model; -1: as many as there are devices for."""
    fsdp: Size = 1
    """Parts along the width of the model, gathered layer by layer; their rows differ too."""
    tensor: Size = 1
    """Parts of heads, feed-forward and vocabulary."""
    expert: Size = 1
    """Parts of the experts; their rows differ too."""


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A task, and how it is asked."""

    name: str
    """As in `tasks/registry.py`."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the task's class takes, such as the columns that are shown."""
    prompt: Literal["chat", "alpaca"] = "chat"
    method: Literal["auto", "likelihood", "generate", "constrained"] = "auto"
    """How answers are found; auto: by likelihood where there is a closed set of labels;
    constrained: written, but so that they can be read (queryner, and tasks with labels)."""
    max_new_tokens: Positive = 64
    """Of an answer written freely."""
    label_score: Literal["sum", "mean", "calibrated"] = "sum"
    """What labels are compared by; see `evaluation.predict.Predictor`."""


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

    policy: MixturePolicy = "concatenate"
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
    """What is trained; batches, packing, evaluation and checkpoints while training."""

    tune: Literal["lora", "all"] = "lora"
    """An adapter, with an encoder's head; or every parameter of the model."""
    dropout: Rate = 0.0
    """Of an encoder's hidden states; adapters have their own."""
    epochs: Positive = 3
    batch_size: Positive = 16
    """Examples of an optimizer step."""
    row_length: Positive = 512
    """Slots of a packed row; longer examples fall under `too_long`."""
    rows: Positive = 1
    """Rows of a microbatch on each of the devices that rows are split over."""
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
    most_skipped: Positive = 10
    """Steps in a row without a finite loss and gradient, after which training stops."""
    spike: NonNegative = 3.0
    """How many times the median of the last losses is warned of; 0: never."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Scoring of a split."""

    split: Literal["train", "validation", "test"] = "test"
    batch_size: Positive = 16
    """Prompts at once, or, where labels are scored, rows of them; no score depends on it."""
    too_long: Literal["truncate", "raise"] = "raise"
    """What becomes of prompts that leave no room for an answer; truncate: demonstrations are
    left out, then input is cut, and both are counted."""
    temperature: NonNegative = 0.0
    """0: greedy."""
    top_k: Count = 0
    top_p: Annotated[float, Interval(0.0, 1.0, open_low=True)] = 1.0
    min_p: Annotated[float, Interval(0.0, 1.0)] = 0.0
    repetition_penalty: AboveZero = 1.0
    """With these two, of answers that are written freely; see `decoding.sampling.Sampling`."""
    stop: tuple[str, ...] = ()
    """Strings that end such an answer, and are no part of it."""
    resamples: Positive = 2000
    """Bootstrap resamples of the intervals."""
    seed: Count = 0


@dataclasses.dataclass(frozen=True)
class FewShotConfig:
    """Demonstrations in the prompt: the numbers tried, and how one of them is chosen."""

    shots: Annotated[tuple[Count, ...], Filled()] = (0, 1, 3, 8)
    policy: Literal["fixed", "balanced", "random", "similar"] = "fixed"
    """Which are shown; see `evaluation.fewshot.Chooser`."""
    order: Literal["drawn", "reversed", "shuffled"] = "drawn"
    """How they follow each other; drawn: under similar the most similar first."""
    select_examples: Positive = 200
    """Validation examples by which the number of shots is chosen."""
    seed: Count = 0


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
class GridConfig:
    """What a study varies; a tuple that is empty leaves a value as its section has it."""

    train_sizes: tuple[Count, ...] = ()
    """Training rows of each task, in place of `data.train_size`; 0: all."""
    seeds: Annotated[tuple[Count, ...], Filled()] = (0,)
    """Of trained systems, in place of `training.seed`."""
    learning_rates: tuple[AboveZero, ...] = ()
    """Each is tried for every adapter; validation chooses."""
    conventional_learning_rates: tuple[AboveZero, ...] = ()
    """Likewise for every conventional model: trained in full, it wants others. The same number
    of both is the same budget."""
    epochs: tuple[Positive, ...] = ()
    """Likewise for both, with every learning rate."""
    mixtures: tuple[MixturePolicy, ...] = ("concatenate",)
    """Policies of the system `mixed`, in place of `mixture.policy`."""
    merge_methods: tuple[str, ...] = ("linear", "ties")
    """Of the system `merged`, as in `adapters/methods.py`."""
    merge_pairs: bool = False
    """Whether every pair of tasks is merged too, besides all of them."""
    together: Positive = 1
    """Adapters trained as one program over one base in memory, at most: those that differ in
    seed, learning rate, epochs and training size. Results do not depend on it, but for rounding."""
