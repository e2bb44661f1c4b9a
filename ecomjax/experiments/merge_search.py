"""Merge weights that suit validation examples best, see `adapters.search`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ecomjax.adapters import lora
from ecomjax.adapters.search import SearchResult, search, weighted
from ecomjax.data.encoded import EncodedSet, fit_window
from ecomjax.data.pipeline import StepSource, one_pass
from ecomjax.data.progress import counting
from ecomjax.errors import UserError
from ecomjax.experiments.assembly import (
    Base,
    choose,
    load_examples,
    make_predictor,
    make_tasks,
    say,
)
from ecomjax.experiments.config import MergedConfig
from ecomjax.experiments.sections import EvaluationConfig
from ecomjax.training.losses import causal_lm
from ecomjax.training.step import make_loss_pass
from ecomjax.typing import Adapter, Batch

BATCH_SIZE = 16
"""Examples of a step; the loss does not depend on it."""


def search_weights(config: MergedConfig, base: Base, adapters: Sequence[Adapter]) -> SearchResult:
    """The weights of the adapters under which the answers of the validation split are likeliest.

    The loss is the mean over tasks of the negative log-likelihood by answer token.

    Args:
        config: with tasks, data and how to search.
        base: of the adapters.
        adapters: trees of `LowRank`.

    Raises:
        UserError: data that cannot be read; a budget too small to find anything, or nothing
            found; what `search` raises.
    """
    settings, kind, held = (
        config.search,
        config.search.kind,
        jax.tree.map(jnp.asarray, list(adapters)),
    )
    assert kind != "none", "a search is asked for"
    count = len(adapters) * (base.config.layers if settings.by_layer else 1)
    # The optimizer asks for the loss about twice per weight before it takes a step.
    if kind == "gradient_free" and settings.budget < 2 * count + 2:
        raise UserError(
            f"budget {settings.budget} for {count} weights",
            "config.search.budget",
            f"allow {2 * count + 2} or more, or set config.search.kind=gradient",
        )
    sources = _sources(config, base)
    loss = causal_lm(base.module)

    def of_weights(weights: jax.Array, frozen: Any, batch: Batch, key: None) -> Any:
        trained, fixed = lora.split(weighted(frozen["adapters"], weights))
        return loss(trained, {"params": frozen["params"], "fixed": fixed}, batch, key)

    loss_pass = make_loss_pass(of_weights)
    frozen = {"params": base.params, "adapters": held}

    @jax.jit
    def with_gradient(weights: jax.Array, frozen: Any, batch: Batch) -> Any:
        def total(weights: jax.Array) -> Any:
            return loss_pass(weights, frozen, batch)

        return jax.value_and_grad(total, has_aux=True)(weights)

    def value(weights: np.ndarray) -> float:
        given = jnp.asarray(weights, jnp.float32)
        means = []
        for source in sources:
            sums = np.zeros(2)
            for i in range(len(source)):
                sums += jax.device_get(loss_pass(given, frozen, source[i]))
            means.append(sums[0] / sums[1])
        return float(np.mean(means))

    def value_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        given = jnp.asarray(weights, jnp.float32)
        means, slopes = [], []
        for source in sources:
            sums, slope = np.zeros(2), np.zeros(weights.shape)
            for i in range(len(source)):
                (total, weight), gradient = with_gradient(given, frozen, source[i])
                sums += (float(total), float(weight))
                slope += np.asarray(gradient, np.float64)
            means.append(sums[0] / sums[1])
            slopes.append(slope / sums[1])
        return float(np.mean(means)), np.mean(slopes, axis=0)

    with counting(settings.budget, "searching merge weights", "evaluation") as on_done:
        found = search(
            value_and_gradient if kind == "gradient" else value,
            len(adapters),
            kind,
            budget=settings.budget,
            layers=base.config.layers if settings.by_layer else None,
            penalty=settings.penalty,
            bound=settings.bound,
            on_evaluation=lambda done, lowest: on_done(1),
        )
    if not found.weights.any():
        raise UserError(
            "no weights suit the validation examples better than none",
            "config.search",
            "lower config.search.penalty, or merge adapters of these tasks",
        )
    say(
        f"merge weights {np.round(found.weights, 3).tolist()}: loss {found.loss:.4f}, that of the "
        f"base {found.history[0]:.4f}, after {found.evaluations} evaluations"
    )
    return found


def _sources(config: MergedConfig, base: Base) -> list[StepSource]:
    """For each task, its validation examples once."""
    settings, sources = config.search, []
    for label, task in make_tasks(config.tasks).items():
        examples = load_examples(task, config.data, "validation")
        chosen = choose(examples, settings.examples, config.seed)
        predictor = make_predictor(base, task, config.tasks[label], EvaluationConfig())
        encoded = EncodedSet.of(predictor.encode(chosen))
        window = min(settings.row_length, predictor.window)
        kept = fit_window(encoded, window, "drop", f"{label} validation")
        dropped = f", {len(kept.dropped)} too long and dropped" if kept.dropped else ""
        say(f"{label} validation: {len(kept.sequences)} examples{dropped}")
        sources.append(
            one_pass(kept.sequences, "shared_prefix", settings.row_length, BATCH_SIZE, rows=1)
        )
    return sources
