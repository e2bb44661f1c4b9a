"""What changes from step to step: all of it, and nothing else, is checkpointed."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, UInt32


class TrainState(flax.struct.PyTreeNode):
    """Step counter, trained parameters, optimizer state and the key dropout is drawn from."""

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    """Steps so far that changed nothing but the counters, for want of a finite gradient."""
    trained: Any
    optimizer: Any
    key_data: UInt32[Array, "2"]
    """Raw PRNG key data; every step folds its number into the key, so the key is constant."""


def new_state(trained: Any, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        trained=trained,
        optimizer=optimizer.init(trained),
        key_data=jax.random.key_data(key),
    )
