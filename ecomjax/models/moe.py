"""Mixture-of-experts feed-forward with top-k routing.

Mixtral (Jiang et al. 2024, arXiv 2401.04088, section 2.1).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ecomjax.models.layers import ACTIVATIONS, FeedForward, Linear, declare, multiply

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
        if self.dispatch == "dense":
            out = self._dense(x, jnp.einsum("BTkE,BTk->EBT", is_chosen, weights), adapter_index)
        else:
            out = self._ragged(x, chosen, weights, adapter_index)
        return out.astype(self.dtype), routing

    def _dense(self, x, weights, adapter_index):
        """Weights are [E, B, T], zero where an expert is not chosen."""
        vmap: Any = nn.vmap
        every = vmap(
            FeedForward,
            in_axes=(None, None),
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            axis_size=self.experts,
            metadata_params={nn.PARTITION_NAME: "experts"},
        )
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        made = every(self.width, self.ffn, self.activation, name="experts", **types)
        out = made(x, adapter_index).astype(jnp.float32)
        return jnp.einsum("EBTD,EBT->BTD", out, weights)

    def _ragged(self, x, chosen, weights, adapter_index):
        """Chosen experts and their weights are [B, T, k]."""
        expert, own = chosen.reshape(-1), None
        if adapter_index is None:
            order = jnp.argsort(expert)
        else:
            own = jnp.repeat(adapter_index, chosen[0].size)
            order = jnp.lexsort((own, expert))
            own = own[order]
        made = RaggedFeedForward(
            self.width,
            self.ffn,
            self.experts,
            self.activation,
            self.dtype,
            self.param_dtype,
            name="experts",
        )
        rows = x.reshape(-1, x.shape[-1])[order // self.experts_per_token]
        out = made(rows, jnp.bincount(expert, length=self.experts), own)
        out = out[jnp.argsort(order)].reshape(*chosen.shape, -1).astype(jnp.float32)
        return jnp.einsum("BTkD,BTk->BTD", out, weights)


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
        return y
