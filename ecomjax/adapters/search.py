"""Merge weights found on a validation set, and the merged adapter as a function of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ecomjax import trees
from ecomjax.adapters.lowrank import Shape, shapes_of
from ecomjax.errors import UserError
from ecomjax.typing import Adapter, LowRank

Kind = Literal["gradient_free", "gradient"]

Loss = Callable[[np.ndarray], Any]
"""Of weights [A] or [A, L] in float64: a number, or that and its gradient, see `search`."""

FIRST_STEP = 0.5
"""How far the gradient-free search first moves a weight."""

RESOLUTION = 1e-3
"""Of the weights: a gradient-free search that moves them by less is done."""

TOLERANCE = 1e-6
"""A gradient-based search is done when a step lowers the objective by a smaller share of it."""


def weighted(adapters: Sequence[Adapter], weights: Float[Array | np.ndarray, "A *L"]) -> Adapter:
    """Σ_i w_i Δ_i as one adapter, to be differentiated by the weights.

    Its delta is that of `merge.merge` by "concatenation": factors lie side by side, so ranks
    add up, and w_i * scale_i is multiplied into a_i, so that every scale is 1. It may be
    traced, adapters included; values are not looked at, see `lowrank.shapes_of`.

    Args:
        adapters: of one base; they may differ in rank, alpha and kernels.
        weights: of each adapter [A], or of each layer of each [A, L].

    Raises:
        UserError: what `lowrank.shapes_of` refuses of types and shapes; weights by layer for
            a kernel that has another number of layers.
    """
    rows = list(jnp.asarray(weights, jnp.float32))
    flat = [trees.flatten(adapter) for adapter in adapters]
    merged = {}
    for path, shape in shapes_of(adapters, values=False).items():
        a, b = [], []
        for leaves, weight in zip(flat, rows, strict=True):
            if path in leaves:
                leaf = leaves[path]
                share = leaf.scale.astype(jnp.float32) * _of_stack(weight, shape, path)
                a.append(share[..., None, None] * leaf.a.astype(jnp.float32))
                b.append(leaf.b.astype(jnp.float32))
        scale = jnp.ones(shape.stack, jnp.float32)
        merged[path] = LowRank(jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=-2), scale)
    return trees.unflatten(merged)


def _of_stack(weight: Float[Array, "*L"], shape: Shape, path: str) -> Float[Array, "..."]:
    """A weight, or one by layer, that multiplies an array [*stack]."""
    if not weight.ndim:
        return weight
    if weight.shape != shape.stack[:1]:
        layers = shape.stack[0] if shape.stack else "no"
        raise UserError(
            f"{len(weight)} weights by layer, the kernel has {layers} layers",
            f"kernel '{path}'",
            "search one weight for each adapter",
        )
    return weight.reshape(-1, *(1 for _ in shape.stack[1:]))


class SearchResult(NamedTuple):
    """The best weights that were tried."""

    weights: Float[np.ndarray, "A *L"]
    loss: float
    """Of these weights, without the penalty."""
    history: tuple[float, ...]
    """The objective of all weights tried, in that order; the first are 0, the base itself."""

    @property
    def evaluations(self) -> int:
        return len(self.history)


class _BudgetSpent(Exception):
    """Leaves an optimizer of scipy, which may go beyond the evaluations it is allowed."""


def search(
    loss: Loss,
    adapters: int,
    kind: Kind,
    *,
    budget: int,
    layers: int | None = None,
    penalty: float = 0.05,
    bound: float = 1.5,
    on_evaluation: Callable[[int, float], None] = lambda done, lowest: None,
) -> SearchResult:
    """Weights w that minimise L(w) + penalty * Σ_i |w_i|, each in [-bound, bound].

    That is LoraHub (Huang et al. 2023, arXiv 2307.13269, section 3.2) with its penalty and
    bound. Unlike there, weights are of deltas, see `weighted`; LoraHub sums factors,
    (Σ w_i a_i)(Σ w_i b_i), which adds cross terms w_i w_j a_i b_j. Its optimizer is one of
    nevergrad, and its released code divides the sum of the penalty by the number of adapters.

    "gradient_free" is COBYQA (Ragonneau and Zhang 2023, scipy): quadratic models in a trust
    region, which on smooth losses of up to 20 weights came closer within 100 evaluations than
    Nelder-Mead, Powell, COBYLA and differential evolution did. It asks for the loss about twice
    per weight before its first step. "gradient" is L-BFGS-B: the loss of a whole validation set
    is deterministic and smooth in a few weights, so there is no learning rate to choose. With
    w = p - q and p, q >= 0 the penalty is smooth too, and weights that do not pay are 0.

    Both start from weights of 0, the base itself, and draw nothing.

    Args:
        loss: of weights [A], or [A, L] with `layers`, on a validation set; for "gradient"
            (loss, gradient), as `jax.value_and_grad` returns them.
        adapters: A.
        kind: of the search.
        budget: most calls of the loss.
        layers: L, where each layer has weights of its own; the penalty is then the mean over
            layers.
        penalty: its coefficient.
        bound: of the absolute weights.
        on_evaluation: called after each call of the loss with their number and the lowest
            objective so far.

    Raises:
        UserError: a loss or gradient that is not finite, an unknown kind, a bad number.
    """
    where, known = "search of merge weights", get_args(Kind)
    if kind not in known:
        raise UserError(f"unknown kind {kind!r}", where, f"use one of {', '.join(known)}")
    for name, value, valid in (
        ("adapters", adapters, adapters >= 1),
        ("layers", layers, layers is None or layers >= 1),
        ("budget", budget, budget >= 1),
        ("penalty", penalty, penalty >= 0),
        ("bound", bound, bound > 0),
    ):
        if not valid:
            raise UserError(f"{name} {value}", where, "use a positive number")
    shape = (adapters,) if layers is None else (adapters, layers)
    share = penalty / (layers or 1)
    tried: list[tuple[float, float, np.ndarray]] = []

    def evaluate(weights: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss and its gradient, 0 where there is none."""
        if len(tried) == budget:
            raise _BudgetSpent
        told = loss(weights) if kind == "gradient" else (loss(weights), np.zeros(shape))
        value, gradient = float(told[0]), np.asarray(told[1], np.float64)
        if not (math.isfinite(value) and np.isfinite(gradient).all()):
            raise UserError(
                f"loss {value}, or its gradient, is not finite",
                f"merge weights {np.round(weights, 4).tolist()}",
                "set a smaller bound on them",
            )
        tried.append((value + share * float(np.abs(weights).sum()), value, weights))
        on_evaluation(len(tried), min(objective for objective, _, _ in tried))
        return value, gradient

    minimise = _with_gradient if kind == "gradient" else _without_gradient
    with contextlib.suppress(_BudgetSpent):
        minimise(evaluate, shape, share, bound)
    _, lowest, weights = min(tried, key=lambda trial: trial[0])
    return SearchResult(weights, lowest, tuple(objective for objective, _, _ in tried))


def _without_gradient(
    evaluate: Callable, shape: tuple[int, ...], share: float, bound: float
) -> None:
    import scipy.optimize

    def objective(flat: np.ndarray) -> float:
        return evaluate(flat.reshape(shape).copy())[0] + share * float(np.abs(flat).sum())

    size = math.prod(shape)
    scipy.optimize.minimize(
        objective,
        np.zeros(size),
        method="COBYQA",
        bounds=[(-bound, bound)] * size,
        options={"initial_tr_radius": min(FIRST_STEP, bound), "final_tr_radius": RESOLUTION},
    )


def _with_gradient(evaluate: Callable, shape: tuple[int, ...], share: float, bound: float) -> None:
    import scipy.optimize

    def objective(halves: np.ndarray) -> tuple[float, np.ndarray]:
        p, q = halves.reshape(2, *shape)
        value, gradient = evaluate(p - q)
        slopes = np.stack([gradient + share, share - gradient])
        return value + share * float(halves.sum()), slopes.ravel()

    size = 2 * math.prod(shape)
    scipy.optimize.minimize(
        objective,
        np.zeros(size),
        method="L-BFGS-B",
        jac=True,
        bounds=[(0.0, bound)] * size,
        options={"ftol": TOLERANCE},
    )
