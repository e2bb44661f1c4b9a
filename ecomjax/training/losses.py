"""Losses as (sum, weight, aux); whoever accumulates divides once, at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.models.likelihood import likelihood_of_hidden
from ecomjax.typing import Adapter, Batch, LabelledBatch, PairBatch, Params

VariablesOf = Callable[[Any, dict[str, Params]], dict[str, Params]]


def adapted(trained: Adapter, frozen: dict[str, Params]) -> dict[str, Params]:
    """The variables of a model whose adapter alone is trained.

    Args:
        trained: see `adapters.lora.split`.
        frozen: {"params": base, "fixed": constants of the adapter}.
    """
    return {"params": frozen["params"], "lora": lora.join(trained, frozen["fixed"])}


def adapted_under_head(trained: dict[str, Any], frozen: dict[str, Params]) -> dict[str, Params]:
    """The variables of an encoder whose adapter is trained, and its head in full.

    Args:
        trained: {"adapter": see `adapted`, "head": parameters of the head}.
        frozen: {"params": base without the head, "fixed": constants of the adapter}.
    """
    variables = adapted(trained["adapter"], frozen)
    return variables | {"params": variables["params"] | {"head": trained["head"]}}


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
        hidden, balance = model.apply(variables, *slots, rngs=_rngs(key), method="with_balance")
        likelihood = likelihood_of_hidden(
            model, variables, hidden, batch, frozen_head=_head_is_frozen(trained, variables_of)
        )
        total, weight, aux = _weighed(likelihood, batch, groups)
        if key is not None and balance is not None:
            mean = balance.sum / jnp.maximum(balance.weight, 1.0)
            total += model.config.balance_coefficient * mean * weight
        return total, weight, aux

    return loss


def pairs(model: Any, groups: int = 0, variables_of: VariablesOf = adapted):
    """The loss of an encoder-decoder's targets, given their sources and what comes before.

    Args:
        model: a `models.encoder_decoder.EncoderDecoder`.
        groups, variables_of: see `causal_lm`.

    Returns:
        loss(trained, frozen, batch, key) as of `causal_lm`, of a `PairBatch`.
    """

    def loss(trained: Any, frozen: dict[str, Params], batch: PairBatch, key: jax.Array | None):
        variables, rngs = variables_of(trained, frozen), _rngs(key)
        read = (batch.sources, batch.source_positions, batch.source_segment_ids)
        memory = model.apply(variables, *read, rngs=rngs, method="remember")
        slots = (batch.tokens, batch.positions, batch.segment_ids)
        hidden, _ = model.apply(variables, *slots, None, memory, rngs=rngs)
        likelihood = likelihood_of_hidden(
            model, variables, hidden, batch, frozen_head=_head_is_frozen(trained, variables_of)
        )
        return _weighed(likelihood, batch, groups)

    return loss


def classes(model: Any, groups: int = 0, variables_of: VariablesOf = whole):
    """The loss of the classes that an encoder gives to words, or to sequences.

    Args:
        model: a classifier of `models.heads`.
        groups, variables_of: see `causal_lm`.

    Returns:
        loss(trained, frozen, batch, key) as of `causal_lm`, of a `LabelledBatch`: sums are over
        classified words or sequences, whichever the batch has classes of.
    """

    def loss(trained: Any, frozen: dict[str, Params], batch: LabelledBatch, key: jax.Array | None):
        variables = variables_of(trained, frozen)
        read = (batch.tokens, batch.positions, batch.segment_ids, batch.token_types)
        logits = model.apply(variables, *read, rngs=_rngs(key), method="of_slots")
        picked = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        return _weighed(picked - jax.nn.logsumexp(logits, axis=-1), batch, groups)

    return loss


def _head_is_frozen(trained: Any, variables_of: VariablesOf) -> bool:
    """Whether what is trained is an adapter of layers alone."""
    return variables_of is adapted and all("layers/" in path for path in trees.flatten(trained))


def _rngs(key: jax.Array | None) -> dict[str, jax.Array] | None:
    return None if key is None else {"dropout": key}


def _weighed(likelihood: Float[Array, "B T"], batch: Batch, groups: int):
    """(sum, weight, aux) of log-likelihoods, see `causal_lm`."""
    weighed = -likelihood * batch.weights
    total, weight = jnp.sum(weighed), jnp.sum(batch.weights)
    if not groups:
        return total, weight, {}
    assert batch.groups is not None, "a batch says which groups its rows are of"
    every = jnp.arange(groups, dtype=jnp.int32)
    member = (batch.groups[None, :] == every[:, None]).astype(jnp.float32)
    examples = jnp.maximum(batch.segment_ids.max(axis=1), 0).astype(jnp.float32)
    by_row = {"loss": weighed.sum(1), "weight": batch.weights.sum(1), "examples": examples}
    return total, weight, {name: member @ rows for name, rows in by_row.items()}
