"""Tokens that packing leaves to compute, beside padding grouped by length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.data.encoded import EncodedSet, fit_window, shared_prefix
from ecomjax.data.mixture import Mixture, draw_orders
from ecomjax.data.packing import Packing, Plan, make_plan
from ecomjax.data.pipeline import StepSource
from ecomjax.errors import UserError
from ecomjax.experiments.assembly import Base, load_base, load_encoded, make_predictor, say
from ecomjax.experiments.benchmarks.result import Result
from ecomjax.experiments.sections import DataConfig, EvaluationConfig, ModelConfig, TaskConfig
from ecomjax.tasks.registry import get_task
from ecomjax.training.losses import causal_lm

BATCH = 128
"""Examples of an optimizer step."""

ROW_LENGTHS = range(512, 2049, 64)
"""Among these, rows are as long as wastes least: a step's last row is seldom full."""

PEER_BATCH = 8
"""Examples of a padded batch of the peer, as in the study."""

MEGABATCH = 50
"""Padded batches that the peer sorts by length together, as the Trainer of transformers does."""

PARITY_EXAMPLES, PARITY_ROW = 16, 1024
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 5e-5
PACKINGS: tuple[Packing, ...] = ("shared_prefix", "plain", "pad")


def packing(data: str) -> Result:
    """Tokens processed for each example: shared-prefix rows beside padding grouped by length.

    Before anything is counted, the three ways to lay out examples are shown to be the same
    training: loss and adapter gradient of SmolLM2-135M on the same examples agree.

    Args:
        data: folder of real data, or "synthetic".

    Raises:
        UserError: there is no such data, or the three ways differ.
    """
    source = DataConfig() if data == "synthetic" else DataConfig(source="local", path=data)
    base = load_base(ModelConfig())
    found = {}
    for task in ("queryner", "esci"):
        config = TaskConfig(name=task, prompt="alpaca")
        predictor = make_predictor(base, get_task(task), config, EvaluationConfig())
        encoded, _ = load_encoded(task, predictor, config, source, "train")
        sequences = fit_window(encoded, ROW_LENGTHS[0], "drop", task).sequences
        found[task] = _parity(base, task, sequences) | _slots(task, sequences)
    queryner = found["queryner"]
    return Result(
        name="packing",
        unit="tokens processed per example, padding included",
        ours=queryner["shared_prefix"],
        peer=queryner["length_grouped_padding"],
        target=0.30,
        samples=queryner["examples"],
        details=found | {"batch": BATCH, "peer_batch": PEER_BATCH},
    )


def _slots(task: str, sequences: EncodedSet) -> dict[str, Any]:
    """Slots that each way computes for an example, padding included."""
    count = len(sequences)
    found: dict[str, Any] = {"examples": count, "prefix": shared_prefix(sequences)}
    found["tokens"] = float(sequences.lengths.mean())
    for kind in ("shared_prefix", "plain"):
        slots = {length: _packed(sequences, kind, length) for length in ROW_LENGTHS}
        best = min(slots, key=lambda length: slots[length])
        found |= {kind: slots[best] / count, f"{kind}_row_length": best}
    found["length_grouped_padding"] = _grouped_slots(sequences.lengths) / count
    (order,) = draw_orders([count], Mixture(), 0, 1)
    found["random_padding"] = _padded(sequences.lengths[order]) / count
    say(
        f"{task}: {count} examples of {found['tokens']:.1f} tokens, {found['prefix']} of them "
        f"shared. Tokens processed per example: shared prefix {found['shared_prefix']:.1f} "
        f"(rows of {found['shared_prefix_row_length']}), plain packing {found['plain']:.1f} "
        f"(rows of {found['plain_row_length']}), padding grouped by length "
        f"{found['length_grouped_padding']:.1f}, padding {found['random_padding']:.1f}; shared "
        f"prefix / grouped {found['shared_prefix'] / found['length_grouped_padding']:.3f}"
    )
    return found


def _packed(sequences: EncodedSet, kind: Packing, row_length: int) -> int:
    """Slots of the rows of an epoch that hold something."""
    plan = plan_of(sequences, kind, row_length, BATCH)
    steps = np.repeat(np.arange(len(plan)), np.diff(plan.starts))
    return len(np.unique(steps * (plan.rows + 1) + plan.row_of)) * row_length


