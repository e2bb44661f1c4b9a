"""Mixture-of-experts feed-forward with top-k routing.

Mixtral (Jiang et al. 2024, arXiv 2401.04088, section 2.1).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ecomjax import sharding
from ecomjax.models.layers import ACTIVATIONS, FeedForward, Linear, declare, multiply
from ecomjax.typing import DoRA, ParamAxes

Dispatch = Literal["dense", "ragged"]


class Routing(NamedTuple):
    """How slots were spread over the experts of a layer, padding left out."""

    assigned: Float[Array, "*L E"]
    """Slots sent to each expert."""
    probability: Float[Array, "*L E"]
    """The router's probability of each expert, summed over slots."""
    slots: Float[Array, "*L"]


class Balance(NamedTuple):
    """The load-balance loss, times its weight, and the weight: the slots that count."""

    sum: Float[Array, ""]
    weight: Float[Array, ""]


def balance(routing: Routing) -> Balance:
    """E sum_e f_e P_e, 1 per choice where experts share the load evenly (Fedus et al. 2021,
    arXiv 2101.03961, equation 4).

    f_e is the number of choices of expert e by slot, P_e its mean probability. Both are
    taken over all layers together, as transformers does.

    Args:
        routing: of all layers, stacked.
    """
    total = jnp.maximum(routing.slots.sum(), 1.0)
    share, mean = (x.sum(axis=0) / total for x in (routing.assigned, routing.probability))
    value = share.shape[0] * (share * mean).sum()
    return Balance(value * routing.slots[0], routing.slots[0])


class MoE(nn.Module):
    """Sum over the k experts with the highest scores of softmax(scores)_e * expert_e(x).

    Attributes:
        width, ffn, experts, experts_per_token: D, F, E, k.
        dispatch: "dense" runs every expert on every slot, "ragged" each on its own.
    """

    width: int
    ffn: int
    experts: int
    experts_per_token: int
    activation: str = "silu"
    dispatch: Dispatch = "ragged"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        live: Bool[Array, "B T"],
        adapter_index: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The output, and how the slots that are `live` were routed."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        router = Linear((self.experts,), ("embed", "routes"), name="router", **types)
        scores = router(x, adapter_index).astype(jnp.float32)
        top, chosen = jax.lax.top_k(scores, self.experts_per_token)
        weights = jax.nn.softmax(top, axis=-1)
        counted = live.astype(jnp.float32)
        is_chosen = jax.nn.one_hot(chosen, self.experts, dtype=jnp.float32)
        routing = Routing(
            assigned=jnp.einsum("BTkE,BT->E", is_chosen, counted),
            probability=jnp.einsum("BTE,BT->E", jax.nn.softmax(scores, axis=-1), counted),
            slots=counted.sum(),
        )
        made = self._experts(self.experts, self.ffn, name="experts")
        mesh = None if self.is_initializing() else sharding.in_use()
        if mesh is None:
            out = self._run(made, x, chosen, weights, adapter_index, self.experts)
        else:
            out = self._run_on(mesh, x, chosen, weights, adapter_index)
        return out.astype(self.dtype), routing

    def _experts(self, held: int, ffn: int, **given: Any) -> Any:
        """The module of so many experts of this width."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.dispatch == "ragged":
            return RaggedFeedForward(self.width, ffn, held, self.activation, **types, **given)
        vmap: Any = nn.vmap
        every = vmap(
            FeedForward,
            in_axes=(None, None),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            axis_size=held,
            metadata_params={nn.PARTITION_NAME: "experts"},
        )
        return every(self.width, ffn, self.activation, **types, **given)

    def _run(self, experts, x, chosen, weights, adapter_index, held):
        """Weighed sum over the chosen experts, in float32.

        Args:
            experts: what `_experts` makes, to be called.
            x: [B, T, D].
            chosen, weights: [B, T, k]; a choice outside of the experts held counts nothing.
            adapter_index: [B] or None.
            held: how many of all experts these are.
        """
        if self.dispatch == "dense":
            is_chosen = jax.nn.one_hot(chosen, held, dtype=jnp.float32)
            out = experts(x, adapter_index).astype(jnp.float32)
            return jnp.einsum("EBTD,EBT->BTD", out, jnp.einsum("BTkE,BTk->EBT", is_chosen, weights))
        expert, own, some = chosen.reshape(-1), None, held < self.experts
        if some:
            here = (expert >= 0) & (expert < held)
            expert = jnp.where(here, expert, held)  # behind all others
        if adapter_index is None:
            order = jnp.argsort(expert)
        else:
            own = jnp.repeat(adapter_index, chosen[0].size)
            order = jnp.lexsort((own, expert))
            own = own[order]
        rows = x.reshape(-1, x.shape[-1])[order // self.experts_per_token]
        sizes = jnp.bincount(expert, length=held)
        out = experts(rows, sizes, own)
        if some:
            counted = jnp.arange(out.shape[0], dtype=jnp.int32) < sizes.sum()
            out = jnp.where(counted[:, None], out, jnp.zeros_like(out))
        out = out[jnp.argsort(order)].reshape(*chosen.shape, -1).astype(jnp.float32)
        return jnp.einsum("BTkD,BTk->BTD", out, weights)

    def _run_on(self, mesh, x, chosen, weights, adapter_index):
        """`_run` with experts, and the width of each, split over a mesh.

        Devices that hold different experts hold different rows too. They gather the rows of
        all of them, run their own experts on these, and scatter the sums: no slot is dropped,
        and no shape depends on the routing.
        """
        held_by = self.variables.items()
        given = {kind: tree["experts"] for kind, tree in held_by if "experts" in tree}
        specs, over = _specs(given, mesh)
        rows, none = sharding.rows_spec(x.shape[0]), PartitionSpec()
        scattered = "expert" in over and rows != none
        held, ffn = (
            size // (mesh.shape[axis] if axis in over else 1)
            for size, axis in ((self.experts, "expert"), (self.ffn, "tensor"))
        )
        experts = self._experts(held, ffn, parent=None)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None

        def of_part(variables, slots, key):
            if scattered:
                gather = partial(jax.lax.all_gather, axis_name="expert", tiled=True)
                slots = jax.tree.map(gather, slots)
            x, chosen, weights, adapter_index = slots
            if held < self.experts:
                chosen = chosen - jax.lax.axis_index("expert") * held
            rngs = None
            if key is not None:
                own = jax.lax.axis_index(sharding.RULES["batch"])
                rngs = {"dropout": jax.random.fold_in(key, own)}
            call = partial(experts.apply, variables, rngs=rngs)
            out = self._run(call, x, chosen, weights, adapter_index, held)
            if scattered:
                out = jax.lax.psum_scatter(out, "expert", tiled=True)
            summed = tuple(axis for axis in over if axis == "tensor" or not scattered)
            return jax.lax.psum(out, summed)

        mapped = jax.shard_map(
            of_part, in_specs=(specs, rows, none), out_specs=rows, check_vma=False
        )
        return mapped(given, (x, chosen, weights, adapter_index), key)


AXES = {
    name: {"kernel": ParamAxes(("experts", *axes), 1)}
    for name, axes in {
        "gate": ("embed", "ffn"),
        "up": ("embed", "ffn"),
        "down": ("ffn", "embed"),
    }.items()
}
"""Of the kernels of all experts of a layer."""


def _specs(variables: dict[str, Any], mesh: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How the experts of a layer lie while they run, and which mesh axes their sums are over.

    They lie as they are stored, but gathered over "fsdp". The width of an expert is split
    where that is true of every array, and where the sum of the parts is the output: not of
    DoRA, whose norms are over all of it.
    """
    of_kernels, _ = sharding.specs(AXES, variables["params"], mesh, most_replicated=2**62)
    specs = {"params": of_kernels}
    adapter = variables.get("lora", {})
    if adapter:
        specs["lora"] = sharding.adapter_specs(adapter, AXES, variables["params"], mesh)
    down = variables["params"]["down"]["kernel"], of_kernels["down"]["kernel"]
    split = all(
        "tensor" in spec or x.shape[1] == 1
        for x, spec in zip(*map(jax.tree.leaves, down), strict=True)
    )
    split &= not isinstance(adapter.get("down", {}).get("kernel"), DoRA)
    dropped = ("fsdp",) if split else ("fsdp", "tensor")
    specs = jax.tree.map(
        lambda spec: PartitionSpec(*(None if axis in dropped else axis for axis in spec)), specs
    )
    found = {axis for spec in jax.tree.leaves(specs) for axis in spec}
    over = (axis for axis in ("tensor", "expert") if axis in found and mesh.shape[axis] > 1)
    return specs, tuple(over)


