"""How time and memory grow with depth, rank, examples and adapters."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecomjax import sharding, trees
from ecomjax.adapters import lora
from ecomjax.adapters.merge import merge
from ecomjax.adapters.rules import LoraRule
from ecomjax.data.packing import make_plan
from ecomjax.experiments import figures
from ecomjax.experiments.benchmarks.result import ROUNDS, Result, timed
from ecomjax.experiments.initial import init_adapter, init_state, make_optimizer
from ecomjax.experiments.sections import OptimizerConfig
from ecomjax.models import registry
from ecomjax.models.llama import LlamaConfig
from ecomjax.training.losses import causal_lm
from ecomjax.training.step import make_train_step
from ecomjax.typing import Batch

SHAPE = LlamaConfig(
    vocab_size=4096,
    width=256,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=32,
    ffn=768,
    tied_embeddings=True,
)
"""What is made deeper, and adapted at higher ranks: small enough for the sizes below."""

ROWS, LENGTH = 4, 256
"""Of a training step."""

LAYERS = (4, 8, 16, 32)
RANKS = (8, 32, 128, 512)
EXAMPLES = (4_000, 16_000, 64_000, 256_000)
ADAPTERS = (2, 4, 8, 16)

LINEAR = 1.15
"""What an exponent may be and be called linear: small sizes have costs that do not grow, and
caches hold less of large ones."""


class Cost(NamedTuple):
    """What one size takes."""

    seconds: float
    megabytes: float


def growth(figure: Path) -> Iterator[Result]:
    """The exponents of time and of memory by size, and a figure of what they are fitted to.

    Of a training step by depth and by rank, of planning an epoch by its examples, and of a
    merge, brought back to the rank of the adapters, by their number. Memory is what the
    compiled step needs, or the most that planning and merging hold at once, in MB.

    Args:
        figure: where the figure is written; ends in .png or .svg.

    Raises:
        UserError: the figure has another suffix, or cannot be written.
    """
    figures.check_suffix(figure)
    measured: dict[str, tuple[tuple[int, ...], Callable[[int], Cost]]] = {
        "layers": (LAYERS, lambda size: _step(size, rank=16)),
        "rank": (RANKS, lambda size: _step(SHAPE.layers, rank=size)),
        "examples": (EXAMPLES, _planning),
        "adapters": (ADAPTERS, _merging),
    }
    lines = {}
    for name, (sizes, measure) in measured.items():
        costs = [measure(size) for size in sizes]
        for kind in Cost._fields:
            values = [getattr(cost, kind) for cost in costs]
            more = [
                (n / sizes[0], value / values[0]) for n, value in zip(sizes, values, strict=True)
            ]
            lines[f"{name}: {kind}"] = [(n, times, times, times) for n, times in more]
            yield Result(
                name=f"growth_{name}_{kind}",
                unit=f"power of the number of {name} that {kind} grow with, beside linear",
                ours=exponent(sizes, values),
                peer=1.0,
                target=LINEAR,
                samples=len(sizes),
                details={"sizes": sizes, kind: values},
            )
    lines["linear"] = [(n, n, n, n) for n in (1, sizes[-1] / sizes[0])]
    titles = {"x": "times as many or as much", "y": "times the seconds or megabytes"}
    figures.line_chart(figure, lines, "What grows with what", **titles, logarithmic=True)


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """p of the power law size^p that fits values best, on logarithmic scales."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _step(layers: int, rank: int) -> Cost:
    """An optimizer step of an adapter on every linear layer, of rows of random tokens."""
    module = registry.build(dataclasses.replace(SHAPE, layers=layers))
    params = registry.init(module, jax.random.key(0))
    _, axes = registry.describe(module)
    mesh = sharding.make_mesh(data=1)
    key, rules = jax.random.key(1), [LoraRule(rank=rank)]
    params, adapter = init_adapter(params, axes, rules, key, mesh)
    optimizer, schedule = make_optimizer(OptimizerConfig(), 1)
    trained, fixed = lora.split(adapter)
    state, lies = init_state(trained, optimizer, key, mesh)
    step: Any = make_train_step(causal_lm(module), optimizer, schedule, shardings=lies)
    frozen, batch = {"params": params, "fixed": fixed}, _random_rows()
    compiled = step.lower(state, frozen, batch).compile()
    needed = compiled.memory_analysis()
    seconds = []
    for _ in range(ROUNDS + 1):
        (state, metrics), taken = timed(
            functools.partial(_finished, compiled, state, frozen, batch)
        )
        assert np.isfinite(metrics["loss"]), "a step that is skipped is no work"
        seconds.append(taken)
    held = needed.temp_size_in_bytes + needed.argument_size_in_bytes
    return Cost(statistics.median(seconds[1:]), held / 1e6)


def _finished(compiled: Any, *given: Any) -> Any:
    return jax.block_until_ready(compiled(*given))


def _random_rows() -> Batch:
    rng = np.random.default_rng(0)
    shape = (1, ROWS, LENGTH)
    tokens = rng.integers(0, SHAPE.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    return Batch(
        tokens=jnp.asarray(tokens),
        positions=jnp.asarray(positions),
        segment_ids=jnp.ones(shape, jnp.int32),
        targets=jnp.asarray(np.roll(tokens, -1, axis=-1)),
        weights=jnp.ones(shape, jnp.float32),
    )


def _planning(examples: int) -> Cost:
    """Of which rows one epoch consists, in steps of 128 examples of QueryNER's lengths."""
    rng = np.random.default_rng(0)
    lengths = 134 + rng.integers(20, 80, examples)
    order = rng.permutation(examples)

    def plan() -> Any:
        return make_plan(
            lengths,
            [order],
            prefixes=[134],
            packing="shared_prefix",
            row_length=1024,
            batch_size=128,
        )

    return _on_the_host(plan)


def _merging(adapters: int) -> Cost:
    """A TIES merge of random rank-16 adapters to every linear layer."""
    shapes, axes = registry.describe(registry.build(SHAPE))
    rng = np.random.default_rng(0)
    drawn = []
    for seed in range(adapters):
        _, adapter = lora.init(shapes, axes, [LoraRule(rank=16)], jax.random.key(seed))
        drawn.append(
            trees.map_leaves(
                lambda leaf: leaf.replace(
                    a=np.asarray(leaf.a), b=0.02 * rng.standard_normal(leaf.b.shape, np.float32)
                ),
                adapter,
            )
        )
    return _on_the_host(lambda: merge(drawn, [1 / adapters] * adapters, "ties"))


def _on_the_host(run: Callable[[], Any]) -> Cost:
    """Seconds of a run, and the most memory that numpy and Python hold in another."""
    seconds = [timed(run)[1] for _ in range(ROUNDS + 1)]
    gc.collect()
    tracemalloc.start()
    try:
        run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return Cost(statistics.median(seconds[1:]), peak / 1e6)
