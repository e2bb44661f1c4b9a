"""The Llama family: Llama, SmolLM2 and whatever shares their block.

Pre-norm decoder layers of grouped-query attention with rotary positions and a SwiGLU
feed-forward (Touvron et al. 2023, arXiv 2307.09288).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ecomjax.models.attention import (
    Attention,
    KeyValues,
    StackedCache,
    empty_cache,
    make_mask,
    related,
)
from ecomjax.models.layers import Embed, Linear, RMSNorm
from ecomjax.typing import KVCache


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape and numerics of a Llama; letters as in `ecomjax.typing`."""

    vocab_size: int
    """V"""
    width: int
    """D"""
    layers: int
    """L"""
    heads: int
    """N"""
    kv_heads: int
    """K"""
    head_dim: int
    """H"""
    ffn: int
    """F"""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    max_positions: int = 2048
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    scan: bool = True
    """Scan over stacked layers (compiles once) or, for debugging, unroll named ones."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, everything."""

    @property
    def types(self) -> dict[str, Any]:
        return {
            "dtype": jnp.dtype(self.compute_dtype),
            "param_dtype": jnp.dtype(self.param_dtype),
        }


REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202, equation 6)."""

    width: int
    ffn: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], adapter_index: Int[Array, "B"] | None
    ) -> Float[Array, "B T D"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = Linear((self.ffn,), ("embed", "ffn"), name="gate", **types)(x, adapter_index)
        up = Linear((self.ffn,), ("embed", "ffn"), name="up", **types)(x, adapter_index)
        down = Linear((self.width,), ("ffn", "embed"), name="down", **types)
        return down(jax.nn.silu(gate) * up, adapter_index)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    The signature is that of a scanned body: what is carried from layer to layer, what
    differs by layer, and what all layers share.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, carry, of_layer, positions, masks, first_slot, adapter_index):
        c = self.config
        x, cache = carry
        layer, prefix = of_layer
        mask, prefix_mask = masks
        attention = Attention(
            c.heads, c.kv_heads, c.head_dim, c.width, c.rope_theta, name="attn", **c.types
        )
        out, cache = attention(
            RMSNorm(c.norm_eps, name="attn_norm", **c.types)(x),
            positions,
            mask,
            None if prefix is None else (prefix, prefix_mask),
            cache,
            layer,
            first_slot,
            adapter_index,
        )
        x = x + out
        normed = RMSNorm(c.norm_eps, name="mlp_norm", **c.types)(x)
        x = x + SwiGLU(c.width, c.ffn, name="mlp", **c.types)(normed, adapter_index)
        return (x, cache), None


class Llama(nn.Module):
    """Tokens to hidden states (`__call__`) and hidden states to logits (`logits`).

    The two are apart so that the head is applied only where somebody reads the logits.
    """

    config: LlamaConfig

    def setup(self):
        c = self.config
        self.embed = Embed(c.vocab_size, c.width, **c.types)
        self.final_norm = RMSNorm(c.norm_eps, **c.types)
        if not c.tied_embeddings:
            self.lm_head = Linear((c.vocab_size,), ("embed", "vocab"), **c.types)
        block: Any = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan)
        if c.scan:
            scan: Any = nn.scan  # its annotation of in_axes leaves out tuples
            self.layers = scan(
                block,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
                length=c.layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c)
        else:
            self.layer = [block(c) for _ in range(c.layers)]

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: KVCache | None = None,
        prefix: KVCache | None = None,
        adapter_index: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Hidden states after the last norm, and the cache with these T slots filled.

        Args:
            tokens, positions, segment_ids: see `ecomjax.typing.Batch`.
            cache: of the same rows; the T slots are written behind those it holds.
            prefix: a filled cache of one row, read by all rows as if it stood before them.
            adapter_index: which of several adapters each row uses, where the "lora"
                collection holds several.
        """
        first_slot = jnp.zeros((), jnp.int32)
        start = (first_slot, first_slot)
        key_segments, stacked = segment_ids, None
        if cache is not None:
            first_slot = cache.length
            start = (start[0], first_slot)
            key_segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, start)
            stacked = StackedCache(cache.keys, cache.values)
        mask = make_mask(segment_ids, key_segments, first_slot)
        layers = jnp.arange(self.config.layers, dtype=jnp.int32)
        of_layers, prefix_mask = (layers, None), None
        if prefix is not None:
            of_layers = (layers, KeyValues(prefix.keys, prefix.values))
            prefix_mask = related(segment_ids, prefix.segment_ids)
        x, stacked = self._run_layers(
            (self.embed(tokens), stacked),
            of_layers,
            positions,
            (mask, prefix_mask),
            first_slot,
            adapter_index,
        )
        if cache is not None:
            cache = KVCache(
                keys=stacked.keys,
                values=stacked.values,
                positions=jax.lax.dynamic_update_slice(cache.positions, positions, start),
                segment_ids=key_segments,
                length=first_slot + tokens.shape[1],
            )
        return self.final_norm(x), cache

    def _run_layers(self, carry, of_layers, *shared) -> Any:
        if self.config.scan:
            return self.layers(carry, of_layers, *shared)[0]
        for i, layer in enumerate(self.layer):
            carry, _ = layer(carry, jax.tree.map(lambda x, i=i: x[i], of_layers), *shared)
        return carry

    def logits(
        self, hidden: Float[Array, "B T D"], adapter_index: Int[Array, "B"] | None = None
    ) -> Float[Array, "B T V"]:
        """Next-token logits in float32."""
        if self.config.tied_embeddings:
            return self.embed.attend(hidden).astype(jnp.float32)
        return self.lm_head(hidden, adapter_index).astype(jnp.float32)

    def everything(self, tokens, positions, segment_ids):
        """Hidden states and logits; touches every parameter, for initialisation."""
        hidden, _ = self(tokens, positions, segment_ids)
        return self.logits(hidden)

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache of `slots` slots for `batch` rows."""
        c = self.config
        return empty_cache(
            c.layers, batch, slots, c.kv_heads, c.head_dim, jnp.dtype(c.compute_dtype)
        )
