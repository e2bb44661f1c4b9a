"""Model definitions in flax.linen: pure functions of explicit parameter dicts."""