def _grouped_slots(lengths: np.ndarray) -> int:
    """Slots of padded batches whose examples were sorted by length within megabatches."""
    (order,) = draw_orders([len(lengths)], Mixture(), 0, 1)
    mega = PEER_BATCH * MEGABATCH
    parts = [np.sort(lengths[order[i : i + mega]]) for i in range(0, len(order), mega)]
    return _padded(np.concatenate(parts))


def _padded(lengths: np.ndarray) -> int:
    """Slots of consecutive batches, each padded to its longest."""
    batches = [lengths[i : i + PEER_BATCH] for i in range(0, len(lengths), PEER_BATCH)]
    return sum(int(batch.max()) * len(batch) for batch in batches)


def plan_of(sequences: EncodedSet, kind: Packing, row_length: int, batch: int) -> Plan:
    """One shuffled epoch."""
    return make_plan(
        sequences.lengths,
        draw_orders([len(sequences)], Mixture(), 0, 1),
        prefixes=[shared_prefix(sequences)],
        packing=kind,
        row_length=row_length,
        batch_size=batch,
    )


def _parity(base: Base, task: str, sequences: EncodedSet) -> dict[str, float]:
    """The largest differences of loss and gradient between the three ways; UserError if large."""
    differences = parity(base, sequences[np.arange(min(PARITY_EXAMPLES, len(sequences)))])
    loss, gradient = differences["loss_difference"], differences["gradient_difference"]
    say(
        f"{task}: loss {differences['loss']:.6f}; the three ways differ by {loss:.1e} (loss, "
        f"relative) and {gradient:.1e} (gradient of a leaf, relative norm)"
    )
    # Said so, NaN is a difference.
    if not (loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE):
        raise UserError(
            f"packed and padded training differ by {loss:.1e} in loss, {gradient:.1e} in gradient",
            task,
            "this is a defect, please report it",
        )
    return differences


def parity(base: Base, sequences: EncodedSet) -> dict[str, float]:
    """How far packed rows are from padded ones: loss and gradient of one random adapter.

    Args:
        base: the frozen model.
        sequences: a few examples.

    Returns:
        loss (of padded rows), loss_difference (relative) and gradient_difference (relative
        norm, of the worst leaf).
    """
    rows, axes = base.params, base.axes
    params, adapter = lora.init(rows, axes, [LoraRule(rank=4)], jax.random.key(0))
    trained, fixed = lora.split(adapter)
    # With b at zero, a would have no gradient to compare.
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), trained)
    frozen = {"params": params, "fixed": fixed}
    of_rows = _summed_loss(causal_lm(base.module))
    longest = int(sequences.lengths.max())
    found = {}
    for kind in PACKINGS:
        length = longest if kind == "pad" else PARITY_ROW
        plan = plan_of(sequences, kind, length, len(sequences))
        found[kind] = jax.device_get(of_rows(trained, frozen, StepSource(plan, sequences, 1)[0]))
    (expected, weight), gradients = found["pad"]
    exact = trees.flatten(gradients)
    losses, norms = [], []
    for kind in PACKINGS[:2]:
        (total, _), grads = found[kind]
        losses.append(abs(total - expected) / expected)
        for path, leaf in trees.flatten(grads).items():
            pairs = zip(jax.tree.leaves(leaf), jax.tree.leaves(exact[path]), strict=True)
            norms += [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs]
    return {
        "loss": float(expected / weight),
        "loss_difference": float(np.array(losses).max()),
        "gradient_difference": float(np.array(norms).max()),
    }


def _summed_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
    """((sum, weight), gradient of the sum) over microbatches, dropout off."""

    @jax.jit
    def of_step(trained: Any, frozen: Any, batch: Any) -> Any:
        def of_row(carry: Any, row: Any) -> Any:
            def compute(trained: Any) -> Any:
                total, weight, _ = loss(trained, frozen, row, None)
                return total, weight

            found = jax.value_and_grad(compute, has_aux=True)(trained)
            return jax.tree.map(jnp.add, carry, found), None

        zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, trained))
        return jax.lax.scan(of_row, zero, batch)[0]

    return of_step
