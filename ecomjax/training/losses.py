"""Losses as (sum, weight, aux); whoever accumulates divides once, at the end."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ecomjax.adapters import lora
from ecomjax.models.likelihood import likelihood_of_hidden
from ecomjax.typing import Adapter, Batch, Params


def causal_lm(model: Any):
    """The response-only loss of an adapter over a frozen base.

    Args:
        model: a `models.decoder.Decoder`. If it has experts, their load-balance loss counts
            too in training, times the config's `balance_coefficient`, as if it were that of
            every target of the batch; outside training the loss is the likelihood's alone.

    Returns:
        loss(trained, frozen, batch, key) -> (sum of -log p(target) * weight, sum of
        weights, {}), where frozen is {"params": base, "fixed": constants of the adapter}
        and key is None outside training.
    """

    def loss(trained: Adapter, frozen: dict[str, Params], batch: Batch, key: jax.Array | None):
        variables = {"params": frozen["params"], "lora": lora.join(trained, frozen["fixed"])}
        slots = (batch.tokens, batch.positions, batch.segment_ids)
        rngs = None if key is None else {"dropout": key}
        hidden, balance = model.apply(variables, *slots, rngs=rngs, method="with_balance")
        likelihood = likelihood_of_hidden(model, variables, hidden, batch)
        total, weight = -jnp.sum(likelihood * batch.weights), jnp.sum(batch.weights)
        if key is not None and balance is not None:
            mean = balance.sum / jnp.maximum(balance.weight, 1.0)
            total += model.config.balance_coefficient * mean * weight
        return total, weight, {}

    return loss
