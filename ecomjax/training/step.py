"""One optimizer step and one evaluation pass, as jitted pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ecomjax.training.state import TrainState
from ecomjax.typing import PADDING_SEGMENT, Batch

Loss = Callable[..., tuple[jax.Array, jax.Array, dict[str, jax.Array]]]
"""loss(trained, frozen, batch, key) -> (sum, weight, aux)."""


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
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data), state.step)

        def of_microbatch(carry, indexed):
            number, micro = indexed

            def compute(trained):
                total, weight, aux = loss(trained, frozen, micro, jax.random.fold_in(key, number))
                return total, (weight, aux)

            def add():
                (total, rest), grads = jax.value_and_grad(compute, has_aux=True)(state.trained)
                return jax.tree.map(jnp.add, carry, (total, *rest, grads))

            return jax.lax.cond((micro.weights > 0).any(), add, lambda: carry), None

        zeros = jax.tree.map(jnp.zeros_like, state.trained)
        parts = {name: jnp.zeros(len(groups)) for name in ("loss", "weight", "examples")}
        start = (jnp.zeros(()), jnp.zeros(()), parts if groups else {}, zeros)
        numbers = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32)
        (total, weight, aux, grads), _ = jax.lax.scan(of_microbatch, start, (numbers, batch))
        grads = jax.tree.map(lambda g: g / weight, grads)
        mean, norm = total / weight, optax.tree.norm(grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trained)
        finite = jnp.isfinite(mean) & jnp.isfinite(norm)
        old = (state.trained, state.optimizer)
        new = (optax.apply_updates(state.trained, updates), optimizer_state)
        trained, optimizer_state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        skipped = state.skipped + (~finite).astype(jnp.int32)
        metrics = {
            "loss": mean,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
            "skipped": skipped,
            "target_tokens": weight,
            "tokens": (batch.segment_ids != PADDING_SEGMENT).sum(),
        }
        for group, name in enumerate(groups):
            metrics[f"loss/{name}"] = aux["loss"][group] / aux["weight"][group]
            metrics[f"examples/{name}"] = aux["examples"][group]
        state = state.replace(
            step=state.step + 1,
            skipped=skipped,
            trained=trained,
            optimizer=optimizer_state,
        )
        return state, metrics

    split: Any = {} if shardings is None else {"out_shardings": (shardings, None)}
    return jax.jit(step, donate_argnums=0, **split)


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
