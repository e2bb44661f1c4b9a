"""Rotary position embeddings in the rotate-half layout of Hugging Face."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model stretched its rotation to texts longer than it was first trained on.

    "linear" divides every frequency by `factor` (Chen et al. 2023, arXiv 2306.15595).
    "llama3" divides those whose wave is longer than original_positions / low_factor, keeps
    those whose wave is shorter than original_positions / high_factor, and interpolates
    between (Llama 3.1; Grattafiori et al. 2024, arXiv 2407.21783, section 3.2).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_positions: int = 8192


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Float[np.ndarray, "half"]:
    """theta^(-2i/H) for i < H/2, scaled: the angle that one position adds to pair i."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = 1.0 / np.float32(theta) ** exponents
    if scaling is None:
        return inverse
    stretched = inverse / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return stretched
    waves_in_original = scaling.original_positions * inverse / (2 * np.pi)
    kept = (waves_in_original - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return ((1 - kept) * stretched + kept * inverse).astype(np.float32)


class Rotation(NamedTuple):
    """By which angle each pair of features is rotated in each slot, in float32."""

    cos: Float[Array, "*kinds B T half"]
    sin: Float[Array, "*kinds B T half"]


def rotations(positions: Int[Array, "B T"], inverse: Float[np.ndarray, "kinds half"]) -> Rotation:
    """By position * inverse[:, i]; frequencies of zero leave everything as it is.

    To be made once for all layers: sines take a CPU longer than all that is multiplied by them.
    """
    angles = positions.astype(jnp.float32)[None, :, :, None] * inverse[:, None, None, :]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Rotates feature pairs (i, i + H/2), in float32.

    Source: Su et al. 2021, arXiv 2104.09864, equation 34, with the pairs split in halves.
    """
    cos, sin = by.cos[:, :, None, :], by.sin[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
