"""What a model makes of prompts, as vectors, for comparing adapters by what they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ecomjax.decoding.batches import Limits, Rows, batches, prefill


def final_states(
    model: nn.Module,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    on_done: Callable[[int], None] = lambda count: None,
) -> Float[np.ndarray, "n D"]:
    """The last hidden state of each prompt's last token, in float32 and the prompts' order.

    It is the one that an answer's first token is predicted from, so that every adapted kernel
    before the head has had its say. A mean over tokens would for the most part be of the
    instruction that all prompts open with. Of an encoder-decoder, prompts are the sources, and
    the state is that of the last start token.

    Args:
        model: one that generates, see `decoding.batches`.
        variables: {"params": ..., "lora": ...}.
        prompts: token ids, each at least one.
        limits: batch size, window and start tokens; states do not depend on the batch size.
        on_done: called with the number of prompts just finished, for progress.

    Raises:
        UserError: what `decoding.batches.batches` refuses.
    """
    states = np.zeros((len(prompts), model.config.width), np.float32)
    for indices, rows in batches(model, variables, prompts, limits):
        states[indices] = jax.device_get(_of_rows(model, variables, rows))
        on_done(len(set(indices)))
    return states


@partial(jax.jit, static_argnums=0)
def _of_rows(model: nn.Module, variables: Any, rows: Rows) -> Float[Array, "B D"]:
    hidden, _ = prefill(model, variables, rows, new_slots=0)
    return hidden[:, 0].astype(jnp.float32)
