"""BART: post-norm layers with biases over learned positions (Lewis et al. 2019,
arXiv 1910.13461). Its encoder has the layers of BERT."""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from ecomjax.models import bert
from ecomjax.models.attention import Attention, CrossAttention, View, make_bidirectional_mask
from ecomjax.models.config import ModelConfig
from ecomjax.models.encoder_decoder import EncoderDecoder, MemoryDecoder, views_of
from ecomjax.models.layers import Embed, FeedForward, LayerNorm, declare
from ecomjax.models.stack import run, stack

POSITION_OFFSET = 2
"""Row of the position tables where positions start; the first ones are unused."""
NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class BartConfig(ModelConfig):
    """Shape of a BART; letters as in `ecomjax.typing`, those of the decoder."""

    vocab_size: int
    """V"""
    width: int
    """D"""
    encoder_layers: int
    layers: int
    """L"""
    encoder_heads: int
    heads: int
    """N, of width D / N"""
    encoder_ffn: int
    ffn: int
    """F"""
    max_positions: int = 1024
    activation: str = "gelu"
    scaled_embeddings: bool = False
    """Whether embeddings are multiplied by sqrt(D)."""
    start: tuple[int, ...] = (2,)
    """Tokens that targets open with."""

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def tied_embeddings(self) -> bool:
        return True

    @property
    def encoder(self) -> bert.BertConfig:
        """Shape of the encoder's layers."""
        return bert.BertConfig(
            vocab_size=self.vocab_size,
            width=self.width,
            layers=self.encoder_layers,
            heads=self.encoder_heads,
            ffn=self.encoder_ffn,
            norm_eps=NORM_EPS,
            activation=self.activation,
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(ModelConfig)},
        )


class Inputs(nn.Module):
    """What enters the first layer: norm(embedding + position)."""

    config: BartConfig
    embed: nn.Module

    def setup(self):
        c = self.config
        rows = c.max_positions + POSITION_OFFSET
        self.position_embed = Embed(rows, c.width, "positions", **c.types)
        self.embed_norm = LayerNorm(NORM_EPS, **c.types)

    def __call__(self, tokens, positions, adapter_index=None):
        x = self.embed(tokens, adapter_index)
        if self.config.scaled_embeddings:
            x *= jnp.asarray(self.config.width**0.5, x.dtype)
        return self.embed_norm(x + self.position_embed(positions + POSITION_OFFSET))


class DecoderBlock(nn.Module):
    """norm(x + attention(x)), norm(x + cross_attention(x)), then norm(x + feed_forward(x))."""

    config: BartConfig

    def setup(self):
        c = self.config
        norm = partial(LayerNorm, NORM_EPS, **c.types)
        self.attn_norm, self.cross_norm, self.mlp_norm = norm(), norm(), norm()
        self.attn = Attention(
            c.heads, c.heads, c.head_dim, c.width, qkv_bias=True, out_bias=True, **c.types
        )
        self.cross = CrossAttention(c.heads, c.head_dim, c.width, use_bias=True, **c.types)
        self.mlp = FeedForward(c.width, c.ffn, c.activation, False, True, **c.types)

    def __call__(self, carry, of_layer, shared, adapter_index):
        x, cache = carry
        own, sources = views_of(of_layer, shared)
        out, cache = self.attn(x, own, cache, adapter_index)
        x = self.attn_norm(x + out)
        x = self.cross_norm(x + self.cross(x, sources, adapter_index))
        x = self.mlp_norm(x + self.mlp(x, adapter_index))
        return (x, cache), None

    def remember(self, x, of_layer, adapter_index):
        del of_layer
        return x, self.cross.remember(x, adapter_index)


class BartEncoder(nn.Module):
    """Tokens [B, S] to hidden states [B, S, D]."""

    config: BartConfig
    embed: nn.Module

    def setup(self):
        c = self.config
        self.inputs = Inputs(c, self.embed)
        self.layers = stack(bert.Block, c.encoder, c.encoder_layers, {"__call__": 2})

    def __call__(self, tokens, positions, segment_ids, adapter_index=None):
        view = View(make_bidirectional_mask(segment_ids))
        x = self.inputs(tokens, positions, adapter_index)
        x, _ = run(self.layers, x, None, view, adapter_index)
        return x


class BartDecoder(MemoryDecoder):
    """See `MemoryDecoder`."""

    def setup(self):
        c = self.config
        self.inputs = Inputs(c, self.embed)
        self.layers = stack(DecoderBlock, c, c.layers, {"__call__": 2, "remember": 1})

    def embed_slots(self, tokens, positions, adapter_index=None):
        return self.inputs(tokens, positions, adapter_index)

    def final_norm(self, x):
        """None: each layer ends in its own."""
        return x


class Bart(EncoderDecoder):
    """See `EncoderDecoder`."""

    def setup(self):
        c = self.config
        self.embed = Embed(c.vocab_size, c.width, **c.types)
        self.encoder = BartEncoder(c, self.embed)
        self.decoder = BartDecoder(c, self.embed)
        init = declare(nn.initializers.zeros, ("vocab",))
        self.logits_bias = self.param(
            "logits_bias", init, (c.vocab_size,), jnp.dtype(c.param_dtype)
        )

    def logits(self, hidden, adapter_index=None):
        bias = jnp.asarray(self.logits_bias, jnp.float32)
        return super().logits(hidden, adapter_index) + bias[None, None]
