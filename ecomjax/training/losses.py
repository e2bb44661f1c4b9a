"""Losses as (sum, weight, aux); whoever accumulates divides once, at the end."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ecomjax.adapters import lora
from ecomjax.models.likelihood import token_log_likelihood
from ecomjax.typing import Adapter, Batch, Params


def causal_lm(model: nn.Module):
    """The response-only loss of an adapter over a frozen base.

    Returns:
        loss(trained, frozen, batch, key) -> (sum of -log p(target) * weight, sum of
        weights, {}), where frozen is {"params": base, "fixed": constants of the adapter}
        and key is None outside training.
    """

    def loss(trained: Adapter, frozen: dict[str, Params], batch: Batch, key: jax.Array | None):
        variables = {"params": frozen["params"], "lora": lora.join(trained, frozen["fixed"])}
        rngs = None if key is None else {"dropout": key}
        likelihood = token_log_likelihood(model, variables, batch, rngs=rngs)
        return -jnp.sum(likelihood * batch.weights), jnp.sum(batch.weights), {}

    return loss
