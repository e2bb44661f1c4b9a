"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) as a transform over a parameter dict.

An adapter is a tree with the paths of the kernels it adapts. The base is never changed:
gradients, optimizer state and checkpoints are those of the adapter alone.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ecomjax import trees
from ecomjax.adapters.rules import LoraRule, resolve
from ecomjax.errors import UserError
from ecomjax.typing import Adapter, LowRank, ParamAxes, Params


def init(
    params: Params, axes: Params, rules: Sequence[LoraRule], key: jax.Array
) -> tuple[Params, Adapter]:
    """The base to train against, and an adapter that adds nothing yet.

    `a` is uniform in +-1/sqrt(d_in), `b` is zero, both float32. Each kernel draws from its
    own key, so that adding a rule does not change what the others draw.

    Args:
        params: the base, stacked; only shapes are read.
        axes: `ParamAxes` at the same paths.
        rules: which kernels, ranks and scales; see `rules.resolve`.
        key: PRNG key.

    Raises:
        UserError: a rule matches no kernel.
    """
    shapes, described = trees.flatten(params), trees.flatten(axes)
    adapter = {
        path: _init_leaf(
            shapes[path].shape, described[path], rule, jax.random.fold_in(key, _stable_hash(path))
        )
        for path, rule in resolve(rules, axes).items()
    }
    return params, trees.unflatten(adapter)


def _stable_hash(path: str) -> int:
    return zlib.crc32(path.encode())


def _init_leaf(shape: tuple[int, ...], axes: ParamAxes, rule: LoraRule, key: jax.Array) -> LowRank:
    stack = shape[: axes.stacked]
    d_in = math.prod(shape[axes.stacked : axes.stacked + axes.inputs])
    d_out = math.prod(shape[axes.stacked + axes.inputs :])
    bound = d_in**-0.5
    return LowRank(
        a=jax.random.uniform(key, (*stack, d_in, rule.rank), jnp.float32, -bound, bound),
        b=jnp.zeros((*stack, rule.rank, d_out), jnp.float32),
        scale=jnp.full(stack, rule.alpha / rule.rank, jnp.float32),
        dropout=rule.dropout,
    )


def check_paths(params: Params, adapter: Adapter) -> None:
    """Raises where the adapter has a path that no parameter has; linen would ignore it."""
    known = trees.flatten(params)
    foreign = [path for path in trees.flatten(adapter) if path not in known]
    if foreign:
        raise UserError(
            "adapter path that no parameter has",
            foreign[0],
            f"the parameters are {', '.join(sorted(known))}",
        )


def fuse(params: Params, adapter: Adapter) -> Params:
    """kernel + delta for every adapted kernel, added in float32 and rounded once.

    Raises:
        UserError: an adapter path that no parameter has.
    """
    check_paths(params, adapter)
    fused = trees.flatten(params)
    for path, leaf in trees.flatten(adapter).items():
        kernel = fused[path]
        total = kernel.astype(jnp.float32) + leaf.delta(kernel)
        fused[path] = total.astype(kernel.dtype)
    return trees.unflatten(fused)


def delta(params: Params, adapter: Adapter) -> Params:
    """What the adapter adds to each adapted kernel, in float32 and the kernel's shape."""
    check_paths(params, adapter)
    kernels = trees.flatten(params)
    flat = trees.flatten(adapter)
    return trees.unflatten({path: leaf.delta(kernels[path]) for path, leaf in flat.items()})


def split(adapter: Adapter) -> tuple[Adapter, Adapter]:
    """(trained, fixed): the same tree twice, each with the other's fields set to None.

    Scales are arrays, so that adapters of different alpha stack, but no gradient is wanted
    for them.
    """

    def keep(leaf: Any, fixed: bool) -> Any:
        dropped = [name for name in leaf.__dataclass_fields__ if (name in leaf.fixed) != fixed]
        arrays = [name for name in dropped if not isinstance(getattr(leaf, name), float)]
        return leaf.replace(**dict.fromkeys(arrays))

    return (
        trees.map_leaves(lambda leaf: keep(leaf, False), adapter),
        trees.map_leaves(lambda leaf: keep(leaf, True), adapter),
    )


def join(trained: Adapter, fixed: Adapter) -> Adapter:
    """The inverse of `split`."""
    return trees.map_leaves(
        lambda t, f: t.replace(**{name: getattr(f, name) for name in t.fixed}), trained, fixed
    )
