"""GPT-2: learned positions, pre-norm layers with biases, one kernel for q, k and v.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn

from ecomjax.models.attention import Attention
from ecomjax.models.config import ModelConfig
from ecomjax.models.decoder import Decoder, view_of
from ecomjax.models.layers import Embed, FeedForward, LayerNorm, Linear
from ecomjax.models.stack import stack


@dataclasses.dataclass(frozen=True)
class GPT2Config(ModelConfig):
    """Shape of a GPT-2; letters as in `ecomjax.typing`."""

    vocab_size: int
    """V"""
    width: int
    """D"""
    layers: int
    """L"""
    heads: int
    """N, of width D / N"""
    ffn: int
    """F"""
    max_positions: int = 1024
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    tied_embeddings: bool = True

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    config: GPT2Config

    @nn.compact
    def __call__(self, carry, of_layer, shared, adapter_index):
        c = self.config
        x, cache = carry
        norm = partial(LayerNorm, c.norm_eps, **c.types)
        attention = Attention(
            c.heads,
            c.heads,
            c.head_dim,
            c.width,
            qkv_bias=True,
            out_bias=True,
            joint=True,
            name="attn",
            **c.types,
        )
        feed_forward = FeedForward(
            c.width, c.ffn, c.activation, gated=False, use_bias=True, name="mlp", **c.types
        )
        view = view_of(of_layer, shared)
        out, cache = attention(norm(name="attn_norm")(x), view, cache, adapter_index)
        x = x + out
        x = x + feed_forward(norm(name="mlp_norm")(x), adapter_index)
        return (x, cache), None


class GPT2(Decoder):
    """See `models.decoder.Decoder`."""

    def setup(self):
        c = self.config
        self.embed = Embed(c.vocab_size, c.width, **c.types)
        self.position_embed = Embed(c.max_positions, c.width, "positions", **c.types)
        self.layers = stack(Block, c, c.layers, {"__call__": 2})
        self.final_norm = LayerNorm(c.norm_eps, **c.types)
        if not c.tied_embeddings:
            self.lm_head = Linear((c.vocab_size,), ("embed", "vocab"), **c.types)

    def embed_slots(self, tokens, positions, adapter_index=None):
        return self.embed(tokens, adapter_index) + self.position_embed(positions)
