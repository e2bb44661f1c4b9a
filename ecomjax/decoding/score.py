"""Likelihood of given continuations, such as the labels of a classification task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ecomjax.data.encoded import Encoded
from ecomjax.data.packing import write_rows
from ecomjax.decoding import prefix as prefixes
from ecomjax.decoding.batches import adapters_of, by_length, count_adapters
from ecomjax.errors import UserError
from ecomjax.models.likelihood import token_log_likelihood
from ecomjax.sharding import constrain
from ecomjax.typing import Batch, KVCache


@partial(jax.jit, static_argnums=(0, 1))
def score_rows(
    model: nn.Module, labels: int, variables: Any, start: KVCache, batch: Batch, adapter: Any
) -> Float[jax.Array, "B labels"]:
    """Log-likelihood of each label, the segments 1, 2, ... of the rows."""
    seen = prefixes.of_rows(start, adapter)
    likelihood = token_log_likelihood(model, variables, batch, seen, adapter_index=adapter)
    segments = jnp.arange(1, labels + 1, dtype=jnp.int32)
    own = batch.segment_ids[:, None, :] == segments[None, :, None]
    scores = jnp.where(own, likelihood[:, None, :], 0.0).sum(axis=-1)
    return constrain(scores, (None, None))


def label_log_likelihoods(
    model: nn.Module,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    batch_size: int,
    window: int,
    on_done: Callable[[int], None] = lambda count: None,
    adapters: Sequence[int] | None = None,
) -> Float[np.ndarray, "n labels"]:
    """log p(label | prompt), summed over the label's tokens and not normalised by length.

    Labels should end with the end token: then none is a prefix of another, and the values
    compare complete answers. A row holds a prompt once, as the shared segment of all its
    labels; tokens that all prompts open with are computed once.

    Args:
        model: see `models.likelihood.token_log_likelihood`; also has `new_cache`.
        variables: {"params": ..., "lora": ...}.
        prompts: token ids, each at least one.
        labels: token ids of each label, each at least one.
        batch_size: prompts scored together; results do not depend on it.
        window: most tokens a prompt and one label may take together.
        on_done: called with the number of prompts just finished, for progress.
        adapters: which of several each prompt uses, see `generate`.

    Raises:
        UserError: an empty prompt or label, or a prompt too long for the window; what
            `count_adapters` refuses.
    """
    if not prompts:
        return np.zeros((0, len(labels)), np.float32)
    if not all(prompts) or not all(labels):
        raise UserError("empty prompt or label", "label scoring", "give at least one token")
    longest = max(map(len, labels))
    for i, prompt in enumerate(prompts):
        if len(prompt) + longest > window:
            raise UserError(
                f"prompt of {len(prompt)} tokens and a label of {longest} exceed the window "
                f"of {window}",
                f"prompt {i}",
                "use fewer demonstrations or shorter inputs",
            )
    offset = prefixes.common_prefix(prompts)
    count = count_adapters(variables, len(prompts), adapters)
    start = prefixes.fill_prefix(model, variables, prompts[0][:offset], count)
    scores = np.zeros((len(prompts), len(labels)), np.float32)
    for indices in by_length([*map(len, prompts)], batch_size):
        batch = _label_rows([prompts[i][offset:] for i in indices], labels, offset)
        own = adapters_of(indices, adapters)
        found = score_rows(model, len(labels), variables, start, batch, own)
        scores[indices] = jax.device_get(found)
        on_done(len(set(indices)))
    return scores


def _label_rows(
    tails: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], offset: int
) -> Batch:
    """Rows of a prompt tail followed by its labels; every label repeats the last prompt token,
    which predicts its first one."""
    assembled = []
    for tail in tails:
        sequences = [Encoded(str(i), (*tail, *label), len(tail)) for i, label in enumerate(labels)]
        used = len(tail) - 1 + sum(1 + len(label) for label in labels)
        row, slots = tuple(range(len(labels))), prefixes.bucketed(used)
        assembled.append(write_rows([row], sequences, slots, [len(tail) - 1]))
    slots = max(batch.tokens.shape[1] for batch in assembled)

    def together(*leaves):
        widened = [np.pad(x, ((0, 0), (0, slots - x.shape[1]))) for x in leaves]
        return np.concatenate(widened)

    batch = jax.tree.map(together, *assembled)
    return batch.replace(positions=np.where(batch.segment_ids != 0, batch.positions + offset, 0))