class RaggedFeedForward(nn.Module):
    """The gated `FeedForward` of several experts, on M rows that lie expert by expert."""

    width: int
    ffn: int
    experts: int
    activation: str = "silu"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "M D"], sizes: Int[Array, "E"], index: Int[Array, "M"] | None = None
    ) -> Float[Array, "M D"]:
        """The first sizes[0] rows are of expert 0; `index` is the adapter of each row."""
        linear = partial(RaggedLinear, self.experts, dtype=self.dtype, param_dtype=self.param_dtype)
        gate = linear(self.ffn, ("embed", "ffn"), name="gate")(x, sizes, index)
        up = linear(self.ffn, ("embed", "ffn"), name="up")(x, sizes, index)
        inner = ACTIVATIONS[self.activation](gate) * up
        return linear(self.width, ("ffn", "embed"), name="down")(inner, sizes, index)


class RaggedLinear(nn.Module):
    """`Linear` of several experts, kernel [E, d_in, d_out], on rows that lie expert by expert."""

    experts: int
    out: int
    axes: tuple[str, str]
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "M d_in"],
        sizes: Int[Array, "E"],
        index: Int[Array, "M"] | None = None,
    ) -> Float[Array, "M d_out"]:
        if self.has_variable("params", "kernel"):
            kernel: Any = self.get_variable("params", "kernel")
        else:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0,))
            init = declare(init, ("experts", *self.axes), 1)
            shape = (self.experts, x.shape[-1], self.out)
            kernel = self.param("kernel", init, shape, self.param_dtype)
        x = x.astype(self.dtype)
        y, kernel = multiply(x, kernel, sizes)
        if self.has_variable("lora", "kernel"):
            leaf = self.get_variable("lora", "kernel")
            key = self.make_rng("dropout") if self.has_rng("dropout") else None
            y = leaf.apply_ragged(x, kernel, y, sizes, index, key)
        # Not `kept`: on a mesh the rows of all devices come to those that hold an expert.
        return y
