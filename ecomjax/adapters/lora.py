"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) as a transform over a parameter dict.

An adapter is a tree with the paths of the kernels it adapts. The base is not trained:
gradients, optimizer state and checkpoints are those of the adapter alone.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ecomjax import trees
from ecomjax.adapters.lowrank import approximate
from ecomjax.adapters.rules import LoraRule, resolve
from ecomjax.errors import UserError
from ecomjax.typing import Adapter, DoRA, LowRank, ParamAxes, Params

POWER_ITERATIONS = 8
"""Of the randomised decomposition that PiSSA starts from."""


def init(
    params: Params, axes: Params, rules: Sequence[LoraRule], key: jax.Array
) -> tuple[Params, Adapter]:
    """The base to train against, and an adapter that together with it is the model given.

    `a` is uniform in +-1/sqrt(d_in), `b` is zero, both float32; of an embedding `a` is zero
    and `b` normal, so that the rows of tokens that are seen learn first. Each kernel draws
    from its own key, so that adding a rule does not change what the others draw. Where layers
    differ in rank, factors are padded with zeros to the largest.

    DoRA's magnitudes start as the norms of the kernel's outputs. PiSSA (Meng et al. 2024, arXiv
    2404.02948, equations 2 to 4) starts from the principal part of the kernel, a = U sqrt(S /
    scale) and b = sqrt(S / scale) V^T of its R largest singular values, and takes it out of
    the base, which alone is then another than the one given; see `since`.

    Args:
        params: the base, stacked; only shapes are read, but by DoRA and PiSSA.
        axes: `ParamAxes` at the same paths.
        rules: which kernels, ranks and scales; see `rules.resolve`.
        key: PRNG key.

    Raises:
        UserError: what `rules.resolve` refuses; DoRA or PiSSA of an embedding; PiSSA of a
            quantized kernel.
    """
    base, described = trees.flatten(params), trees.flatten(axes)
    adapter: dict[str, Any] = {}
    for path, own in resolve(rules, axes, params).items():
        folded = jax.random.fold_in(key, _stable_hash(path))
        embedding = described[path].names[0] == "vocab"
        if embedding and (own[0].dora or own[0].pissa):
            raise UserError("DoRA or PiSSA of an embedding", path, "leave it to plain LoRA")
        leaf = _init_leaf(base[path].shape, described[path], own, folded, embedding)
        if own[0].pissa:
            base[path], leaf = _principal(base[path], leaf, path)
        adapter[path] = _with_magnitude(leaf, base[path]) if own[0].dora else leaf
    changed = any(base[path] is not kernel for path, kernel in trees.flatten(params).items())
    return (trees.unflatten(base) if changed else params), trees.unflatten(adapter)


def _stable_hash(path: str) -> int:
    return zlib.crc32(path.encode())


def _init_leaf(
    shape: tuple[int, ...],
    axes: ParamAxes,
    rules: Sequence[LoraRule],
    key: jax.Array,
    embedding: bool,
) -> LowRank:
    """The factors and scales of a kernel, by the rules of its layers."""
    stack = shape[: axes.stacked]
    d_in = math.prod(shape[axes.stacked : axes.stacked + axes.inputs])
    d_out = math.prod(shape[axes.stacked + axes.inputs :])
    # Layers lead the stack; experts of a layer are alike.
    spread = (len(rules), *[1] * (len(stack) - 1)) if stack else ()
    ranks, scales = (
        np.broadcast_to(np.asarray(values, dtype).reshape(spread), stack)
        for values, dtype in (
            ([rule.rank for rule in rules], np.int32),
            ([rule.scale for rule in rules], np.float32),
        )
    )
    rank, bound = int(ranks.max()), d_in**-0.5
    used = np.arange(rank) < ranks[..., None]
    if embedding:
        a = jnp.zeros((*stack, d_in, rank), jnp.float32)
        b = jax.random.normal(key, (*stack, rank, d_out), jnp.float32)
    else:
        a = jax.random.uniform(key, (*stack, d_in, rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, rank, d_out), jnp.float32)
    return LowRank(
        a=jnp.where(used[..., None, :], a, 0.0),
        b=jnp.where(used[..., :, None], b, 0.0),
        scale=jnp.asarray(scales),
        dropout=rules[0].dropout,
        ranks=None if used.all() else jnp.asarray(ranks),
    )


