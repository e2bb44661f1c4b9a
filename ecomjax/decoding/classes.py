"""Log-probabilities of the classes that an encoder gives to tokens or to sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ecomjax.decoding.batches import OWN_SEGMENT, by_length
from ecomjax.decoding.prefix import size_class
from ecomjax.models.heads import SequenceClassifier
from ecomjax.sharding import constrain
from ecomjax.typing import PADDING_SEGMENT


def class_log_probabilities(
    model: nn.Module,
    variables: Any,
    sequences: Sequence[Sequence[int]],
    types: Sequence[Sequence[int]],
    batch_size: int,
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Float[np.ndarray, "S C"]]:
    """What the model says of each sequence, in their order: of its S slots, or of it as a whole.

    Args:
        model: a classifier of `models.heads`; S is 1 for one of sequences.
        variables: {"params": ..., "lora": ...}.
        sequences: token ids of each, at least one and at most as many as there are positions.
        types: which text of a pair each token is of.
        batch_size: sequences at once; results do not depend on it.
        on_done: called with the number of sequences just finished, for progress.
    """
    found: dict[int, np.ndarray] = {}
    for indices in by_length([*map(len, sequences)], batch_size):
        lengths = np.array([len(sequences[i]) for i in indices], np.int32)
        shape = (len(indices), size_class(int(lengths.max())))
        tokens, kinds = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row, (i, length) in enumerate(zip(indices, lengths, strict=True)):
            tokens[row, :length], kinds[row, :length] = sequences[i], types[i]
        table = jax.device_get(_of_rows(model, variables, tokens, kinds, lengths))
        for i, own, length in zip(indices, table, lengths, strict=True):
            found[i] = own[:length]
        on_done(len(set(indices)))
    return [found[i] for i in range(len(sequences))]


@partial(jax.jit, static_argnums=0)
def _of_rows(
    model: nn.Module,
    variables: Any,
    tokens: Int[Array, "B T"],
    types: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> Float[Array, "B S C"]:
    bound: Any = model
    # Padding stays at the last position, since a table of them may end there.
    count = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    positions = jnp.broadcast_to(jnp.minimum(count, lengths.max() - 1), tokens.shape)
    segments = jnp.where(count < lengths[:, None], OWN_SEGMENT, PADDING_SEGMENT)
    read = (tokens, positions, segments)
    if isinstance(model, SequenceClassifier):
        logits = bound.apply(variables, *read, jnp.zeros_like(tokens[:, :1]), types)
    else:
        logits = bound.apply(variables, *read, types)
    # Every process reads all of it.
    return constrain(jax.nn.log_softmax(logits, axis=-1), (None, None, None))
