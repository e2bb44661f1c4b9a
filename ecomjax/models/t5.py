"""T5 and FLAN-T5: pre-norm layers whose only positions are a bias of the attention scores.

Source: Raffel et al. 2019, arXiv 1910.10683. Version 1.1, which FLAN-T5 tunes, gates its
feed-forward and has a head of its own.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ecomjax.models.attention import Attention, CrossAttention, View, make_bidirectional_mask
from ecomjax.models.config import ModelConfig
from ecomjax.models.encoder_decoder import EncoderDecoder, MemoryDecoder, views_of
from ecomjax.models.layers import Embed, FeedForward, Linear, RMSNorm, declare
from ecomjax.models.stack import run, stack


@dataclasses.dataclass(frozen=True)
class T5Config(ModelConfig):
    """Shape of a T5; letters as in `ecomjax.typing`."""

    vocab_size: int
    """V"""
    width: int
    """D"""
    encoder_layers: int
    layers: int
    """L, of the decoder"""
    heads: int
    """N"""
    head_dim: int
    """H"""
    ffn: int
    """F"""
    buckets: int = 32
    """Of distances, half of them for each side in the encoder."""
    max_distance: int = 128
    """Distances from here on are one bucket."""
    norm_eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    tied_embeddings: bool = True
    """Whether the embedding, divided by sqrt(D), is the head."""
    start: tuple[int, ...] = (0,)
    """Tokens that targets open with."""


def distance_buckets(buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """Bucket of each distance from query to key, -max_distance to max_distance [2 max + 1].

    Small distances have buckets of their own; later ones grow with the distance, up to the
    last. Keys behind the query are the first half of the buckets in an encoder, and all in
    a decoder, whose keys ahead are masked. The logarithm is rounded as in transformers,
    hence float32.
    """
    distances = np.arange(-max_distance, max_distance + 1)
    offset, size = 0, np.maximum(-distances, 0)
    if bidirectional:
        buckets //= 2
        offset, size = buckets * (distances > 0), np.abs(distances)
    exact = buckets // 2
    ratio = np.maximum(size, exact).astype(np.float32) / np.float32(exact)
    grown = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    large = np.minimum(exact + grown.astype(np.int32), buckets - 1)
    return (offset + np.where(size < exact, size, large)).astype(np.int32)


class RelativeBias(nn.Module):
    """What is added to the scores of each head, by the bucket of the distance."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(
        self, positions: Int[Array, "B T"], key_positions: Int[Array, "B S"]
    ) -> Float[Array, "B N T S"]:
        c = self.config
        init = declare(nn.initializers.normal(c.width**-0.5), ("positions", "heads"))
        table = self.param("embedding", init, (c.buckets, c.heads), jnp.dtype(c.param_dtype))
        buckets = distance_buckets(c.buckets, c.max_distance, self.bidirectional)
        by_distance = jnp.asarray(table)[buckets].T
        distance = key_positions[:, None, :] - positions[:, :, None]
        index = jnp.clip(distance, -c.max_distance, c.max_distance) + c.max_distance
        return by_distance[:, index].swapaxes(0, 1)


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); scores are not scaled."""

    config: T5Config

    def setup(self):
        c = self.config
        norm = partial(RMSNorm, c.norm_eps, **c.types)
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.attn = Attention(c.heads, c.heads, c.head_dim, c.width, scale=1.0, **c.types)
        self.mlp = FeedForward(c.width, c.ffn, c.activation, c.gated, **c.types)

    def __call__(self, x, of_layer, view, adapter_index):
        del of_layer
        out, _ = self.attn(self.attn_norm(x), view, None, adapter_index)
        x = x + out
        return x + self.mlp(self.mlp_norm(x), adapter_index), None


class DecoderBlock(EncoderBlock):
    """The same with x + cross_attention(norm(x)) in between."""

    def setup(self):
        super().setup()
        c = self.config
        self.cross_norm = RMSNorm(c.norm_eps, **c.types)
        self.cross = CrossAttention(c.heads, c.head_dim, c.width, scale=1.0, **c.types)

    def __call__(self, carry, of_layer, shared, adapter_index):
        x, cache = carry
        own, sources = views_of(of_layer, shared)
        out, cache = self.attn(self.attn_norm(x), own, cache, adapter_index)
        x = x + out
        x = x + self.cross(self.cross_norm(x), sources, adapter_index)
        x = x + self.mlp(self.mlp_norm(x), adapter_index)
        return (x, cache), None

    def remember(self, x, of_layer, adapter_index):
        del of_layer
        return x, self.cross.remember(x, adapter_index)


class T5Encoder(nn.Module):
    """Tokens [B, S] to hidden states [B, S, D]."""

    config: T5Config
    embed: nn.Module

    def setup(self):
        c = self.config
        self.relative_bias = RelativeBias(c, bidirectional=True)
        self.layers = stack(EncoderBlock, c, c.encoder_layers, {"__call__": 2})
        self.final_norm = RMSNorm(c.norm_eps, **c.types)

    def __call__(self, tokens, positions, segment_ids, adapter_index=None):
        bias = self.relative_bias(positions, positions)
        view = View(make_bidirectional_mask(segment_ids), bias=bias)
        x, _ = run(self.layers, self.embed(tokens, adapter_index), None, view, adapter_index)
        return self.final_norm(x)


class T5Decoder(MemoryDecoder):
    """See `MemoryDecoder`."""

    def setup(self):
        c = self.config
        self.relative_bias = RelativeBias(c, bidirectional=False)
        self.layers = stack(DecoderBlock, c, c.layers, {"__call__": 2, "remember": 1})
        self.final_norm = RMSNorm(c.norm_eps, **c.types)

    def bias(self, positions, key_positions):
        return self.relative_bias(positions, key_positions)


class T5(EncoderDecoder):
    """See `EncoderDecoder`."""

    def setup(self):
        c = self.config
        self.embed = Embed(c.vocab_size, c.width, **c.types)
        self.encoder = T5Encoder(c, self.embed)
        self.decoder = T5Decoder(c, self.embed)
        if not c.tied_embeddings:
            self.lm_head = Linear((c.vocab_size,), ("embed", "vocab"), **c.types)

    def logits(self, hidden, adapter_index=None):
        if self.config.tied_embeddings:
            hidden = hidden * jnp.asarray(self.config.width**-0.5, hidden.dtype)
        return super().logits(hidden, adapter_index)