def _principal(kernel: Any, leaf: LowRank, path: str) -> tuple[jax.Array, LowRank]:
    """The rest of a kernel, and the factors of the principal part taken out of it."""
    if not isinstance(kernel, jax.Array | np.ndarray):
        raise UserError(
            "PiSSA of a quantized kernel",
            path,
            "use a base that is not quantized, or start the adapter from zero",
        )
    stack, d_in, rank = leaf.a.shape[:-2], leaf.a.shape[-2], leaf.a.shape[-1]
    a: Any = np.zeros(leaf.a.shape, np.float32)
    b: Any = np.zeros(leaf.b.shape, np.float32)
    scale = np.asarray(leaf.scale)
    ranks = np.full(stack, rank) if leaf.ranks is None else np.asarray(leaf.ranks)
    rest: Any = np.array(kernel)
    for index in np.ndindex(stack):
        matrix = rest[index].astype(np.float32).reshape(d_in, -1)
        rng = np.random.default_rng([_stable_hash(path), *index])
        near, _ = approximate(matrix, int(ranks[index]), rng, POWER_ITERATIONS)
        rest[index] = (matrix - near.a @ near.b).reshape(rest.shape[len(stack) :])
        root = np.sqrt(scale[index])
        a[index][:, : ranks[index]], b[index][: ranks[index]] = near.a / root, near.b / root
    return jnp.asarray(rest), leaf.replace(a=jnp.asarray(a), b=jnp.asarray(b))


def _with_magnitude(leaf: LowRank, kernel: Any) -> DoRA:
    """The DoRA leaf that changes nothing but what the factors do, matrix by matrix."""

    def norms(part: DoRA, own: Any) -> jax.Array:
        return 1.0 / part.gain(own.reshape(part.a.shape[-2], part.b.shape[-1]))

    for _ in range(leaf.scale.ndim):
        norms = _mapped(norms)
    ones = jnp.ones((*leaf.scale.shape, leaf.b.shape[-1]), jnp.float32)
    new = DoRA(leaf.a, leaf.b, leaf.scale, ones, leaf.dropout, leaf.ranks)
    return new.replace(magnitude=norms(new, jax.tree.map(jnp.asarray, kernel)))


def _mapped(function: Any) -> Any:
    return lambda *stacked: jax.lax.map(lambda one: function(*one), stacked)


def since(adapter: Adapter, start: Adapter) -> Adapter:
    """The adapter to the base that `init` was given, of one trained against what it returned.

    Where `start` is no delta of zero, as PiSSA's, ranks double: a' = [a, a_0] and
    b' = [b; -b_0], so that scale a' b' = scale (a b - a_0 b_0) (Meng et al. 2024).
    Elsewhere the leaf is the same.

    Args:
        adapter: trained.
        start: the one that `init` returned with its base.
    """

    def of_leaf(leaf: Any, first: Any) -> Any:
        if not (first.a.any() and first.b.any()):
            return leaf
        a = np.concatenate([leaf.a, first.a], axis=-1)
        b = np.concatenate([leaf.b, -first.b], axis=-2)
        if leaf.ranks is None:
            return leaf.replace(a=jnp.asarray(a), b=jnp.asarray(b))
        # The padding of both goes to the end.
        used = np.arange(leaf.a.shape[-1]) < np.asarray(leaf.ranks)[..., None]
        order = np.argsort(~np.concatenate([used, used], axis=-1), axis=-1, kind="stable")
        return leaf.replace(
            a=jnp.asarray(np.take_along_axis(a, order[..., None, :], axis=-1)),
            b=jnp.asarray(np.take_along_axis(b, order[..., :, None], axis=-2)),
            ranks=2 * leaf.ranks,
        )

    return trees.map_leaves(of_leaf, adapter, start)


