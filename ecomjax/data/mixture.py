"""In which order the examples of several tasks are taken: a pure function of sizes and seed.

Every task is walked in passes, each pass a permutation of all its examples. A policy says
how often which task comes; the n-th draw of a run is the same on every host and after every
restart, for nothing depends on what was drawn before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from ecomjax.errors import UserError

Policy = Literal["concatenate", "proportional", "temperature", "weights"]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """How tasks are mixed.

    Attributes:
        policy: "concatenate": every example once an epoch, all tasks shuffled together (as
            in the study); "proportional": tasks in turns, by their sizes; "temperature":
            by sizes to the power of 1/temperature (Raffel et al. 2020, arXiv 1910.10683,
            section 3.5.2); "weights": by the given weights.
        temperature: 1 is proportional; infinity is all tasks alike.
        weights: for each task; one of weight 0 is not drawn.
        cap: size from which on a task counts as no larger, and under "concatenate" the
            number of its examples an epoch; 0: none.
        draws: examples an epoch; 0: the sum of the sizes, capped. "concatenate" has that
            number always.
    """

    policy: Policy = "concatenate"
    temperature: float = 1.0
    weights: tuple[float, ...] = ()
    cap: int = 0
    draws: int = 0


def shares(sizes: Sequence[int], mixture: Mixture) -> Float[np.ndarray, "K"]:
    """The share of the draws that each task has; they sum to 1.

    Raises:
        UserError: an empty task, a temperature that is not above 0, or weights that are
            negative, not finite, all 0 or not as many as the tasks.
    """
    if not all(sizes):
        raise UserError(
            f"task {list(sizes).index(0)} of the mixture has no examples",
            "config.mixture",
            "leave it out or give it data",
        )
    sized = np.minimum(np.asarray(sizes, float), mixture.cap or math.inf)
    if mixture.policy == "weights":
        weights = np.asarray(mixture.weights, float)
        if len(weights) != len(sizes):
            raise UserError(
                f"{len(weights)} weights for {len(sizes)} tasks",
                "config.mixture.weights",
                "give one to each task",
            )
        if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
            raise UserError(
                f"weights {weights.tolist()}",
                "config.mixture.weights",
                "give finite numbers, none negative and one above 0",
            )
        return weights / weights.sum()
    temperature = mixture.temperature if mixture.policy == "temperature" else 1.0
    if not temperature > 0:
        raise UserError(
            f"temperature {temperature}", "config.mixture.temperature", "give one above 0"
        )
    powers = (sized / sized.max()) ** (1.0 / temperature)
    return powers / powers.sum()


def draw_orders(
    sizes: Sequence[int], mixture: Mixture, seed: int, epochs: int
) -> list[Int[np.ndarray, "_"]]:
    """For each epoch, the examples in the order in which they are taken.

    Examples are numbered through all tasks, those of the first task first. Under
    "concatenate" an epoch is a permutation; else task k comes at the moments
    (j + phase_k) / share_k for j = 0, 1, ..., so that after any number of draws no task is
    more than the number of tasks ahead of or behind its share.

    Raises:
        UserError: see `shares`.
    """
    wanted = shares(sizes, mixture)
    capped = [min(size, mixture.cap or size) for size in sizes]
    firsts = np.cumsum([0, *sizes[:-1]])
    if mixture.policy == "concatenate":
        orders = []
        for epoch in range(epochs):
            places = [
                first + _passes(size, epoch * take, take, seed, task)
                if take < size
                else first + np.arange(size)
                for task, (first, size, take) in enumerate(zip(firsts, sizes, capped, strict=True))
            ]
            orders.append(np.random.default_rng([seed, epoch]).permutation(np.concatenate(places)))
        return orders
    draws = mixture.draws or sum(capped)
    tasks = _turns(wanted, draws * epochs, seed)
    order = np.zeros(draws * epochs, np.int64)
    for task, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
        mine = np.flatnonzero(tasks == task)
        order[mine] = first + _passes(size, 0, len(mine), seed, task)
    return np.split(order, epochs)


def _turns(wanted: Float[np.ndarray, "K"], draws: int, seed: int) -> Int[np.ndarray, "draws"]:
    """Which task each draw is of."""
    phases = np.random.default_rng([seed, len(wanted)]).random(len(wanted))
    moments, tasks = [], []
    for task, share in enumerate(wanted):
        if share > 0:
            count = math.ceil(share * draws) + 1
            moments.append((np.arange(count) + phases[task]) / share)
            tasks.append(np.full(count, task))
    order = np.argsort(np.concatenate(moments), kind="stable")
    return np.concatenate(tasks)[order[:draws]]


def _passes(size: int, start: int, count: int, seed: int, task: int) -> Int[np.ndarray, "count"]:
    """Places `start` to `start + count` of a task's endless walk through its examples."""
    first, last = start // size, (start + count - 1) // size
    walk = [
        np.random.default_rng([seed, task, number]).permutation(size)
        for number in range(first, last + 1)
    ]
    return np.concatenate([np.zeros(0, np.int64), *walk])[start - first * size :][:count]
