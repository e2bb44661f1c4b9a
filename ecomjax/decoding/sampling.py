"""From logits to the next token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ecomjax.errors import UserError


def check(temperature: float, top_p: float) -> None:
    """Raises UserError unless temperature >= 0 and 0 < top_p <= 1."""
    if temperature < 0:
        raise UserError(f"temperature {temperature}", "decoding", "use 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p}", "decoding", "use a share above 0 and at most 1")


def sample(
    logits: Float[Array, "B V"], keys: jax.Array, temperature: float, top_p: float
) -> Int[Array, "B"]:
    """The most likely token (temperature 0), or a draw from the nucleus.

    The nucleus is the smallest set of most likely tokens whose probabilities at the given
    temperature sum to at least `top_p` (Holtzman et al. 2019, arXiv 1904.09751).

    Args:
        logits: float32.
        keys: one PRNG key a row, so that a row's draw does not depend on its neighbours.
        temperature: divides the logits.
        top_p: 1 keeps every token.
    """
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1.0:
        descending = jnp.sort(logits, axis=-1, descending=True)
        mass_before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
        mass_before = mass_before - jax.nn.softmax(descending, axis=-1)
        inside = jnp.where(mass_before < top_p, descending, jnp.inf)
        logits = jnp.where(logits >= inside.min(axis=-1, keepdims=True), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
