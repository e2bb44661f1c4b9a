"""Training steps of an adapter, beside the Trainer of transformers with PEFT."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ecomjax.adapters import lora
from ecomjax.data.encoded import Encoded, EncodedSet, fit_window, shared_prefix
from ecomjax.data.packing import Packing, make_plan
from ecomjax.data.pipeline import StepSource
from ecomjax.errors import UserError
from ecomjax.experiments.assembly import Base, load_base, load_encoded, make_predictor, say
from ecomjax.experiments.benchmarks.peer import imported, load_peer
from ecomjax.experiments.benchmarks.result import Result, alternate, timed
from ecomjax.experiments.initial import init_adapter, init_state, make_optimizer, make_rules
from ecomjax.experiments.sections import (
    AdapterConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
)
from ecomjax.hf.peft import write_adapter
from ecomjax.tasks.registry import get_task
from ecomjax.training.losses import causal_lm
from ecomjax.training.step import make_train_step
from ecomjax.typing import Adapter, Params

EXAMPLES = 128
"""Of an optimizer step."""

LONGEST = 512
"""Tokens of an example; longer ones are left out, as in the study."""

ROW_LENGTHS = range(512, 2049, 64)
"""Among these, rows are as long as leaves least to compute for a step."""

PEER_BATCHES = (8, 16, 32)
"""Examples of a padded batch; the peer is measured with the one that it was fastest with."""

RAW_BATCH, RAW_LENGTH = 8, 128
"""Rows and tokens of the raw step."""

OPTIMIZER = OptimizerConfig(learning_rate=1e-4, warmup=0.0, schedule="constant")
NO_LABEL = -100
"""Of positions without a loss, in transformers."""

LOSS_TOLERANCE = 1e-3
"""Relative, of the loss of a step after the first update."""


Run = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Work:
    """What one optimizer step is over.

    Attributes:
        name: of the benchmark.
        unit: what is counted.
        count: how many of it a step has.
        sequences: the examples.
        packing: how ours lays them out.
        row_lengths: of ours, those to choose from.
        peer_batches: of the peer, those to choose from.
        target: of the ratio.
    """

    name: str
    unit: str
    count: int
    sequences: EncodedSet
    packing: Packing
    row_lengths: Sequence[int]
    peer_batches: Sequence[int]
    target: float


def train(data: str) -> Result:
    """Seconds an example of QueryNER, in optimizer steps of 128.

    LoRA of rank 16 on every linear layer of SmolLM2-135M in float32, real training rows behind
    the same instruction. The peer groups by length and takes its fastest batch.

    Args:
        data: folder of real data, or "synthetic".

    Raises:
        UserError: there are no such data, a package of the peer is missing, or the losses differ.
    """
    base = load_base(ModelConfig())
    return beside_peer(base, _examples(base, "train", "queryner", data, 1 / 3))


def train_esci(data: str) -> Result:
    """As `train`, of ESCI, whose examples have less in common."""
    base = load_base(ModelConfig())
    return beside_peer(base, _examples(base, "train_esci", "esci", data, 1 / 1.8))


def raw_step() -> Result:
    """Seconds a token of dense rows of random tokens with a loss on each: no help from packing."""
    base = load_base(ModelConfig())
    return beside_peer(base, raw_work(base))


def raw_work(base: Base) -> Work:
    """Dense rows of random tokens."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, base.config.vocab_size, (RAW_BATCH, RAW_LENGTH)).tolist()
    # The first token is the prompt: nothing predicts it.
    rows = EncodedSet.of(Encoded(str(i), tuple(row), 1) for i, row in enumerate(drawn))
    count = RAW_BATCH * RAW_LENGTH
    layout = ("pad", [RAW_LENGTH], [RAW_BATCH])
    return Work("raw_step", "seconds a token", count, rows, *layout, 1.0)


def _examples(base: Base, name: str, task: str, data: str, target: float) -> Work:
    """A step of the first training examples of a task."""
    source = DataConfig() if data == "synthetic" else DataConfig(source="local", path=data)
    config = TaskConfig(task, prompt="alpaca")
    predictor = make_predictor(base, get_task(task), config, EvaluationConfig())
    encoded, _ = load_encoded(task, predictor, config, source, "train")
    kept = fit_window(encoded, LONGEST, "drop", task).sequences
    sequences = kept[np.arange(min(EXAMPLES, len(kept)))]
    layout = ("shared_prefix", ROW_LENGTHS, PEER_BATCHES)
    return Work(name, "seconds an example", len(sequences), sequences, *layout, target)


