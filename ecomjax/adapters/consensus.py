"""How deltas of one kernel are put together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ecomjax.adapters.lowrank import Factors, decompose, inner
from ecomjax.errors import UserError

COLLINEAR = 0.9995
"""Cosine from which on two deltas are interpolated along a straight line, as in mergekit."""

NEGLIGIBLE = 1e-5
"""Singular values of a joint basis that are dropped, against the largest."""

ROUNDING = 1e-6
"""Coordinates in it that are rounding, whose sign must not count, against the same."""


def divisor(weights: Sequence[float], normalise: str) -> float:
    """What a sum over all of the deltas is divided by."""
    return {"weights": sum(weights), "count": float(len(weights)), "none": 1.0}[normalise]


def weighted_sum(
    deltas: Sequence[Float[np.ndarray, "d_in d_out"]], weights: Sequence[float], normalise: str
) -> Float[np.ndarray, "d_in d_out"]:
    """Σ w Δ, divided as `normalise` says."""
    total = np.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total += np.float32(weight) * delta
    return total / np.float32(divisor(weights, normalise))


def elect(
    deltas: Sequence[Float[np.ndarray, "d_in d_out"]],
    weights: Sequence[float],
    normalise: str,
    voices: str,
    votes: str,
) -> Float[np.ndarray, "d_in d_out"]:
    """Σ_{i agrees} w_i Δ_i / n, entry by entry: steps 2 and 3 of TIES (arXiv 2306.01708).

    i agrees where sign(v_i) = γ, with v_i = w_i Δ_i if `voices` is "weighted", else Δ_i. The
    sign elected is γ = sign(Σ v_i), or that of Σ sign(v_i) if `votes` is "frequency"; + where
    the sum is 0. n is the number of those that agree, or the sum of their weights, or 1. An
    entry that was dropped is 0, agrees with no sign and does not count.
    """
    weighted = voices == "weighted"
    if weighted:
        deltas = [np.float32(f) * delta for f, delta in zip(weights, deltas, strict=True)]
    ballots = [np.sign(voice) for voice in deltas] if votes == "frequency" else deltas
    elected = np.where(sum(ballots) >= 0, np.float32(1), np.float32(-1))
    total, count = np.zeros_like(deltas[0]), np.zeros_like(deltas[0])
    agreeing = np.empty_like(total)
    for voice, weight in zip(deltas, weights, strict=True):
        np.maximum(np.multiply(voice, elected, out=agreeing), np.float32(0), out=agreeing)
        total += agreeing if weighted else np.float32(weight) * agreeing
        if normalise != "none":
            count += (agreeing > 0) * np.float32(weight if normalise == "weights" else 1.0)
    total *= elected
    if normalise != "none":
        total /= np.where(count == 0, np.float32(1), count)
    return total


def spherical(terms: Sequence[Factors], weights: Sequence[float], name: str) -> tuple[float, float]:
    """The factors of two deltas in their spherical interpolation (Shoemake 1985).

    sin((1 - t) θ) / sin θ and sin(t θ) / sin θ, with t = w_1 / (w_0 + w_1) and θ the angle
    between the deltas; 1 - t and t where they are almost collinear.

    Raises:
        UserError: a delta of zero, which has no direction.
    """
    t = weights[1] / (weights[0] + weights[1])
    norms = [math.sqrt(max(0.0, inner(term, term))) for term in terms]
    if not all(norms):
        raise UserError(
            f"delta of adapter {norms.index(0.0)} is zero",
            f"'{name}', method 'slerp'",
            "use adapters that both change every kernel, or another method",
        )
    cosine = inner(terms[0], terms[1]) / norms[0] / norms[1]
    if abs(cosine) > COLLINEAR:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def align(
    terms: Sequence[Factors],
) -> tuple[list[Float[np.ndarray, "d_in R"]], Float[np.ndarray, "R d_out"]]:
    """Coordinates of every delta in one orthonormal basis of all their outputs.

    [Δ_1; Δ_2; ...] = U S V^T, so that Δ_i = (U_i S) V^T (KnOTS, Stoica et al. 2024, arXiv
    2410.19735, equation 3, for the transposed weights of torch). With Δ_i = a_i b_i and
    a_i = Q_i R_i, what is decomposed is the product of the block diagonal of R_i with the b_i
    below each other: the deltas are never formed.
    """
    split = [np.linalg.qr(term.a) for term in terms]
    heights = np.cumsum([0, *(r.shape[0] for _, r in split)])
    widths = np.cumsum([0, *(term.b.shape[0] for term in terms)])
    blocks = np.zeros((heights[-1], widths[-1]), np.float32)
    for i, (_, r) in enumerate(split):
        blocks[heights[i] : heights[i + 1], widths[i] : widths[i + 1]] = r
    joint = decompose(Factors(blocks, np.concatenate([term.b for term in terms])))
    rank = max(1, int((joint.s > NEGLIGIBLE * joint.s[0]).sum()))
    turned = joint.u[:, :rank] * joint.s[:rank]
    coordinates = [q @ turned[heights[i] : heights[i + 1]] for i, (q, _) in enumerate(split)]
    for x in coordinates:
        x[np.abs(x) <= ROUNDING * joint.s[0]] = 0.0
    return coordinates, joint.vt[:rank]
