"""Attention block by block, as kernels for TPUs: scores stay on the chip, and are never stored.

(Dao et al. 2022, arXiv 2205.14135.) A block of the mask in which no query sees a key is neither
fetched nor computed: under a causal mask nearly half of them, of rows packed from short sequences
most.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from ecomjax import sharding
from ecomjax.models import flash_kernels as kernels

LANES = 128
"""Of a vector register; queries and keys come in whole multiples of it."""
BLOCKS = (512, 256, LANES)
"""Queries and keys of a block: the largest of these that divides how many there are."""
HEADS_AT_ONCE = 4
"""Query heads that read a block of the mask before the next is fetched, or a group of them."""
HELD = 2**18
"""Numbers of a block of queries, or of keys, at most: so all blocks of a step lie on any chip."""
STEPS = 2**17
"""Of a table that tells each which block it gets, at most."""


class Inputs(NamedTuple):
    """What attention reads: N query heads in K groups, each of which shares a key head."""

    q: Float[Array, "B N T H"]
    """Scaled."""
    keys: Float[Array, "#B K S H"]
    values: Float[Array, "#B K S H"]
    """Of one row where all rows share them, as the keys."""
    mask: Bool[Array, "B T S"]
    """Which keys each query sees."""


def fits(queries: tuple[int, ...], keys: tuple[int, ...]) -> bool:
    """Whether there are kernels for queries [B, N, T, H] and keys [B or 1, K, S, H].

    Lengths have to be whole multiples of a register, blocks to lie on the chip, and on the mesh
    in use every device has to hold the key heads of its query heads.
    """
    if queries[2] % LANES or keys[2] % LANES:
        return False
    split = [
        sharding.spec_of((name,), (size,))
        for name, size in (("heads", queries[1]), ("kv_heads", keys[1]))
    ]
    sizes = _Sizes.of(queries, keys)
    parts, rows = sharding.row_parts(), queries[0]
    rows = rows if rows % parts else rows // parts
    steps = rows * (queries[2] // sizes.queries) * (keys[2] // sizes.keys)
    held = sizes.heads * sizes.queries * _registers(queries[3])
    return split[0] == split[1] and held <= HELD and steps <= STEPS


def attend(
    given: Inputs, cap: float = 0.0, interpret: bool = False
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """softmax(q k^T) v and the log of what the softmax divides by, in float32.

    That log is near the least float of a query that sees no key. On a mesh each device computes
    its own rows and heads.

    Args:
        given: of shapes that `fits`.
        cap: c > 0 turns a score x into c tanh(x / c).
        interpret: as ordinary operations, on any device.
    """
    compute = functools.partial(_attend, cap=cap, interpret=interpret)
    lies = _Lies(given)
    return _on_each_device(compute, (lies.inputs,), (lies.queries, lies.numbers))(given)


def gradients(
    given: Inputs,
    d_out: Float[Array, "B N T H"],
    log_total: Float[Array, "B N T"],
    correction: Float[Array, "B N T"],
    cap: float = 0.0,
    interpret: bool = False,
) -> tuple[Float[Array, "B N T H"], Float[Array, "#B K S H"], Float[Array, "#B K S H"]]:
    """By queries, keys and values, in float32.

    Where `given` is a part of the keys that a softmax is over, the numbers are those of all.

    Args:
        given, cap, interpret: see `attend`.
        d_out: by the output, in the dtype of the queries.
        log_total: as `attend` returns it.
        correction: the sum over H of d_out times the output.
    """
    compute = functools.partial(_gradients, cap=cap, interpret=interpret)
    lies = _Lies(given)
    d_q, d_keys, d_values = _on_each_device(
        compute,
        (lies.inputs, lies.queries, lies.numbers, lies.numbers),
        (lies.queries, lies.keys, lies.keys),
    )(given, d_out, log_total, correction)
    if given.keys.shape[0] == 1:
        d_keys, d_values = (x.sum(axis=0, keepdims=True) for x in (d_keys, d_values))
    return d_q, d_keys, d_values


class _Lies:
    """How the arrays lie on the mesh in use; keys here are those of each row."""

    def __init__(self, given: Inputs):
        rows, heads, length, _ = given.q.shape
        names = ("batch", "heads", None, None)
        self.queries = sharding.spec_of(names, given.q.shape)
        self.numbers = sharding.spec_of(names[:3], (rows, heads, length))
        names = ("batch", "kv_heads", None, None)
        self.keys = sharding.spec_of(names, (rows, *given.keys.shape[1:]))
        keys = self.keys
        if given.keys.shape[0] == 1:
            keys = sharding.spec_of((None, *names[1:]), given.keys.shape)
        mask = sharding.spec_of(("batch", None, None), given.mask.shape)
        self.inputs = Inputs._make((self.queries, keys, keys, mask))


def _on_each_device(compute: Callable[..., Any], given: Any, made: Any) -> Callable[..., Any]:
    """Of a function of whole arrays, that of the parts on each device of the mesh in use.

    Args:
        compute: that is done.
        given, made: how its arguments and results lie.
    """
    if sharding.in_use() is None:
        return compute
    return jax.shard_map(compute, in_specs=given, out_specs=made, check_vma=False)


def _attend(given: Inputs, cap: float, interpret: bool) -> tuple[Array, Array]:
    rows, heads, length, _ = given.q.shape
    cut = _Cut(given, queries_first=True)
    per_query = pltpu.VMEM((cut.heads, cut.queries, LANES), jnp.float32)
    out, log_total = _call(
        functools.partial(kernels.forward, cap=cap),
        cut,
        [
            (given.q, cut.of_queries),
            (given.keys, cut.of_keys),
            (given.values, cut.of_keys),
            (given.mask.astype(jnp.int8), cut.of_mask),
        ],
        [(given.q.shape, cut.of_queries), ((rows, heads, 1, length), cut.of_numbers)],
        [per_query, per_query],
        products=2,
        interpret=interpret,
    )
    return out, log_total[:, :, 0]


def _gradients(
    given: Inputs,
    d_out: Array,
    log_total: Array,
    correction: Array,
    cap: float,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    def run(kernel: Any, cut: _Cut, mask: Array, wanted: Any, scratch: Any, products: int) -> Any:
        given_blocks = [
            (given.q, cut.of_queries),
            (d_out, cut.of_queries),
            (given.keys, cut.of_keys),
            (given.values, cut.of_keys),
            (log_total[:, :, None], cut.of_numbers),
            (correction[:, :, None], cut.of_numbers),
            (mask, cut.of_mask),
        ]
        kernel = functools.partial(kernel, cap=cap)
        return _call(kernel, cut, given_blocks, wanted, scratch, products, interpret)

    mask = given.mask.astype(jnp.int8)
    cut = _Cut(given, queries_first=True)
    per_query = pltpu.VMEM((cut.heads, cut.queries, LANES), jnp.float32)
    wanted = [(given.q.shape, cut.of_queries)]
    (d_q,) = run(kernels.by_queries, cut, mask, wanted, [per_query, per_query], 3)
    cut = _Cut(given, queries_first=False)
    wanted = [((given.q.shape[0], *given.keys.shape[1:]), cut.of_own_keys)] * 2
    d_keys, d_values = run(kernels.by_keys, cut, mask.swapaxes(1, 2), wanted, [], 4)
    return d_q, d_keys, d_values


class _Sizes(NamedTuple):
    """Of a block: how many query heads, key heads, queries and keys."""

    heads: int
    kv_heads: int
    queries: int
    keys: int

    @classmethod
    def of(cls, queries: tuple[int, ...], keys: tuple[int, ...]) -> _Sizes:
        """The largest for arrays of these shapes, [B, N, T, H] and [B or 1, K, S, H]."""
        group = queries[1] // keys[1]
        at_once = max(
            n
            for n in range(1, keys[1] + 1)
            if keys[1] % n == 0 and (n == 1 or n * group <= HEADS_AT_ONCE)
        )

        def longest(heads: int, shape: tuple[int, ...]) -> int:
            held = HELD // (heads * _registers(shape[3]))
            return next(b for b in BLOCKS if b == LANES or (b <= held and not shape[2] % b))

        heads = at_once * group
        return cls(heads, at_once, longest(heads, queries), longest(at_once, keys))


def _registers(width: int) -> int:
    """What a vector of so many numbers takes of whole registers."""
    return width + -width % LANES


class _Cut:
    """How the arrays of a call are cut into blocks, and which blocks each step gets.

    The grid is of rows, groups of heads, outer and inner blocks. Either queries are the outer
    ones and their keys follow each other inside, or keys are, and the mask lies transposed.

    Attributes:
        heads, queries: of a block.
        grid: numbers of blocks.
        fetched: for each step the inner block that it gets: its own if it is needed, else the
            last one before that is, which is there already, or else the first one that is.
        products: multiplications and additions of one matrix product of all heads.
        of_queries, of_numbers, of_keys, of_own_keys, of_mask: the blocks of an array.
    """

    def __init__(self, given: Inputs, queries_first: bool):
        rows, heads, length, width = given.q.shape
        shared, kv_heads, slots, _ = given.keys.shape
        self.heads, at_once, queries, keys = _Sizes.of(given.q.shape, given.keys.shape)
        blocks = (length // queries, slots // keys)
        needed = given.mask.reshape(rows, blocks[0], queries, blocks[1], keys).any(axis=(2, 4))
        if not queries_first:
            needed, blocks = needed.swapaxes(1, 2), blocks[::-1]
        inner = jnp.arange(blocks[1], dtype=jnp.int32)
        latest = jax.lax.cummax(jnp.where(needed, inner[None, None], 0), axis=2)
        self.fetched = jnp.maximum(latest, jnp.argmax(needed, axis=2, keepdims=True)).reshape(-1)
        self.grid = (rows, kv_heads // at_once, *blocks)
        self.queries = queries
        self.products = 2 * rows * heads * length * slots * width

        def blocked(shape: tuple[int, ...], place: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
            def index(row, head, outer, inner, fetched):
                inner = fetched[kernels.step_of(self.grid, row, outer, inner)]
                of_query, of_key = (outer, inner) if queries_first else (inner, outer)
                return place(row, head, of_query, of_key)

            return pl.BlockSpec(shape, index)

        mask = (1, queries, keys) if queries_first else (1, keys, queries)
        of_keys = (1, at_once, keys, width)
        self.of_queries = blocked((1, self.heads, queries, width), lambda b, h, i, j: (b, h, i, 0))
        self.of_numbers = blocked((1, self.heads, 1, queries), lambda b, h, i, j: (b, h, 0, i))
        self.of_own_keys = blocked(of_keys, lambda b, h, i, j: (b, h, j, 0))
        self.of_keys = self.of_own_keys
        if shared == 1:
            self.of_keys = blocked(of_keys, lambda b, h, i, j: (0, h, j, 0))
        self.of_mask = blocked(mask, lambda b, h, i, j: (b, i, j) if queries_first else (b, j, i))


def _call(
    kernel: Callable[..., None],
    cut: _Cut,
    given: Sequence[tuple[Array, pl.BlockSpec]],
    wanted: Sequence[tuple[tuple[int, ...], pl.BlockSpec]],
    scratch: Sequence[Any],
    products: int,
    interpret: bool,
) -> Any:
    """The arrays of float32 that a kernel makes, step by step.

    Args:
        kernel: gets `cut.fetched`, then blocks of what is given and wanted, then the scratch.
        given, wanted: arrays, or shapes, each with its blocks.
        products: matrix products that it computes, for the compiler and for plans.
    """
    made = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in wanted]
    arrays = [x for x, _ in given]
    return pl.pallas_call(
        kernel,
        out_shape=made,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=cut.grid,
            in_specs=[spec for _, spec in given],
            out_specs=[spec for _, spec in wanted],
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=products * cut.products,
            transcendentals=cut.products // (2 * arrays[0].shape[-1]),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in [*arrays, *made]),
        ),
        interpret=interpret,
    )(cut.fetched, *arrays)
