"""What every model's config says besides its shape."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

FloatType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Numerics and compilation; families add their shape, in the letters of `ecomjax.typing`."""

    compute_dtype: FloatType = "float32"
    param_dtype: FloatType = "float32"
    scan: bool = True
    """Scan over stacked layers (compiles once) or, for debugging, unroll named ones."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but what linear layers and attention return,
    everything."""
    kv_cache: Literal["compute", "int8"] = "compute"
    """How a cache holds keys and values: in `compute_dtype`, or as `ecomjax.typing.Int8Vectors`.
    Those that a decoder has of its sources stay in `compute_dtype`."""

    @property
    def cache_dtype(self) -> Any:
        """The dtype for `models.cache.empty_cache`."""
        return jnp.dtype("int8" if self.kv_cache == "int8" else self.compute_dtype)

    @property
    def types(self) -> dict[str, Any]:
        """The two dtypes as modules take them."""
        return {
            "dtype": jnp.dtype(self.compute_dtype),
            "param_dtype": jnp.dtype(self.param_dtype),
        }
