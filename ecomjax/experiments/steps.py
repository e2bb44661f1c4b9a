"""The steps that experiments run, traced from shapes alone: no weight is read, nothing runs."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ecomjax import sharding, trees
from ecomjax.adapters import lora
from ecomjax.adapters.quantize import quantize
from ecomjax.decoding import continuous, prefix, score
from ecomjax.decoding.batches import Rows
from ecomjax.decoding.generate import GenerateOptions
from ecomjax.errors import UserError
from ecomjax.experiments.assembly import check_decoder, configured, sampling_of
from ecomjax.experiments.config import FinetuneConfig, IclConfig
from ecomjax.experiments.initial import describe_state, make_optimizer, make_rules
from ecomjax.experiments.sections import ModelConfig
from ecomjax.hf.checkpoints import load_config
from ecomjax.models import registry
from ecomjax.tasks.registry import get_task
from ecomjax.training.losses import causal_lm
from ecomjax.training.step import make_train_step
from ecomjax.typing import Adapter, Batch, KVCache, ParamAxes, Params

STEPS = 1000
"""Of the learning rate's schedule, whose length changes a constant of the program."""
LABEL_TOKENS = 4
"""Of a label that is scored."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Lengths of few-shot prompts, which configs do not tell.

    Attributes:
        slots: of a row: the part of a prompt that differs, with its labels.
        prefix: that all rows follow: instruction and demonstrations, computed once for all.
    """

    slots: int = 512
    prefix: int = 1024


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of a jitted function.

    Attributes:
        told: what it is, in words.
        traced: with shapes and shardings of its arguments.
        tokens: that it processes, padding none.
        useful_flops: what these tokens need: see `useful_flops_of`.
        fallbacks: axes of parameters that every device holds whole.
    """

    told: str
    traced: jax.stages.Traced
    tokens: int
    useful_flops: float
    fallbacks: tuple[sharding.Fallback, ...]


@dataclasses.dataclass(frozen=True)
class _Base:
    """A model, its parameters as shapes on the mesh."""

    config: Any
    module: nn.Module
    params: Params
    axes: Params
    mesh: Mesh
    fallbacks: tuple[sharding.Fallback, ...]
    products: float
    """Parameters in the matrix products of a token, the head's apart."""
    head: float
    """Parameters of the head."""


def trace(config: FinetuneConfig | IclConfig, mesh: Mesh, prompts: Prompts) -> Step:
    """The step that a config spends its time in.

    A config of finetune trains: one microbatch, rows full of one sequence, a loss on every
    token, and the update. A config of icl scores labels, or, where it lets the model write,
    draws the next token of each row.
    """
    base = _describe(config.model, mesh)
    if isinstance(config, FinetuneConfig):
        return _training(config, base)
    task = get_task(config.task.name, **config.task.options)
    if task.labels is not None and config.task.method in ("auto", "likelihood"):
        return _scoring(config, base, prompts, len(task.labels))
    return _decoding(config, base, prompts)


def _traced(function: Any, mesh: Mesh, *args: Any) -> jax.stages.Traced:
    """Of a jitted function; nothing may run while a mesh is in use whose devices are not here."""
    with sharding.use(mesh):
        return function.trace(*args)


def _describe(config: ModelConfig, mesh: Mesh) -> _Base:
    shape, module = configured(load_config(config.name, config.path), config)
    check_decoder(module, config)
    params, axes = registry.describe(module)
    products = head = 0.0
    for path, leaf in trees.flatten(axes).items():
        size = float(math.prod(trees.flatten(params)[path].shape))
        if "vocab" in leaf.names and leaf.inputs:
            # A table that is no head is looked up; a tied one is looked up and is the head.
            head += size if path.startswith("lm_head") or shape.tied_embeddings else 0.0
        elif leaf.inputs:
            products += size * _share_of_experts(shape, leaf)
    if (kind := config.quantization) != "none":
        params = jax.eval_shape(functools.partial(quantize, axes=axes, kind=kind), params)
    specs, fallbacks = sharding.specs(axes, params, mesh)
    params = _placed(params, sharding.shardings(specs, mesh))
    return _Base(shape, module, params, axes, mesh, tuple(fallbacks), products, head)


