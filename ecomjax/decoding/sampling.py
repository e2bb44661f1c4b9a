"""From logits to the next token."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ecomjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; every option at its default changes nothing.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: how many of the most likely tokens are kept (Fan et al. 2018, arXiv 1805.04833);
            0 keeps every token.
        top_p: share of the probability that the most likely tokens kept have at least
            (nucleus; Holtzman et al. 2019, arXiv 1904.09751); 1 keeps every token.
        min_p: least probability of a token that is kept, as a share of that of the most
            likely one (Nguyen et al. 2024, arXiv 2407.01082); 0 keeps every token.
        repetition_penalty: what the logit of a token that a row has seen is divided by, or
            multiplied with where it is negative (Keskar et al. 2019, arXiv 1909.05858,
            section 4.1); 1 is none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        penalty, top_k = self.repetition_penalty, self.top_k
        checks = [
            (0 <= self.temperature < math.inf, "temperature", "use 0 (greedy) or more"),
            (top_k >= 0 and top_k == int(top_k), "top_k", "use a number of tokens, or 0 for all"),
            (0 < self.top_p <= 1, "top_p", "use a share above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p", "use a share from 0 to 1"),
            (0 < penalty < math.inf, "repetition_penalty", "use a number above 0, or 1 for none"),
        ]
        for holds, name, remedy in checks:
            if not holds:
                raise UserError(f"{name} {getattr(self, name)}", "decoding", remedy)


def adjust(
    logits: Float[Array, "B V"], options: Sampling, seen: Bool[Array, "B V"] | None = None
) -> Float[Array, "B V"]:
    """Logits of the distribution that tokens are drawn from, -inf where a token is not kept.

    What the options do, they do in the order of transformers: repetition penalty, temperature,
    top_k, top_p, min_p, each of the last three to what the one before has kept. Tokens as
    likely as the last one kept are kept too. Greedy decoding knows the penalty alone.

    Args:
        logits: float32.
        options: temperature, top_k and so on.
        seen: tokens of a row's prompt and those drawn for it; read for the penalty alone.
    """
    if options.repetition_penalty != 1.0:
        assert seen is not None, "a repetition penalty is of tokens that are seen"
        penalty = options.repetition_penalty
        penalised = jnp.where(logits < 0.0, logits * penalty, logits / penalty)
        logits = jnp.where(seen, penalised, logits)
    if options.temperature == 0.0:
        return logits
    logits = logits / options.temperature
    if options.top_k:
        likeliest, _ = jax.lax.top_k(logits, min(options.top_k, logits.shape[-1]))
        logits = _at_least(likeliest[:, -1:], logits)
    if options.top_p < 1.0:
        descending = jnp.sort(logits, axis=-1, descending=True)
        mass_before = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
        mass_before = mass_before - jax.nn.softmax(descending, axis=-1)
        inside = jnp.where(mass_before < options.top_p, descending, jnp.inf)
        logits = _at_least(inside.min(axis=-1, keepdims=True), logits)
    if options.min_p > 0.0:
        logits = _at_least(logits.max(axis=-1, keepdims=True) + math.log(options.min_p), logits)
    return logits


def _at_least(least: Float[Array, "B 1"], logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    return jnp.where(logits >= least, logits, -jnp.inf)


def sample(
    logits: Float[Array, "B V"],
    keys: jax.Array,
    options: Sampling,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
    """The most likely token (temperature 0), or a draw, from the logits as `adjust` leaves them.

    Args:
        logits, options, seen: see `adjust`.
        keys: one PRNG key a row, so that a row's draw does not depend on its neighbours.
    """
    logits = adjust(logits, options, seen)
    if options.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
