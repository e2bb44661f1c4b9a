"""Running a block layer after layer: scanned over stacked parameters, or unrolled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from ecomjax.models.config import ModelConfig
from ecomjax.models.layers import KEPT
from ecomjax.trees import STACKED

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stack(
    block: type[nn.Module], config: ModelConfig, length: int, shared: Mapping[str, int]
) -> Any:
    """The layers of a model, to be assigned to `self.layers` and called through `run`.

    Args:
        block: built as `block(config)`; its methods take (carry, of_layer, *shared) and
            return (carry, output of the layer).
        config: says whether to scan and what to recompute.
        length: L.
        shared: for each method that is called, how many arguments all layers share.
    """
    made: Any = block
    if config.remat != "none":
        made = nn.remat(
            block,
            policy=REMAT_POLICIES[config.remat],
            prevent_cse=not config.scan,
            methods=list(shared),
        )
    if not config.scan:
        return [made(config) for _ in range(length)]
    methods = {
        method: {
            "variable_axes": {"params": 0, "lora": 0},
            "split_rngs": {"params": True, "dropout": True},
            "in_axes": (0, *[nn.broadcast] * count),
            "length": length,
            "metadata_params": {nn.PARTITION_NAME: STACKED},
        }
        for method, count in shared.items()
    }
    scan: Any = nn.scan
    return scan(made, methods=methods)(config)


def run(layers: Any, carry: Any, of_layers: Any, *shared: Any, method: str = "__call__") -> Any:
    """(carry after the last layer, outputs of all layers stacked along a new first axis).

    Args:
        layers: what `stack` returned.
        carry: what each layer hands to the next.
        of_layers: what differs by layer, stacked along the first axis of each array.
        shared: what is the same for all layers.
        method: of the block.
    """
    if not isinstance(layers, (list, tuple)):
        return getattr(layers, method)(carry, of_layers, *shared)
    outputs = []
    for i, layer in enumerate(layers):
        own = jax.tree.map(lambda x, i=i: x[i], of_layers)
        carry, output = getattr(layer, method)(carry, own, *shared)
        outputs.append(output)
    return carry, jax.tree.map(lambda *xs: jax.numpy.stack(xs), *outputs)
