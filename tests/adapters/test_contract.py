"""The contract of adapters holds what is not in the package: it need not change."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ecomjax import trees


def assert_close(ours, expected, tolerance=1e-5):
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


def test_holds_several_adapters_at_once(tiny, make_adapter, tokens):
    """Stacked by hand along the axis after layers; each row of a batch names its own."""
    adapters = [make_adapter(seed) for seed in (1, 2, 3)]
    adapters[1] = trees.map_leaves(lambda leaf: leaf.replace(scale=3 * leaf.scale), adapters[1])

    def together(path, *leaves):
        axis = int(path.startswith("layers/"))
        return jax.tree.map(lambda *xs: np.stack(xs, axis=axis), *leaves)

    flat = [trees.flatten(adapter) for adapter in adapters]
    many = trees.unflatten({path: together(path, *(f[path] for f in flat)) for path in flat[0]})
    index = np.array([2, 0, 1, 0], np.int32)
    mixed = tiny.logits(tokens, lora=many, index=index)
    for row, i in enumerate(index):
        assert_close(mixed[row], tiny.logits(tokens, lora=adapters[i])[row])


class Spy(flax.struct.PyTreeNode):
    """Adds nothing, and tells which key it was given."""

    nothing: Any
    tell: Any = flax.struct.field(pytree_node=False)

    fixed = ()

    def apply(self, x, kernel, y, index=None, key=None):
        if key is not None:
            jax.debug.callback(lambda bits: self.tell(int(bits)), jax.random.bits(key))
        return y


def test_every_kernel_of_every_layer_has_its_own_key(tiny, tokens):
    seen = []
    kernels = trees.select(tiny.params, "layers/.*/kernel")
    adapter = trees.unflatten({path: Spy(jnp.zeros(2), seen.append) for path in kernels})
    ones = jnp.ones((1, tokens.shape[1]), jnp.int32)

    @jax.jit
    def run(variables, rngs):
        return tiny.model.apply(variables, jnp.asarray(tokens[:1]), ones, ones, rngs=rngs)[0]

    for rngs, keys in ((None, 0), ({"dropout": jax.random.key(0)}, 2 * 7)):
        jax.block_until_ready(run({"params": tiny.params, "lora": adapter}, rngs))
        jax.effects_barrier()
        assert len(seen) == len(set(seen)) == keys
