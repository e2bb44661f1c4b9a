import jax
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule

EVERY_KERNEL = (LoraRule(".*/kernel", rank=3, alpha=4.0),)


@pytest.fixture(scope="session")
def tiny(make_llama):
    return make_llama(layers=2)


@pytest.fixture(scope="session")
def tokens():
    return np.random.default_rng(0).integers(0, 61, (4, 9)).astype(np.int32)


@pytest.fixture(scope="session")
def make_adapter(tiny):
    """Function (seed, rules) -> adapter of the tiny model, `b` drawn too unless seed is None."""

    def make(seed=0, rules=EVERY_KERNEL):
        _, adapter = lora.init(tiny.params, tiny.axes, rules, jax.random.key(seed or 0))
        if seed is None:
            return adapter
        rng = np.random.default_rng(seed)

        def drawn(leaf):
            return leaf.replace(b=0.1 * rng.standard_normal(leaf.b.shape, np.float32))

        return trees.map_leaves(drawn, adapter)

    return make
