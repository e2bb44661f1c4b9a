"""What PEFT's `add_weighted_adapter` computes on factors; to compare with, not to merge by.

PEFT 0.21 combines the factors, and not the deltas, in all but "cat" and the "svd" types. Their
product has cross terms, (Σ √w_i a_i)(Σ √w_j b_j) = Σ w_i a_i b_i + Σ_{i≠j} √(w_i w_j) a_i b_j:
for "linear" a relative error of 0.99 against the sum of the deltas was measured. And the
configuration of the first adapter is kept but for its alpha, which becomes the rank: the scale
is then 1 as meant, but √rank where that adapter was of rsLoRA, so that every type is wrong for
those. `merge.merge` has neither fault.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ecomjax import trees
from ecomjax.adapters import consensus
from ecomjax.adapters.lowrank import Factors, add, factors_of, refactor, shapes_of
from ecomjax.adapters.sparsify import largest
from ecomjax.errors import UserError
from ecomjax.typing import Adapter, LowRank

COMBINATIONS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def factorwise_merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combination: str,
    density: float = 0.5,
    votes: str = "total",
    rslora: bool = False,
    masks: Sequence[Adapter] | None = None,
    seed: int = 0,
) -> Adapter:
    """What PEFT computes, cross terms and scale included; see above before any use.

    Args:
        adapters: trees of `LowRank`, with equal kernels.
        weights: one number for each.
        combination: one of `COMBINATIONS`; "linear" is used for a single adapter, as PEFT does.
        density: share of the entries of each factor that the pruning types keep.
        votes: "total" or "frequency", PEFT's `majority_sign_method`.
        rslora: whether the first adapter has `use_rslora`.
        masks: of the dare types: for each adapter a tree whose leaves' a and b are 1 where an
            entry stays; drawn from `seed` if left out.
        seed: see `masks`.

    Raises:
        UserError: what `lowrank.shapes_of` refuses; an unknown combination; adapters of
            different kernels, or of different ranks where factors are added.
    """
    if combination not in COMBINATIONS:
        raise UserError(
            f"unknown combination {combination!r}", "merge", f"use one of {', '.join(COMBINATIONS)}"
        )
    shapes = shapes_of(adapters)
    flat = [trees.flatten(adapter) for adapter in adapters]
    if masks is None:
        masks = [_draw_masks(adapter, density, [seed, i]) for i, adapter in enumerate(adapters)]
    kept = [trees.flatten(mask) for mask in masks]
    kind = combination if len(adapters) > 1 else "linear"
    merged = {}
    for path, shape in shapes.items():
        if any(path not in leaves for leaves in flat):
            raise UserError("not in all adapters", f"kernel '{path}'", "use adapters that have it")
        leaves = [adapter[path] for adapter in flat]
        ranks = [leaf.a.shape[-1] for leaf in leaves]
        if kind not in ("cat", "svd") and len(set(ranks)) > 1:
            raise UserError(
                f"ranks {ranks}", f"kernel '{path}', {kind!r}", "use adapters of one rank"
            )
        rank = sum(ranks) if kind == "cat" else max(ranks)
        scale: Any = np.full(shape.stack, math.sqrt(rank) if rslora else 1.0, np.float32)
        a: Any = np.empty((*shape.stack, shape.d_in, rank), np.float32)
        b: Any = np.empty((*shape.stack, rank, shape.d_out), np.float32)
        for index in np.ndindex(shape.stack):
            if kind in ("cat", "svd"):
                product = add([factors_of(leaf, shape, index) for leaf in leaves], weights)
                near = product if kind == "cat" else refactor(product, rank)[0]
            else:
                scales = [float(leaf.scale[index]) for leaf in leaves]
                pruned = [
                    _prune(leaf, mask[path], index, kind, density)
                    for leaf, mask in zip(leaves, kept, strict=True)
                ]
                near = _combine(pruned, np.multiply(weights, scales), kind, votes)
            a[index], b[index] = near
        merged[path] = LowRank(a=a, b=b, scale=scale)
    return trees.unflatten(merged)


def _draw_masks(adapter: Adapter, density: float, seed: Sequence[int]) -> Adapter:
    """For every factor, which of its entries stay."""
    rng = np.random.default_rng(seed)

    def draw(leaf: LowRank) -> LowRank:
        a, b = (rng.random(factor.shape, np.float32) < density for factor in (leaf.a, leaf.b))
        return leaf.replace(a=a, b=b)

    return trees.map_leaves(draw, adapter)


def _prune(
    leaf: LowRank, mask: LowRank, index: tuple[int, ...], kind: str, density: float
) -> Factors:
    """The factors of one matrix with some of their entries dropped."""

    def prune(factor: np.ndarray, keep: np.ndarray) -> np.ndarray:
        if density >= 1.0 or kind == "linear":
            return factor
        if kind.startswith("dare"):
            return factor * keep.astype(np.float32) / np.float32(density)
        return factor * largest(factor, density)

    pairs = ((leaf.a, mask.a), (leaf.b, mask.b))
    return Factors(
        *(prune(np.asarray(x[index]).astype(np.float32), np.asarray(m[index])) for x, m in pairs)
    )


def _combine(pruned: Sequence[Factors], weights: np.ndarray, kind: str, votes: str) -> Factors:
    """Factors of one matrix, each put together on its own.

    With `weights` w_i s_i, those of adapter i count by √|w_i s_i|, `a` with the sign as well.
    """
    roots = np.sqrt(np.abs(weights))

    def combine(factors: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
        if kind.endswith("ties"):
            return consensus.elect(factors, weights.tolist(), "count", "unweighted", votes)
        return consensus.weighted_sum(factors, weights.tolist(), "none")

    a, b = zip(*pruned, strict=True)
    return Factors(combine(a, np.copysign(roots, weights)), combine(b, roots))
