"""Losses as (sum, weight, aux); whoever accumulates divides once, at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ecomjax.adapters import lora
from ecomjax.models.likelihood import likelihood_of_hidden
from ecomjax.typing import Adapter, Batch, Params

VariablesOf = Callable[[Any, dict[str, Params]], dict[str, Params]]


def adapted(trained: Adapter, frozen: dict[str, Params]) -> dict[str, Params]:
    """The variables of a model whose adapter alone is trained.

    Args:
        trained: see `adapters.lora.split`.
        frozen: {"params": base, "fixed": constants of the adapter}.
    """
    return {"params": frozen["params"], "lora": lora.join(trained, frozen["fixed"])}


def whole(trained: Params, frozen: dict[str, Params]) -> dict[str, Params]:
    """The variables of a model that is trained in full; nothing of it is frozen."""
    return {"params": trained, **frozen}


def causal_lm(model: Any, groups: int = 0, variables_of: VariablesOf = adapted):
    """The response-only loss.

    Args:
        model: a `models.decoder.Decoder`. If it has experts, their load-balance loss counts
            too in training, times the config's `balance_coefficient`, as if it were that of
            every target of the batch; outside training the loss is the likelihood's alone.
        groups: number of groups whose part of the loss is told; see `Batch.groups`.
        variables_of: `adapted` or `whole`: what of the model is trained.

    Returns:
        loss(trained, frozen, batch, key) -> (sum of -log p(target) * weight, sum of
        weights, aux), where key is None outside training. aux is {} without groups, else
        "loss" (that sum without load balance), "weight" and "examples", each [groups].
    """

    def loss(trained: Any, frozen: dict[str, Params], batch: Batch, key: jax.Array | None):
        variables = variables_of(trained, frozen)
        slots = (batch.tokens, batch.positions, batch.segment_ids)
        rngs = None if key is None else {"dropout": key}
        hidden, balance = model.apply(variables, *slots, rngs=rngs, method="with_balance")
        likelihood = likelihood_of_hidden(model, variables, hidden, batch)
        weighed = -likelihood * batch.weights
        total, weight = jnp.sum(weighed), jnp.sum(batch.weights)
        if key is not None and balance is not None:
            mean = balance.sum / jnp.maximum(balance.weight, 1.0)
            total += model.config.balance_coefficient * mean * weight
        if not groups:
            return total, weight, {}
        assert batch.groups is not None, "a batch says which groups its rows are of"
        every = jnp.arange(groups, dtype=jnp.int32)
        member = (batch.groups[None, :] == every[:, None]).astype(jnp.float32)
        examples = jnp.maximum(batch.segment_ids.max(axis=1), 0).astype(jnp.float32)
        by_row = {"loss": weighed.sum(1), "weight": batch.weights.sum(1), "examples": examples}
        return total, weight, {name: member @ rows for name, rows in by_row.items()}

    return loss