def beside_peer(base: Base, work: Work) -> Result:
    """Both sides train the same adapter on the same step, over and over.

    Before seconds count, the losses of both are compared, before the first update and after it.
    """
    params, adapter = init_adapter(
        base.params, base.axes, make_rules(AdapterConfig()), jax.random.key(0), base.mesh
    )
    start = jax.device_get(adapter)  # Training takes over the arrays.
    run_ours, slots = our_step(base, work, params, adapter)
    ours = run_ours(), run_ours()
    steps: dict[int, Callable[[], float]] = {}
    tried: dict[int, float] = {}
    for batch in work.peer_batches:
        steps[batch] = peer_step(base, work, start, batch)
        first, (second, tried[batch]) = steps[batch](), timed(steps[batch])
        say(
            f"{work.name}: loss {ours[0]:.5f}, then {ours[1]:.5f}; the peer's in batches of "
            f"{batch}: {first:.5f}, then {second:.5f}"
        )
        worst = max(abs(first / ours[0] - 1), abs(second / ours[1] - 1))
        # Said so, NaN is a difference.
        if not worst <= LOSS_TOLERANCE:
            raise UserError(
                f"losses differ by {worst:.1e}", work.name, "this is a defect, please report it"
            )
    best = min(tried, key=lambda batch: tried[batch])
    seconds = alternate(run_ours, steps[best])
    return Result(
        name=work.name,
        unit=work.unit,
        ours=statistics.median(seconds[0]) / work.count,
        peer=statistics.median(seconds[1]) / work.count,
        target=work.target,
        samples=len(work.sequences),
        details={
            "seconds": dict(zip(("ours", "peer"), seconds, strict=True)),
            "tokens": float(work.sequences.lengths.mean()),
            "slots": slots,
            "peer_batch": best,
            "peer_seconds_by_batch": tried,
        },
    )


def our_step(base: Base, work: Work, params: Params, adapter: Adapter) -> tuple[Run, float]:
    """An optimizer step that returns its loss, and the slots it computes for an example."""
    sequences, count = work.sequences, len(work.sequences)
    plans = [
        make_plan(
            sequences.lengths,
            [np.arange(count)],
            prefixes=[shared_prefix(sequences)],
            packing=work.packing,
            row_length=length,
            batch_size=count,
        )
        for length in work.row_lengths
    ]
    plan = min(plans, key=lambda plan: plan.rows * plan.row_length)
    rows = plan.rows if work.packing == "pad" else 1
    batch = jax.device_put(StepSource(plan, sequences, rows)[0])
    optimizer, schedule = make_optimizer(OPTIMIZER, 1)
    trained, fixed = lora.split(adapter)
    state, lies = init_state(trained, optimizer, jax.random.key(0), base.mesh)
    step = make_train_step(causal_lm(base.module), optimizer, schedule, shardings=lies)
    frozen, states = {"params": params, "fixed": fixed}, [state]

    def run() -> float:
        state, metrics = step(states.pop(), frozen, batch)
        states.append(state)
        return float(metrics["loss"])

    return run, plan.rows * plan.row_length / count


def peer_step(base: Base, work: Work, adapter: Adapter, batch: int) -> Run:
    """The same of transformers and PEFT: what their Trainer does in a step, and no more.

    Examples are sorted by length, which is how the Trainer groups so many, and padded.
    """
    torch, peft = imported("torch"), imported("peft")
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(folder, adapter, base.config, base.identity)
        model = peft.PeftModel.from_pretrained(load_peer(base), folder, is_trainable=True)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        weight_decay=OPTIMIZER.weight_decay,
    )
    examples = sorted(work.sequences, key=lambda example: len(example.tokens))
    targets = sum(len(example.tokens) - example.prompt for example in examples)
    batches = []
    for first in range(0, len(examples), batch):
        part = examples[first : first + batch]
        shape = len(part), max(len(example.tokens) for example in part)
        tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, NO_LABEL)
        for row, example in enumerate(part):
            own = torch.tensor(example.tokens)
            tokens[row, : len(own)], mask[row, : len(own)] = own, 1
            labels[row, example.prompt : len(own)] = own[example.prompt :]
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})

    def run() -> float:
        total = 0.0
        for padded in batches:
            loss = model(**padded, num_items_in_batch=targets).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return run
