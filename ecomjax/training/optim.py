"""The optimizer chain: clip by global norm, then AdamW under a warmed-up schedule."""

from __future__ import annotations

from typing import Literal

import jax
import optax


def schedule(
    kind: Literal["cosine", "linear", "constant"], peak: float, warmup: float, steps: int
) -> optax.Schedule:
    """Learning rate by step: linear from 0 over `warmup` * steps, then the named decay to 0."""
    rising = max(1, round(warmup * steps)) if warmup > 0 else 0
    falling = max(1, steps - rising)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, falling),
        "linear": optax.linear_schedule(peak, 0.0, falling),
        "constant": optax.constant_schedule(peak),
    }[kind]
    if not rising:
        return decay
    # The first step trains too: it starts at peak / (rising + 1), not at 0.
    rise = optax.linear_schedule(peak / (rising + 1), peak, rising)
    return optax.join_schedules([rise, decay], [rising])


def adamw(
    learning_rate: optax.Schedule,
    *,
    weight_decay: float,
    clip_norm: float,
    beta1: float,
    beta2: float,
    loraplus_ratio: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) on gradients clipped to a global norm.

    With `loraplus_ratio` λ other than 1 the fields `b` of adapters learn at λ times the rate of
    all else, their decay included: LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 4).
    """
    steps = [
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1=beta1, b2=beta2, weight_decay=weight_decay),
    ]
    if loraplus_ratio != 1.0:
        steps.append(_faster_b(loraplus_ratio))
    return optax.chain(*steps)


def _faster_b(ratio: float) -> optax.GradientTransformation:
    """Updates of the fields `b` times the ratio."""

    def scaled(path, update):
        return ratio * update if getattr(path[-1], "name", None) == "b" else update

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(scaled, updates)
    )
