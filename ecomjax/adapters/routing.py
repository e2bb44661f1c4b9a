"""Several adapters held at once, of which every row of a batch uses its own.

No adapter is merged and no weight is changed: the rows of one compiled program answer as if each
had been run with its adapter alone, whatever their ranks and scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ecomjax import trees
from ecomjax.errors import UserError
from ecomjax.typing import Adapter, AdapterLeaf, LowRank


def hold_together(adapters: Sequence[Adapter]) -> Adapter:
    """One tree of all adapters, along an axis [A] between the stack and the factors.

    Factors are padded with zeros to the largest rank. An adapter that lacks a kernel adds
    nothing to it, so that {} is the base itself. Models pick by `adapter_index`.

    Args:
        adapters: of one base; layers stacked in all or in none.

    Raises:
        UserError: no kernel at all; a kernel of which the adapters differ in shape or kind,
            or which one of DoRA and another without it have.
    """
    flat = [trees.flatten(adapter) for adapter in adapters]
    paths = dict.fromkeys(path for leaves in flat for path in leaves)
    if not paths:
        raise UserError("no kernel", "the list of adapters", "name at least one adapter")
    return trees.unflatten({p: _hold([leaves.get(p) for leaves in flat], p) for p in paths})


def _hold(leaves: Sequence[Any], path: str) -> AdapterLeaf:
    found = [leaf for leaf in leaves if leaf is not None]
    kinds = {type(leaf) for leaf in found}
    if len(kinds) > 1 or (len(found) < len(leaves) and kinds != {LowRank}):
        names = sorted(kind.__name__ for kind in kinds)
        raise UserError(
            f"{' and '.join(names)} in {len(found)} of {len(leaves)} adapters",
            f"kernel '{path}'",
            "hold adapters of one kind together, DoRA only where all have the kernel",
        )
    outer = {(leaf.a.shape[:-1], leaf.b.shape[-1]) for leaf in found}
    if len(outer) > 1:
        shapes = sorted((*stacked, d_out) for stacked, d_out in outer)
        raise UserError(
            f"shapes {' and '.join(map(str, shapes))}", f"kernel '{path}'", "use one base"
        )
    rank, axis = max(leaf.a.shape[-1] for leaf in found), found[0].scale.ndim

    def along(name: str, pad: int | None = None) -> Any:
        """One field of all adapters, padded to the rank along an axis; zeros where absent."""
        like, parts = getattr(found[0], name), []
        for leaf in leaves:
            x = np.zeros_like(like) if leaf is None else np.asarray(getattr(leaf, name))
            if pad is not None:
                widths = [(0, 0)] * x.ndim
                widths[pad] = (0, rank - x.shape[pad])
                x = np.pad(x, widths)
            parts.append(x)
        return jnp.asarray(np.stack(parts, axis=axis))

    fields = {"a": along("a", -1), "b": along("b", -2)}
    for name in found[0].__dataclass_fields__.keys() - fields.keys() - {"dropout", "ranks"}:
        fields[name] = along(name)
    return found[0].replace(**fields, dropout=0.0, ranks=None)
