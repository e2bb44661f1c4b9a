"""The Llama family: Llama, Mistral, Mixtral, Qwen, SmolLM, Gemma and what shares their block.

Pre-norm decoder layers of grouped-query attention with rotary positions and a gated
feed-forward (Touvron et al. 2023, arXiv 2307.09288).
"""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ecomjax.models.attention import Attention
from ecomjax.models.config import ModelConfig
from ecomjax.models.decoder import Decoder, OfLayer, view_of
from ecomjax.models.layers import Embed, FeedForward, Linear, RMSNorm
from ecomjax.models.moe import Dispatch, MoE
from ecomjax.models.rope import RopeScaling, inverse_frequencies
from ecomjax.models.stack import stack


@dataclasses.dataclass(frozen=True)
class LlamaConfig(ModelConfig):
    """Shape of a Llama; letters as in `ecomjax.typing`."""

    model_type: str = dataclasses.field(default="llama", kw_only=True)
    """Which variant it is, as Hugging Face calls it; what it means the other fields say."""
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
    rope_scaling: RopeScaling | None = None
    unrotated_layers: tuple[int, ...] = ()
    """Layers without positions (NoPE; SmolLM3)."""
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    max_positions: int = 2048
    activation: str = "silu"
    qkv_bias: bool = False
    """Biases of queries, keys and values (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm of each head's query and key (Qwen3, Gemma 3)."""
    sliding_window: int = 0
    """Positions that the sliding layers see, their own included; 0 where none slides."""
    sliding_layers: tuple[int, ...] = ()
    sliding_theta: float = 0.0
    """Base of the rotation of the sliding layers, unscaled, where it differs (Gemma 3)."""
    norm_offset: float = 0.0
    """1 where the norms' scales are stored as their distance from one (Gemma)."""
    post_norms: bool = False
    """Whether attention and feed-forward pass a norm on their way out too (Gemma)."""
    scaled_embeddings: bool = False
    """Whether embeddings are multiplied by sqrt(D) (Gemma)."""
    attention_scalar: float = 0.0
    """Scores are divided by its square root; 0 stands for H."""
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    """c tanh(x / c) over attention scores and logits (Gemma 2)."""
    experts: int = 0
    """E; 0 where the feed-forward is a single one (Mixtral has more)."""
    experts_per_token: int = 0
    """How many of the experts each token passes."""
    dispatch: Dispatch = "ragged"
    """How tokens get to experts: see `models.moe.MoE`."""
    balance_coefficient: float = 0.0
    """Of the load-balance loss, added in training."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, carry, of_layer, shared, adapter_index):
        c = self.config
        x, cache = carry
        norm = partial(RMSNorm, c.norm_eps, c.norm_offset, **c.types)
        attention = Attention(
            c.heads,
            c.kv_heads,
            c.head_dim,
            c.width,
            qkv_bias=c.qkv_bias,
            normed=partial(_head_norm, c) if c.qk_norm else None,
            scale=(c.attention_scalar or c.head_dim) ** -0.5,
            softcap=c.attention_softcap,
            name="attn",
            **c.types,
        )
        view = view_of(of_layer, shared)
        out, cache = attention(norm(name="attn_norm")(x), view, cache, adapter_index)
        x = x + (norm(name="attn_post_norm")(out) if c.post_norms else out)
        normed, routing = norm(name="mlp_norm")(x), None
        if c.experts:
            moe = MoE(
                c.width,
                c.ffn,
                c.experts,
                c.experts_per_token,
                c.activation,
                c.dispatch,
                name="mlp",
                **c.types,
            )
            out, routing = moe(normed, shared.live, adapter_index)
        else:
            feed_forward = FeedForward(c.width, c.ffn, c.activation, name="mlp", **c.types)
            out = feed_forward(normed, adapter_index)
        x = x + (norm(name="mlp_post_norm")(out) if c.post_norms else out)
        return (x, cache), routing


def _head_norm(c: LlamaConfig, name: str) -> RMSNorm:
    return RMSNorm(c.norm_eps, c.norm_offset, "head_dim", name=name, **c.types)


class Llama(Decoder):
    """See `models.decoder.Decoder`."""

    def setup(self):
        c = self.config
        self.embed = Embed(c.vocab_size, c.width, **c.types)
        self.layers = stack(Block, c, c.layers, {"__call__": 2})
        self.final_norm = RMSNorm(c.norm_eps, c.norm_offset, **c.types)
        if not c.tied_embeddings:
            self.lm_head = Linear((c.vocab_size,), ("embed", "vocab"), **c.types)

    def embed_slots(self, tokens, positions, adapter_index=None):
        x = super().embed_slots(tokens, positions, adapter_index)
        if self.config.scaled_embeddings:
            x *= jnp.asarray(self.config.width**0.5, x.dtype)
        return x

    def frequencies(self) -> Float[np.ndarray, "L half"]:
        c = self.config
        inverse = np.stack(
            [inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)] * c.layers
        )
        if c.sliding_theta:
            inverse[list(c.sliding_layers)] = inverse_frequencies(c.head_dim, c.sliding_theta)
        inverse[list(c.unrotated_layers)] = 0.0
        return inverse

    def of_layers(self) -> OfLayer:
        c, of_layers = self.config, super().of_layers()
        if not c.sliding_layers:
            return of_layers
        window = np.full(c.layers, np.iinfo(np.int32).max, np.int32)
        window[list(c.sliding_layers)] = c.sliding_window
        return of_layers._replace(window=jnp.asarray(window))

    def logits(self, hidden, adapter_index=None, tokens=None):
        logits, cap = super().logits(hidden, adapter_index, tokens), self.config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits
