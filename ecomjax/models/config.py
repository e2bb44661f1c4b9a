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
    """What the backward pass recomputes: nothing, all but matrix products, everything."""

    @property
    def types(self) -> dict[str, Any]:
        """The two dtypes as modules take them."""
        return {
            "dtype": jnp.dtype(self.compute_dtype),
            "param_dtype": jnp.dtype(self.param_dtype),
        }