def _share_of_experts(shape: Any, axes: ParamAxes) -> float:
    """Which part of a kernel a token passes."""
    return shape.experts_per_token / shape.experts if "experts" in axes.names else 1.0


def useful_flops_of(
    tokens: int,
    products: float,
    adapter: float = 0.0,
    attended: float = 0.0,
    training: bool = False,
) -> float:
    """What tokens need, recomputation and padding left out, whatever a program spends on it.

    A product of a token with a parameter costs 2 forward, 2 to go back to its input and 2 for
    the gradient of the parameter, which a frozen one has not: 4 N + 6 N_adapter. Attention
    costs 4 forward for each pair of positions and unit of width, and twice that back.

    Args:
        tokens: that are processed.
        products: N, the parameters that a token is multiplied with.
        adapter: those of them that are trained.
        attended: pairs of query and key of a token, times heads, head width and layers.
        training: whether there is a backward pass.
    """
    back = 2.0 if training else 1.0
    forward = 2.0 * (products + adapter)
    gradients = 2.0 * adapter if training else 0.0
    return tokens * (forward * back + gradients + 4.0 * attended * (3.0 if training else 1.0))


def _training(config: FinetuneConfig, base: _Base) -> Step:
    if config.training.tune != "lora":
        raise UserError("plans are of training adapters", "config.training.tune", "set it to lora")
    rows = config.training.rows * sharding.row_parts(base.mesh)
    length = config.training.row_length
    # What an adapter starts from, which PiSSA reads the weights for, does not change a step.
    rules = [dataclasses.replace(rule, pissa=False) for rule in make_rules(config.adapter)]
    key = jax.random.key(0)
    adapter = jax.eval_shape(lambda p: lora.init(p, base.axes, rules, key)[1], base.params)
    specs = sharding.adapter_specs(adapter, base.axes, base.params, base.mesh)
    lies = sharding.shardings(specs, base.mesh)
    trained, fixed = lora.split(_placed(adapter, lies))
    optimizer, schedule = make_optimizer(config.optimizer, STEPS)
    state, lies = describe_state(trained, optimizer, key, base.mesh)
    labels = list(config.tasks) if len(config.tasks) > 1 else []
    step: Any = make_train_step(
        causal_lm(base.module, groups=len(labels)), optimizer, schedule, labels, lies
    )
    batch = _batch((1, rows, length), grouped=bool(labels))
    frozen = {"params": base.params, "fixed": fixed}
    traced = _traced(step, base.mesh, _placed(state, lies), frozen, _in_rows(batch, base.mesh, 1))
    c = base.config
    attended = length / 2 * c.heads * c.head_dim * c.layers
    useful = useful_flops_of(
        rows * length, base.products + base.head, _of_adapter(c, base.axes, trained), attended, True
    )
    told = f"training step, {rows} x {length} tokens"
    return Step(told, traced, rows * length, useful, base.fallbacks)


def _of_adapter(shape: Any, axes: Params, adapter: Adapter) -> float:
    """Parameters of factors that a token is multiplied with."""
    described = trees.flatten(axes)
    return sum(
        (leaf.a.size + leaf.b.size) * _share_of_experts(shape, described[path])
        for path, leaf in trees.flatten(adapter).items()
    )


def _scoring(config: IclConfig, base: _Base, prompts: Prompts, labels: int) -> Step:
    rows, start = _rows_and_prefix(config, base, prompts)
    batch = _whole(_batch((rows, prompts.slots)), base.mesh)
    variables = {"params": base.params}
    scoring: Any = score.score_rows
    chunk = score.chunk_of(LABEL_TOKENS * labels)
    traced = _traced(scoring, base.mesh, base.module, chunk, variables, start, batch, None)
    tokens, c = rows * prompts.slots, base.config
    attended = (prompts.prefix + prompts.slots / 2) * c.heads * c.head_dim * c.layers
    # The head is needed for the few tokens of labels; they are left out.
    useful = useful_flops_of(tokens, base.products, attended=attended)
    told = f"scoring of {labels} labels, {rows} x {prompts.slots} tokens after {prompts.prefix}"
    return Step(told, traced, tokens, useful, base.fallbacks)


