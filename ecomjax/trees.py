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
_UNSTACKED = re.compile(r"layers_(\d+)")


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
    """Number of array elements; what stands for an array, by its shape, counts as that one."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def bytes_of(tree: Any) -> int:
    """Number of bytes held by the arrays (or by arrays of such shapes)."""
    return sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def stack_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"layers_0": t0, "layers_1": t1, ...} -> {"layers": t}, leaves stacked along a new axis 0.

    At any depth, so that an encoder and a decoder each have their own.
    """
    stacked: dict[str, Any] = {}
    for key, value in tree.items():
        if _UNSTACKED.fullmatch(key):
            stacked.setdefault(STACKED, {})[int(key.rpartition("_")[2])] = value
        else:
            stacked[key] = stack_layers(value) if isinstance(value, Mapping) else value
    if layers := stacked.get(STACKED):
        ordered = [layers[i] for i in range(len(layers))]
        stacked[STACKED] = jax.tree.map(lambda *xs: jax.numpy.stack(xs), *ordered)
    return stacked


def unstack_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`."""
    unstacked: dict[str, Any] = {}
    for key, value in tree.items():
        if key != STACKED:
            unstacked[key] = unstack_layers(value) if isinstance(value, Mapping) else value
            continue
        for i in range(jax.tree.leaves(value)[0].shape[0]):
            unstacked[f"{STACKED}_{i}"] = jax.tree.map(lambda x, i=i: x[i], value)
    return unstacked
