"""What encoder-decoders share: sources are read once, then decoded from like a prefix."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ecomjax.models.attention import KeyValues, View
from ecomjax.models.cache import empty_cache
from ecomjax.models.decoder import Decoder, OfAll, OfLayer, view_of
from ecomjax.models.stack import run
from ecomjax.typing import KVCache


class Memory(flax.struct.PyTreeNode):
    """What decoders attend to of the sources: keys and values for each of their layers."""

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]
    segment_ids: Int[Array, "B S"]


def views_of(own: OfLayer, shared: OfAll) -> tuple[View, tuple[KeyValues, Bool[Array, "B T S"]]]:
    """What attention and cross-attention of one layer see."""
    view = view_of(own, shared)
    assert view.prefix is not None, "an encoder-decoder decodes from a memory"
    return view._replace(prefix=None), view.prefix


class MemoryDecoder(Decoder):
    """A decoder that has a `Memory` where others have a prefix.

    Its blocks have a second method for `stack` and `run`, `remember`.
    """

    embed: Any
    """The embedding that both sides share."""

    def __call__(self, tokens, positions, segment_ids, cache, memory, adapter_index):
        # What the forward reads of a prefix, a memory has.
        return self._forward(tokens, positions, segment_ids, cache, memory, adapter_index)[:2]

    def remember(
        self, x: Float[Array, "B S D"], adapter_index: Int[Array, "B"] | None = None
    ) -> KeyValues:
        """Keys and values [L, B, K, S, H] of an encoder's hidden states."""
        return run(self.layers, x, None, adapter_index, method="remember")[1]


class EncoderDecoder(nn.Module):
    """Sources to a memory (`remember`); slots and memory to hidden states, and on to logits.

    Called like a `Decoder`. A family sets up `embed`, `encoder`, `decoder` (a
    `MemoryDecoder`), and `lm_head` unless the embeddings are tied.
    """

    config: Any

    def remember(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "#B S"],
        segment_ids: Int[Array, "B S"],
        adapter_index: Int[Array, "B"] | None = None,
    ) -> Memory:
        """What the decoder sees of the sources.

        Args:
            tokens, segment_ids: see `ecomjax.typing.Batch`; a source has the segment id of
                its target.
            positions: likewise; one row where all rows have the same.
            adapter_index: see `__call__`.
        """
        x = self.encoder(tokens, positions, segment_ids, adapter_index)
        keys, values = self.decoder.remember(x, adapter_index)
        return Memory(keys, values, segment_ids)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: KVCache | None = None,
        memory: Memory | None = None,
        adapter_index: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Hidden states of target slots, and the cache with these T slots filled.

        A slot sees the target slots before it and all source slots, of its own segment.

        Args:
            memory: of the sources of the same rows; there is no decoding without.
            tokens, positions, segment_ids, cache, adapter_index: see `Decoder`.
        """
        return self.decoder(tokens, positions, segment_ids, cache, memory, adapter_index)

    def logits(
        self, hidden: Float[Array, "B T D"], adapter_index: Int[Array, "B"] | None = None
    ) -> Float[Array, "B T V"]:
        """Next-token logits in float32."""
        if self.config.tied_embeddings:
            return self.embed.attend(hidden, adapter_index).astype(jnp.float32)
        return self.lm_head(hidden, adapter_index).astype(jnp.float32)

    def everything(self, tokens, positions, segment_ids):
        """Logits of rows that are their own sources; touches every parameter."""
        memory = self.remember(tokens, positions, segment_ids)
        hidden, _ = self(tokens, positions, segment_ids, None, memory)
        return self.logits(hidden)

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache of `slots` target slots for `batch` rows."""
        c = self.config
        return empty_cache(c.layers, batch, slots, c.heads, c.head_dim, c.cache_dtype)
