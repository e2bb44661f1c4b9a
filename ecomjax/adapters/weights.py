"""How much each adapter counts in a merge, kernel by kernel and layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from ecomjax.adapters.lowrank import Shape
from ecomjax.errors import UserError

Weight: TypeAlias = "float | Sequence[float] | Mapping[str, float | Sequence[float]]"
"""Of one adapter: a number; one for each layer of the stack; or either by kernel.

The keys of the last are regular expressions over whole paths; where several match, the last
wins.
"""


def resolve(
    weights: Sequence[Weight], adapters: int, shapes: Mapping[str, Shape]
) -> dict[str, np.ndarray]:
    """{path: weights [A, *stack]}, in float64.

    Raises:
        UserError: not one weight for each adapter; a weight that is no finite number; one by
            layer where the kernel has another number of layers; one by kernel that leaves a
            kernel out, or has a pattern that matches none.
    """
    if len(weights) != adapters:
        raise UserError(
            f"{len(weights)} weights for {adapters} adapters", "merge", "give one for each"
        )
    for number, weight in enumerate(weights):
        for pattern in weight if isinstance(weight, Mapping) else ():
            if not any(re.fullmatch(pattern, path) for path in shapes):
                raise UserError(
                    f"pattern '{pattern}' matches no kernel",
                    f"weights of adapter {number}",
                    f"the kernels are {', '.join(shapes)}",
                )
    return {
        path: np.stack(
            [_of_kernel(weight, path, shape, f"adapter {i}") for i, weight in enumerate(weights)]
        )
        for path, shape in shapes.items()
    }


def _of_kernel(weight: Weight, path: str, shape: Shape, whose: str) -> np.ndarray:
    """The weights [*stack] of one adapter."""
    where = f"weight of {whose} for kernel '{path}'"
    if isinstance(weight, Mapping):
        matching = [value for key, value in weight.items() if re.fullmatch(key, path)]
        if not matching:
            raise UserError("no weight", where, "add a pattern that matches it, such as '.*'")
        weight = matching[-1]
    values = np.asarray(weight, np.float64)
    if not np.isfinite(values).all():
        raise UserError(f"weight {weight}", where, "use finite numbers")
    if values.ndim and values.shape != shape.stack[:1]:
        layers = shape.stack[0] if shape.stack else "no"
        raise UserError(
            f"{len(values)} weights by layer, the kernel has {layers} layers",
            where,
            "give one number, or one for each layer",
        )
    by_layer = values.reshape(values.shape + (1,) * (len(shape.stack) - values.ndim))
    return np.broadcast_to(by_layer, shape.stack)