def _decoding(config: IclConfig, base: _Base, prompts: Prompts) -> Step:
    rows, start = _rows_and_prefix(config, base, prompts)
    new = config.task.max_new_tokens
    options = GenerateOptions(
        new,
        end=0,
        batch_size=1,
        window=1,
        **dataclasses.asdict(sampling_of(config.evaluation)),
    )
    tokens, lengths = _shape((rows, prompts.slots), jnp.int32), _shape((rows,), jnp.int32)
    given = Rows(start, tokens, lengths, _shape((), jnp.int32))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    idle = functools.partial(continuous.idle, base.module, options, batch=rows)
    seen = None
    if options.repetition_penalty != 1.0:
        seen = _shape((rows, base.module.config.vocab_size), jnp.bool_)
    state = jax.eval_shape(idle, continuous.Prompted(given, keys, seen))
    state = jax.tree.map(lambda x: _placed_rows(x, base.mesh), state)
    step: Any = jax.jit(continuous.step, static_argnums=(0, 1), donate_argnums=4)
    variables = {"params": base.params}
    traced = _traced(step, base.mesh, base.module, options, variables, start, state)
    c, held = base.config, prompts.prefix + prompts.slots + new
    useful = useful_flops_of(
        rows, base.products + base.head, attended=held * c.heads * c.head_dim * c.layers
    )
    told = f"decoding step, {rows} rows after {prompts.prefix} + {prompts.slots + new} tokens"
    return Step(told, traced, rows, useful, base.fallbacks)


def _rows_and_prefix(config: IclConfig, base: _Base, prompts: Prompts) -> tuple[int, KVCache]:
    """Prompts at once, and the cache of what all of them open with."""
    rows, parts = config.evaluation.batch_size, sharding.row_parts(base.mesh)
    bound: Any = base.module
    slots = prefix.bucketed(max(1, prompts.prefix))
    start = jax.eval_shape(lambda: bound.new_cache(1, slots))
    placed = jax.tree.map(lambda x: _placed_rows(x, base.mesh), start)
    return rows + -rows % parts, placed


def _placed_rows(shape: Any, mesh: Mesh) -> Any:
    """Of a cache or state, split as `decoding.continuous` splits them."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return _in_rows(shape, mesh)
    names = ("layers", "batch", "kv_heads", "positions", "head_dim")
    if shape.ndim < len(names):
        names = ("batch", "positions")[: shape.ndim]
    specs, _ = sharding.specs({"x": ParamAxes(names)}, {"x": shape}, mesh)
    return _placed(shape, sharding.shardings(specs, mesh)["x"])


def _batch(shape: tuple[int, ...], grouped: bool = False) -> Batch:
    numbers = _shape(shape, jnp.int32)
    groups = _shape(shape[:-1], jnp.int32) if grouped else None
    weights = _shape(shape, jnp.float32)
    return Batch(numbers, numbers, numbers, numbers, weights, groups)


def _shape(shape: tuple[int, ...], dtype: Any) -> Any:
    """What stands for an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _placed(shapes: Any, lies: Any) -> Any:
    """The shapes, with the shardings of arrays."""
    return jax.tree.map(
        lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), shapes, lies
    )


def _in_rows(shapes: Any, mesh: Mesh, axis: int = 0) -> Any:
    lies = sharding.rows_sharding(mesh, axis)
    return _placed(shapes, jax.tree.map(lambda _: lies, shapes))


def _whole(shapes: Any, mesh: Mesh) -> Any:
    return _placed(shapes, jax.tree.map(lambda _: sharding.whole(mesh), shapes))
