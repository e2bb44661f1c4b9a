"""One optimizer step, of one run or several, and one evaluation pass, as jitted pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ecomjax.models.likelihood import any_of_all
from ecomjax.training.state import TrainState
from ecomjax.typing import PADDING_SEGMENT, Batch

Loss = Callable[..., tuple[jax.Array, jax.Array, dict[str, jax.Array]]]
"""loss(trained, frozen, batch, key) -> (sum, weight, aux)."""

JointTrainStep = Callable[
    [Sequence[TrainState], Any, Sequence[Any], Sequence[Batch]],
    list[tuple[TrainState, dict[str, jax.Array]]],
]
"""(states, base, frozen, batches) -> (state, metrics) of each; see `make_joint_train_step`."""


class Found(flax.struct.PyTreeNode):
    """What the microbatches of a step give: sums over all of them, divided once."""

    loss: jax.Array
    weight: jax.Array
    gradients: Any
    tokens: jax.Array
    """Slots that are no padding."""
    aux: dict[str, jax.Array]


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    groups: Sequence[str] = (),
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step over microbatches [M, B, T], accumulated by a scan.

    Sums and weights are accumulated and divided once, so the result does not depend on how
    rows are cut into microbatches. Microbatches without a target are skipped. So is the whole
    update where loss or gradient is not finite: trained parameters and optimizer state, with the
    place it has in the schedule, stay as they are, bit by bit.

    Args:
        loss: with what it tells of its groups in aux; see `training.losses`.
        optimizer: of the trained parameters.
        schedule: learning rate by update, told beside the loss.
        groups: names of the groups, for the metrics `loss/<name>` (NaN in a step without
            targets of it) and `examples/<name>`.
        shardings: where the arrays of the state lie, before and after the step; see
            `sharding.state_shardings`. None: on one device.
    """

    def step(state: TrainState, frozen: Any, batch: Batch):
        found = _find(loss, len(groups), _reads(state), frozen, batch)
        return _update(state, found, optimizer, schedule, groups)

    split: Any = {} if shardings is None else {"out_shardings": (shardings, None)}
    return jax.jit(step, donate_argnums=0, **split)


def make_joint_train_step(
    loss: Loss,
    optimizers: Sequence[tuple[optax.GradientTransformation, optax.Schedule]],
    groups: Sequence[str] = (),
    shardings: Sequence[TrainState] | None = None,
) -> JointTrainStep:
    """As `make_train_step`, of several runs whose base is one, in one program.

    The base has no axis of the runs: its kernels are read once for the rows of all of them. The
    runs may differ in all that is in a state, in their batches, and in optimizer and schedule.

    Args:
        loss, groups: as of each run alone.
        optimizers: (optimizer, schedule) of each run.
        shardings: of the state of each run.

    Returns:
        step(states, base, frozen, batches) -> one (state, metrics) for each run, where the loss
        gets `base | frozen[i]`: of these each run has its own. Batches of fewer microbatches
        [M, B, T] than others get empty ones.
    """

    def step(states: Sequence[TrainState], base: Any, frozen: Sequence[Any], batches: Any):
        def find(reads: Any, own: Any, batch: Batch) -> Found:
            return _find(loss, len(groups), reads, base | own, batch)

        most = max(batch.tokens.shape[0] for batch in batches)
        apart = ([_reads(s) for s in states], frozen, [_lengthened(b, most) for b in batches])
        stacked = [jax.tree.map(lambda *x: jnp.stack(x), *parts) for parts in apart]
        found = jax.vmap(find)(*stacked)
        return [
            _update(state, jax.tree.map(lambda x, i=i: x[i], found), *optimizers[i], groups)
            for i, state in enumerate(states)
        ]

    split: Any = {}
    if shardings is not None:
        split = {"out_shardings": [(shards, None) for shards in shardings]}
    return jax.jit(step, donate_argnums=0, **split)


def _reads(state: TrainState) -> tuple[Any, jax.Array, jax.Array]:
    """What of a state its gradients depend on."""
    return state.trained, state.step, state.key_data


def _lengthened(batch: Batch, microbatches: int) -> Batch:
    """With empty microbatches behind its own, which nothing is learnt from."""

    def lengthen(leaf: jax.Array) -> jax.Array:
        more = [(0, microbatches - leaf.shape[0])] + [(0, 0)] * (leaf.ndim - 1)
        return jnp.pad(leaf, more)

    return jax.tree.map(lengthen, batch)


def _find(loss: Loss, groups: int, reads: Any, frozen: Any, batch: Batch) -> Found:
    """Gradients and sums of the microbatches of a step."""
    trained, number_of_step, key_data = reads
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data), number_of_step)

    def of_microbatch(carry, indexed):
        number, micro = indexed

        def compute(trained):
            total, weight, aux = loss(trained, frozen, micro, jax.random.fold_in(key, number))
            return total, (weight, aux)

        wanted = (micro.weights > 0).any()

        def add():
            (total, rest), grads = jax.value_and_grad(compute, has_aux=True)(trained)
            added = jax.tree.map(jnp.add, carry, (total, *rest, grads))
            # Where it is wanted by another run alone, this one's loss may be not a number.
            return jax.tree.map(lambda new, old: jnp.where(wanted, new, old), added, carry)

        return jax.lax.cond(any_of_all(wanted), add, lambda: carry), None

    zeros = jax.tree.map(jnp.zeros_like, trained)
    parts = {name: jnp.zeros(groups) for name in ("loss", "weight", "examples")}
    start = (jnp.zeros(()), jnp.zeros(()), parts if groups else {}, zeros)
    numbers = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32)
    (total, weight, aux, grads), _ = jax.lax.scan(of_microbatch, start, (numbers, batch))
    grads = jax.tree.map(lambda g: g / weight, grads)
    tokens = (batch.segment_ids != PADDING_SEGMENT).sum()
    return Found(total / weight, weight, grads, tokens, aux)


def _update(
    state: TrainState,
    found: Found,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    groups: Sequence[str],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The next state, and what is told of the step."""
    norm = optax.tree.norm(found.gradients)
    updates, optimizer_state = optimizer.update(found.gradients, state.optimizer, state.trained)
    finite = jnp.isfinite(found.loss) & jnp.isfinite(norm)
    old = (state.trained, state.optimizer)
    new = (optax.apply_updates(state.trained, updates), optimizer_state)
    trained, optimizer_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    skipped = state.skipped + (~finite).astype(jnp.int32)
    metrics = {
        "loss": found.loss,
        "gradient_norm": norm,
        "learning_rate": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
        "skipped": skipped,
        "target_tokens": found.weight,
        "tokens": found.tokens,
    }
    for group, name in enumerate(groups):
        metrics[f"loss/{name}"] = found.aux["loss"][group] / found.aux["weight"][group]
        metrics[f"examples/{name}"] = found.aux["examples"][group]
    state = state.replace(
        step=state.step + 1,
        skipped=skipped,
        trained=trained,
        optimizer=optimizer_state,
    )
    return state, metrics


def make_loss_pass(loss: Loss) -> Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array]]:
    """The jitted (sum, weight) of the loss over microbatches [M, B, T], without dropout."""

    def of_batch(trained: Any, frozen: Any, batch: Batch):
        def of_microbatch(carry, micro):
            def add():
                total, weight, _ = loss(trained, frozen, micro, None)
                return carry[0] + total, carry[1] + weight

            return jax.lax.cond((micro.weights > 0).any(), add, lambda: carry), None

        return jax.lax.scan(of_microbatch, (jnp.zeros(()), jnp.zeros(())), batch)[0]

    return jax.jit(of_batch)
