"""What training starts from: optimizer, adapter and state, made where they lie on the mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from ecomjax import placement, sharding
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.errors import UserError
from ecomjax.experiments.sections import AdapterConfig, OptimizerConfig
from ecomjax.training import optim
from ecomjax.training.state import TrainState, new_state
from ecomjax.typing import Adapter, Params


def make_optimizer(
    config: OptimizerConfig, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a run of so many steps, and its learning rate by step."""
    schedule = optim.schedule(config.schedule, config.learning_rate, config.warmup, steps)
    optimizer = optim.adamw(
        schedule,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        beta1=config.beta1,
        beta2=config.beta2,
        loraplus_ratio=config.loraplus_ratio,
    )
    return optimizer, schedule


def make_rules(config: AdapterConfig) -> list[LoraRule]:
    """Which kernels are adapted, and how."""
    variant = {name: getattr(config, name) for name in ("rslora", "dora", "pissa")}
    return [LoraRule(**dataclasses.asdict(rule), **variant) for rule in config.all_rules]


def init_adapter(
    params: Params, axes: Params, rules: list[LoraRule], key: jax.Array, mesh: Mesh
) -> tuple[Params, Adapter]:
    """See `lora.init`; both lie on the mesh.

    Raises:
        UserError: what `lora.init` refuses; PiSSA, which reads the base on the host, where
            several processes share it.
    """
    init = functools.partial(lora.init, axes=axes, rules=rules)

    def adapter_of(params: Params, key: jax.Array) -> Adapter:
        return init(params, key=key)[1]

    if not any(rule.pissa for rule in rules):
        shapes = jax.eval_shape(adapter_of, params, key)
        lies = sharding.shardings(sharding.adapter_specs(shapes, axes, params, mesh), mesh)
        return params, jax.jit(adapter_of, out_shardings=lies)(params, key)
    if jax.process_count() > 1:
        raise UserError(
            "PiSSA by several processes",
            "config.adapter.pissa",
            "leave it out, or train on one machine",
        )
    base, adapter = init(params, key=key)
    lies = sharding.shardings(sharding.adapter_specs(adapter, axes, params, mesh), mesh)
    specs, _ = sharding.specs(axes, base, mesh)
    placed = placement.shard_params(base, sharding.shardings(specs, mesh))
    return placed, placement.shard_params(adapter, lies)


def init_state(
    trained: Any, optimizer: optax.GradientTransformation, key: jax.Array, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """The state before the first step, and where its arrays lie.

    Args:
        trained: parameters on the mesh.
        optimizer: of them.
        key: that dropout is drawn from.
        mesh: that the state lies on.
    """
    begin, _, lies = _begin(trained, optimizer, key, mesh)
    return jax.jit(begin, out_shardings=lies)(trained, key), lies


def describe_state(
    trained: Any, optimizer: optax.GradientTransformation, key: jax.Array, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """What `init_state` returns, with shapes in place of arrays; also of shapes on the mesh."""
    return _begin(trained, optimizer, key, mesh)[1:]


def _begin(
    trained: Any, optimizer: optax.GradientTransformation, key: jax.Array, mesh: Mesh
) -> tuple[Callable[[Any, jax.Array], TrainState], TrainState, TrainState]:
    """What makes the state, the shapes of its arrays, and where they lie."""

    def begin(trained: Any, key: jax.Array) -> TrainState:
        return new_state(trained, optimizer, key)

    shapes = jax.eval_shape(begin, trained, key)
    lies = sharding.state_shardings(shapes, jax.tree.map(lambda x: x.sharding, trained), mesh)
    return begin, shapes, lies
