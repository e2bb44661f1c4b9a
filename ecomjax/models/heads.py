"""What is read off an encoder: classes of sequences, classes of tokens, sentence vectors."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ecomjax.models.bert import Bert, BertConfig
from ecomjax.models.layers import Linear
from ecomjax.typing import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(BertConfig):
    """An encoder with a head."""

    labels: tuple[str, ...]
    """Names of the classes, in the order of the logits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceClassifierConfig(ClassifierConfig):
    """Of a `SequenceClassifier`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenClassifierConfig(ClassifierConfig):
    """Of a `TokenClassifier`."""


class SequenceHead(nn.Module):
    """out(tanh(dense(x))): BERT's pooler or RoBERTa's head; DistilBERT has relu for tanh."""

    config: ClassifierConfig

    @nn.compact
    def __call__(self, x, adapter_index):
        c = self.config
        given = {"use_bias": True, **c.types}
        act = jax.nn.relu if c.model_type == "distilbert" else jnp.tanh
        x = act(Linear((c.width,), ("embed", "ffn"), name="dense", **given)(x, adapter_index))
        out = Linear((len(c.labels),), ("ffn", "classes"), name="out", **given)
        return out(x, adapter_index).astype(jnp.float32)


class TokenHead(nn.Module):
    """out(x)."""

    config: ClassifierConfig

    @nn.compact
    def __call__(self, x, adapter_index):
        c = self.config
        axes = ("embed", "classes")
        out = Linear((len(c.labels),), axes, use_bias=True, name="out", **c.types)
        return out(x, adapter_index).astype(jnp.float32)


class SequenceClassifier(nn.Module):
    """Classes of sequences, or of pairs, read off the first token of each."""

    config: SequenceClassifierConfig

    def setup(self):
        self.encoder = Bert(self.config)
        self.head = SequenceHead(self.config)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        at: Int[Array, "B M"],
        token_types: Int[Array, "B T"] | None = None,
        adapter_index: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B M C"]:
        """Logits in float32, M sequences a row and C classes.

        Args:
            at: slots where the sequences of each row start. A row that holds fewer than M
                repeats any slot, and gives those logits no weight.
            tokens, positions, segment_ids, token_types, adapter_index: see `Bert`.
        """
        hidden = self.encoder(tokens, positions, segment_ids, token_types, adapter_index)
        first = jnp.take_along_axis(hidden, at[..., None], axis=1)
        return self.classify(first, adapter_index)

    def classify(
        self, hidden: Float[Array, "B M D"], adapter_index: Int[Array, "B"] | None = None
    ) -> Float[Array, "B M C"]:
        """Logits from the hidden states of first tokens."""
        return self.head(hidden, adapter_index)

    def of_slots(self, tokens, positions, segment_ids, token_types=None, adapter_index=None):
        """Logits [B, T, C] as if a sequence started at every slot: where classes stand in rows
        of any number of sequences, the others are given no weight."""
        hidden = self.encoder(tokens, positions, segment_ids, token_types, adapter_index)
        return self.classify(hidden, adapter_index)

    def everything(self, tokens, positions, segment_ids):
        """Logits of each row's first slot; touches every parameter, for initialisation."""
        return self(tokens, positions, segment_ids, jnp.zeros_like(tokens[:, :1]))


class TokenClassifier(nn.Module):
    """Classes of tokens.

    Logits stand at every slot. Where words are labelled, whoever makes the batch puts a
    word's label at its first sub-token and gives the other slots no weight.
    """

    config: TokenClassifierConfig

    def setup(self):
        self.encoder = Bert(self.config)
        self.head = TokenHead(self.config)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        token_types: Int[Array, "B T"] | None = None,
        adapter_index: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T C"]:
        """Logits in float32, C classes; arguments as for `Bert`."""
        hidden = self.encoder(tokens, positions, segment_ids, token_types, adapter_index)
        return self.classify(hidden, adapter_index)

    def classify(
        self, hidden: Float[Array, "B T D"], adapter_index: Int[Array, "B"] | None = None
    ) -> Float[Array, "B T C"]:
        """Logits from hidden states."""
        return self.head(hidden, adapter_index)

    def of_slots(self, tokens, positions, segment_ids, token_types=None, adapter_index=None):
        """What calling it returns; see `SequenceClassifier`."""
        return self(tokens, positions, segment_ids, token_types, adapter_index)

    def everything(self, tokens, positions, segment_ids):
        """Logits; touches every parameter, for initialisation."""
        return self(tokens, positions, segment_ids)


def with_new_head(
    model: SequenceClassifier | TokenClassifier, encoder: Params, key: jax.Array
) -> Params:
    """Parameters of a classifier over a trained encoder: the head alone is drawn.

    Args:
        model: the classifier.
        encoder: parameters of its encoder, as loaded from a checkpoint without a head.
        key: PRNG key.
    """
    hidden = jnp.zeros((1, 1, model.config.width), model.config.compute_dtype)
    return {"encoder": encoder} | nn.unbox(model.init(key, hidden, method="classify")["params"])


def mean_pool(
    hidden: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"],
    segments: int = 1,
    normalize: bool = False,
) -> Float[Array, "B {segments} D"]:
    """Mean hidden state of each sequence, in float32: its sentence vector
    (Reimers & Gurevych 2019, arXiv 1908.10084).

    Args:
        hidden: hidden states.
        segment_ids: which slots belong to which sequence.
        segments: sequences 1 to `segments` of each row are pooled; those that a row does
            not hold come out as zeros.
        normalize: divide each vector by its length.
    """
    wanted = jnp.arange(1, segments + 1, dtype=segment_ids.dtype)
    member = (segment_ids[:, None, :] == wanted[None, :, None]).astype(jnp.float32)
    total = jnp.einsum("BMT,BTD->BMD", member, hidden.astype(jnp.float32))
    mean = total / jnp.maximum(member.sum(axis=-1, keepdims=True), 1.0)
    if not normalize:
        return mean
    square = jnp.square(mean).sum(axis=-1, keepdims=True)
    return mean * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
