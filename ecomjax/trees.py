"""Nested dicts seen as {path: leaf}; knows nothing of models.

A path joins dict keys with "/". Anything that is not a dict is a leaf, structs included,
so an adapter tree flattens to its `LowRank`s and not to their factors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

STACKED = "layers"
_UNSTACKED = re.compile(r"layer_(\d+)")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}, in the tree's own order."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else key
        flat.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def select(tree: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """The {path: leaf} whose whole path matches the regular expression."""
    return {path: leaf for path, leaf in flatten(tree).items() if re.fullmatch(pattern, path)}


def map_leaves(function: Callable[..., Any], tree: Mapping[str, Any], *rest) -> dict[str, Any]:
    """Applies `function` to the leaves at equal paths; structs count as leaves."""
    others = [flatten(other) for other in rest]
    return unflatten(
        {path: function(leaf, *(o[path] for o in others)) for path, leaf in flatten(tree).items()}
    )


def count(tree: Any) -> int:
    """Number of array elements."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def bytes_of(tree: Any) -> int:
    """Number of bytes held by the arrays (or by arrays of such shapes)."""
    return sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def stack_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"layer_0": t0, "layer_1": t1, ...} -> {"layers": t}, leaves stacked along a new axis 0."""
    layers = {int(m[1]): tree[k] for k in tree if (m := _UNSTACKED.fullmatch(k))}
    rest = {k: v for k, v in tree.items() if not _UNSTACKED.fullmatch(k)}
    if not layers:
        return rest
    ordered = [layers[i] for i in range(len(layers))]
    return rest | {STACKED: jax.tree.map(lambda *xs: jax.numpy.stack(xs), *ordered)}


def unstack_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`."""
    rest = {k: v for k, v in tree.items() if k != STACKED}
    if STACKED not in tree:
        return rest
    depth = jax.tree.leaves(tree[STACKED])[0].shape[0]
    layers = {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], tree[STACKED]) for i in range(depth)}
    return rest | layers
