"""BERT and its kin: encoders whose slots see their whole sequence.

Post-norm layers with biases over learned positions (Devlin et al. 2018, arXiv 1810.04805).
RoBERTa (Liu et al. 2019, arXiv 1907.11692) starts its positions later, DistilBERT (Sanh et
al. 2019, arXiv 1910.01108) has no token types, MiniLM (Wang et al. 2020, arXiv 2002.10957)
is a narrow BERT.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ecomjax.models.attention import Attention, View, make_bidirectional_mask
from ecomjax.models.config import ModelConfig
from ecomjax.models.layers import Embed, FeedForward, LayerNorm
from ecomjax.models.stack import run, stack


@dataclasses.dataclass(frozen=True)
class BertConfig(ModelConfig):
    """Shape of an encoder; letters as in `ecomjax.typing`."""

    model_type: Literal["bert", "roberta", "distilbert"] = dataclasses.field(
        default="bert", kw_only=True
    )
    """Which variant it is, as Hugging Face calls it."""
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
    max_positions: int = 512
    position_offset: int = 0
    """Row of the position table where positions start; RoBERTa's first rows are unused."""
    token_types: int = 2
    """Kinds of sequences in a pair that have embeddings; 0 where there are none."""
    norm_eps: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.0
    """Of embeddings and of what each half of a layer adds, where a "dropout" key is given."""

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Block(nn.Module):
    """norm(x + attention(x)), then norm(x + feed_forward(x))."""

    config: BertConfig

    @nn.compact
    def __call__(self, x, of_layer, view, adapter_index):
        del of_layer
        c = self.config
        attention = Attention(
            c.heads,
            c.heads,
            c.head_dim,
            c.width,
            qkv_bias=True,
            out_bias=True,
            name="attn",
            **c.types,
        )
        feed_forward = FeedForward(
            c.width, c.ffn, c.activation, gated=False, use_bias=True, name="mlp", **c.types
        )
        dropout = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        out, _ = attention(x, view, None, adapter_index)
        x = LayerNorm(c.norm_eps, name="attn_norm", **c.types)(x + dropout(out))
        out = feed_forward(x, adapter_index)
        return LayerNorm(c.norm_eps, name="mlp_norm", **c.types)(x + dropout(out)), None


class Bert(nn.Module):
    """Tokens to hidden states."""

    config: BertConfig

    def setup(self):
        c = self.config
        rows = c.position_offset + c.max_positions
        self.embed = Embed(c.vocab_size, c.width, **c.types)
        self.position_embed = Embed(rows, c.width, "positions", **c.types)
        if c.token_types:
            self.type_embed = Embed(c.token_types, c.width, "types", **c.types)
        self.embed_norm = LayerNorm(c.norm_eps, **c.types)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = stack(Block, c, c.layers, {"__call__": 2})

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        token_types: Int[Array, "B T"] | None = None,
        adapter_index: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the last layer.

        Args:
            tokens, positions, segment_ids: see `ecomjax.typing.Batch`; a row of an encoder
                has no shared prefix. Positions count from 0, below `config.max_positions`.
            token_types: 0 in the first sequence of a pair, 1 in the second; 0 unless given.
                A model of one type or none takes all sequences alike.
            adapter_index: which of several adapters each row uses, where the "lora"
                collection holds several.
        """
        c = self.config
        x = self.embed(tokens, adapter_index) + self.position_embed(positions + c.position_offset)
        if c.token_types:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x += self.type_embed(jnp.minimum(types, c.token_types - 1))
        view = View(make_bidirectional_mask(segment_ids))
        x = self.dropout(self.embed_norm(x), deterministic=not self.has_rng("dropout"))
        x, _ = run(self.layers, x, None, view, adapter_index)
        return x

    def everything(self, tokens, positions, segment_ids):
        """Hidden states; touches every parameter, for initialisation."""
        return self(tokens, positions, segment_ids)
