"""Log-likelihood of given next tokens, the head applied only where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ecomjax.typing import Batch, KVCache


@jax.custom_batching.custom_vmap
def any_of_all(wanted: Bool[Array, ""]) -> Bool[Array, ""]:
    """A condition as it is; under `vmap` whether it holds for any of the mapped.

    A `cond` on it stays one under `vmap`. On conditions that differ it would become a choice
    between both branches, for which all that they read is copied once for each of the mapped,
    weights included.
    """
    return wanted


@any_of_all.def_vmap
def _(size: int, batched: list[bool], wanted: Bool[Array, "*A"]) -> tuple[jax.Array, bool]:
    del size
    return (wanted.any(axis=0) if batched[0] else wanted), False


HEAD_CHUNK = 128
"""Slots of a row that the LM head is applied to at once; bounds the logits held to [B, 128, V]."""


def token_log_likelihood(
    model: nn.Module,
    variables: dict[str, Any],
    batch: Batch,
    prefix: KVCache | None = None,
    rngs: dict[str, jax.Array] | None = None,
    adapter_index: Int[Array, "B"] | None = None,
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """log p(target) at every slot of weight > 0, and 0 elsewhere, in float32.

    Args:
        model: maps tokens, positions, segment ids and prefix to (hidden [B, T, D], cache),
            and hidden states to logits through its method `logits`.
        variables: {"params": ..., "lora": ...}.
        batch: leaves [B, T].
        prefix: see the model; keys and values that stand before every row.
        rngs: {"dropout": key} while training.
        adapter_index: see the model.
        chunk: see `likelihood_of_hidden`.
    """
    apply: Any = model.apply
    slots = (batch.tokens, batch.positions, batch.segment_ids)
    hidden, _ = apply(variables, *slots, None, prefix, adapter_index, rngs=rngs)
    return likelihood_of_hidden(model, variables, hidden, batch, adapter_index, chunk)


def likelihood_of_hidden(
    model: nn.Module,
    variables: dict[str, Any],
    hidden: Float[Array, "B T D"],
    batch: Batch,
    adapter_index: Int[Array, "B"] | None = None,
    chunk: int | None = None,
    frozen_head: bool = False,
) -> Float[Array, "B T"]:
    """`token_log_likelihood` from the hidden states on.

    The head runs only where there is a target: slots with one are gathered to the front
    of each row, and chunks that hold none are skipped.

    Args:
        model, variables, batch, adapter_index: see there.
        hidden: what the model returns.
        chunk: slots of a row that the head is applied to at once, if fewer than usual: so many
            as no row has more targets than.
        frozen_head: whether nothing is trained that makes logits of hidden states. The gradient
            by these is then found beside the values, instead of all logits twice.
    """
    apply: Any = model.apply
    rows, slots = batch.targets.shape
    chunk = min(HEAD_CHUNK, slots, chunk or slots)
    padding = -slots % chunk
    targeted = jnp.pad(batch.weights > 0, ((0, 0), (0, padding)))
    order = jnp.argsort(~targeted, axis=1, stable=True)

    def gather(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        index = order.reshape(order.shape + (1,) * (x.ndim - 2))
        x = jnp.take_along_axis(x, index, axis=1)
        return x.reshape(rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    read = variables, adapter_index

    def of_targets(read, states, targets, wanted):
        logits = apply(read[0], states, read[1], method="logits")
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.where(wanted, picked - jax.nn.logsumexp(logits, axis=-1), 0.0)

    of_all = _with_slopes(of_targets) if frozen_head else jax.checkpoint(_if_any(of_targets))

    def of_chunk(_, chunked):
        return None, of_all(read, *chunked)

    chunks = (gather(hidden), gather(batch.targets), gather(batch.weights) > 0)
    _, values = jax.lax.scan(of_chunk, None, chunks)
    values = values.swapaxes(0, 1).reshape(rows, -1)
    back = jnp.argsort(order, axis=1, stable=True)
    return jnp.take_along_axis(values, back, axis=1)[:, :slots]


OfTargets = Callable[[Any, Array, Array, Array], Array]
"""(what the head reads, states [B, C, D], targets [B, C], which of these are wanted) -> [B, C],
each of its own state alone, and 0 where it is not wanted."""


def _if_any(of_targets: OfTargets) -> OfTargets:
    """The same, computed only where something is wanted."""

    def compute(read, states, targets, wanted):
        given = read, states, targets, wanted
        nothing = jnp.zeros(targets.shape, jnp.float32)
        some = any_of_all(wanted.any())
        return jax.lax.cond(some, lambda: of_targets(*given), lambda: nothing)

    return compute


def _with_slopes(of_targets: OfTargets) -> OfTargets:
    """`_if_any`, whose gradient by the states is found with the values and kept, as [B, C, D].

    What the head reads has no gradient.
    """

    def forward(read, states, targets, wanted):
        def compute():
            values, back = jax.vjp(lambda x: of_targets(read, x, targets, wanted), states)
            return values, *back(jnp.ones_like(values))

        nothing = jnp.zeros(targets.shape, jnp.float32), jnp.zeros_like(states)
        return jax.lax.cond(any_of_all(wanted.any()), compute, lambda: nothing)

    def backward(slopes, by_value):
        return None, by_value[..., None].astype(slopes.dtype) * slopes, None, None

    computed = jax.custom_vjp(_if_any(of_targets))
    computed.defvjp(forward, backward)
    return computed
