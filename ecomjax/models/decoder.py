"""What all decoder-only models share: slots to hidden states, with a cache; hidden to logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ecomjax.models.attention import KeyValues, View, make_mask, related
from ecomjax.models.cache import StackedCache, empty_cache
from ecomjax.models.moe import Balance, balance
from ecomjax.models.rope import Rotation, rotations
from ecomjax.models.stack import run
from ecomjax.typing import PADDING_SEGMENT, KVCache


class OfLayer(NamedTuple):
    """What differs by layer; stacked over L before the layers run."""

    layer: Int[Array, ""]
    prefix: KeyValues | None = None
    rotation: Int[Array, ""] | None = None
    """Which of several."""
    window: Int[Array, ""] | None = None
    """How many positions a slot sees, its own included."""


class OfAll(NamedTuple):
    """What all layers share."""

    live: Bool[Array, "B T"]
    """False in padding slots."""
    mask: Bool[Array, "B T S"]
    prefix_mask: Bool[Array, "B T P"] | None
    first_slot: Int[Array, ""]
    distance: Int[Array, "B T S"] | None = None
    """Positions from key to query, where some layer has a window."""
    prefix_distance: Int[Array, "B T P"] | None = None
    bias: Float[Array, "#B N T S"] | None = None
    rotations: Rotation | None = None
    """Of all kinds, stacked along the first axis."""


def view_of(own: OfLayer, shared: OfAll) -> View:
    """What the attention of one layer sees."""

    def inside_window(mask, distance):
        return mask if own.window is None else mask & (distance < own.window)

    prefix: Any = None
    if own.prefix is not None:
        prefix = (own.prefix, inside_window(shared.prefix_mask, shared.prefix_distance))
    kind = 0 if own.rotation is None else own.rotation
    return View(
        inside_window(shared.mask, shared.distance),
        rotation=jax.tree.map(lambda kinds: kinds[kind], shared.rotations),
        bias=shared.bias,
        prefix=prefix,
        layer=own.layer,
        first_slot=shared.first_slot,
    )


class Decoder(nn.Module):
    """Tokens to hidden states (`__call__`) and hidden states to logits (`logits`).

    The two are apart so that the head is applied only where somebody reads the logits.
    A family sets up `embed`, `layers`, `final_norm`, and `lm_head` unless the embeddings
    are tied, and says what differs by layer.
    """

    config: Any

    def embed_slots(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        adapter_index: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What enters the first layer."""
        del positions
        return self.embed(tokens, adapter_index)

    def of_layers(self) -> OfLayer:
        """What differs by layer; a family adds to it."""
        return OfLayer(jnp.arange(self.config.layers, dtype=jnp.int32))

    def frequencies(self) -> Float[np.ndarray, "L half"] | None:
        """By which the features of each layer are rotated, inverse; a family may have them."""

    def bias(
        self, positions: Int[Array, "B T"], key_positions: Int[Array, "B S"]
    ) -> Float[Array, "B N T S"] | None:
        """What all layers add to the scores, by positions; a family may have it."""
        del positions, key_positions

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
        return self._forward(tokens, positions, segment_ids, cache, prefix, adapter_index)[:2]

    def with_balance(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        adapter_index: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Balance | None]:
        """Hidden states, and the load-balance loss of the experts, where there are any."""
        hidden, _, routing = self._forward(
            tokens, positions, segment_ids, None, None, adapter_index
        )
        return hidden, None if routing is None else balance(routing)

    def _forward(self, tokens, positions, segment_ids, cache, prefix, adapter_index):
        """(hidden states, cache, what the layers return, stacked)."""
        first_slot = jnp.zeros((), jnp.int32)
        key_segments, key_positions, stacked = segment_ids, positions, None
        if cache is not None:
            first_slot = cache.length
            start = (jnp.zeros((), jnp.int32), first_slot)
            key_segments, key_positions = (
                jax.lax.dynamic_update_slice(old, new, start)
                for old, new in (
                    (cache.segment_ids, segment_ids),
                    (cache.positions, positions),
                )
            )
            stacked = StackedCache(cache.keys, cache.values)
        own = self.of_layers()
        shared = OfAll(
            segment_ids != PADDING_SEGMENT,
            make_mask(segment_ids, key_segments, first_slot),
            None,
            first_slot,
            bias=self.bias(positions, key_positions),
        )
        if (inverse := self.frequencies()) is not None:
            kinds, kind = np.unique(inverse, axis=0, return_inverse=True)
            if len(kinds) > 1:
                own = own._replace(rotation=jnp.asarray(kind.reshape(-1), jnp.int32))
            shared = shared._replace(rotations=rotations(positions, kinds))
        if own.window is not None:
            shared = shared._replace(distance=_distance(positions, key_positions))
        if prefix is not None:
            own = own._replace(prefix=KeyValues(prefix.keys, prefix.values))
            shared = shared._replace(prefix_mask=related(segment_ids, prefix.segment_ids))
            if own.window is not None:
                shared = shared._replace(prefix_distance=_distance(positions, prefix.positions))
        carry = (self.embed_slots(tokens, positions, adapter_index), stacked)
        (x, stacked), outputs = run(self.layers, carry, own, shared, adapter_index)
        if cache is not None:
            cache = KVCache(
                keys=stacked.keys,
                values=stacked.values,
                positions=key_positions,
                segment_ids=key_segments,
                length=first_slot + tokens.shape[1],
            )
        return self.final_norm(x), cache, outputs

    def logits(
        self,
        hidden: Float[Array, "B T D"],
        adapter_index: Int[Array, "B"] | None = None,
        tokens: Int[Array, "U"] | None = None,
    ) -> Float[Array, "B T U"]:
        """Next-token logits in float32, of the whole vocabulary or of some tokens of it."""
        if self.config.tied_embeddings:
            return self.embed.attend(hidden, adapter_index, tokens).astype(jnp.float32)
        logits = self.lm_head(hidden, adapter_index).astype(jnp.float32)
        return logits if tokens is None else logits[..., tokens]

    def everything(self, tokens, positions, segment_ids):
        """Hidden states and logits; touches every parameter, for initialisation."""
        hidden, _ = self(tokens, positions, segment_ids)
        return self.logits(hidden)

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache of `slots` slots for `batch` rows."""
        c = self.config
        return empty_cache(c.layers, batch, slots, c.kv_heads, c.head_dim, c.cache_dtype)


def _distance(positions: Int[Array, "B T"], key_positions: Int[Array, "#B S"]):
    return positions[:, :, None] - key_positions[:, None, :]