def check_paths(params: Params, adapter: Adapter) -> None:
    """Raises where the adapter has a path that no parameter has; linen would ignore it."""
    known = trees.flatten(params)
    foreign = [path for path in trees.flatten(adapter) if path not in known]
    if foreign:
        raise UserError(
            "adapter path that no parameter has",
            foreign[0],
            f"the parameters are {', '.join(sorted(known))}",
        )


def fuse(params: Params, adapter: Adapter) -> Params:
    """kernel + delta for every adapted kernel, added in float32 and rounded once.

    Raises:
        UserError: an adapter path that no parameter has.
    """
    check_paths(params, adapter)
    fused = trees.flatten(params)
    for path, leaf in trees.flatten(adapter).items():
        kernel = fused[path]
        total = kernel.astype(jnp.float32) + leaf.delta(kernel)
        fused[path] = total.astype(kernel.dtype)
    return trees.unflatten(fused)


def delta(params: Params, adapter: Adapter) -> Params:
    """What the adapter adds to each adapted kernel, in float32 and the kernel's shape."""
    check_paths(params, adapter)
    kernels = trees.flatten(params)
    flat = trees.flatten(adapter)
    return trees.unflatten({path: leaf.delta(kernels[path]) for path, leaf in flat.items()})


def uniform(adapter: Adapter) -> Adapter:
    """The same deltas, every kernel at the largest rank and with a scale of 1.

    For readers that know one rank and one alpha alone. Scales go into `b`, which is rounded once
    to its dtype.

    Raises:
        UserError: a leaf that is no `LowRank`, whose delta takes the base to know.
    """
    flat = trees.flatten(adapter)
    for path, leaf in flat.items():
        if type(leaf) is not LowRank:
            raise UserError(f"{type(leaf).__name__} has no deltas alone", path, "fuse it instead")
    rank = max(leaf.a.shape[-1] for leaf in flat.values())

    def of(leaf: LowRank) -> LowRank:
        scale = jnp.asarray(leaf.scale, jnp.float32)
        room = (0, rank - leaf.a.shape[-1])
        stack = ((0, 0),) * scale.ndim
        a = jnp.pad(jnp.asarray(leaf.a), (*stack, (0, 0), room))
        b = jnp.pad(jnp.asarray(leaf.b), (*stack, room, (0, 0)))
        b = (scale[..., None, None] * b.astype(jnp.float32)).astype(b.dtype)
        return LowRank(a, b, jnp.ones_like(scale), leaf.dropout)

    return trees.unflatten({path: of(leaf) for path, leaf in flat.items()})


def split(adapter: Adapter) -> tuple[Adapter, Adapter]:
    """(trained, fixed): the same tree twice, each with the other's fields set to None.

    Scales are arrays, so that adapters of different alpha stack, but no gradient is wanted
    for them.
    """

    def keep(leaf: Any, fixed: bool) -> Any:
        dropped = [name for name in leaf.__dataclass_fields__ if (name in leaf.fixed) != fixed]
        arrays = [name for name in dropped if not isinstance(getattr(leaf, name), float)]
        return leaf.replace(**dict.fromkeys(arrays))

    return (
        trees.map_leaves(lambda leaf: keep(leaf, False), adapter),
        trees.map_leaves(lambda leaf: keep(leaf, True), adapter),
    )


def join(trained: Adapter, fixed: Adapter) -> Adapter:
    """The inverse of `split`."""
    return trees.map_leaves(
        lambda t, f: t.replace(**{name: getattr(f, name) for name in t.fixed}), trained, fixed
    )
