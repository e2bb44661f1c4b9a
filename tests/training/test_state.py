import jax
import jax.numpy as jnp
import numpy as np

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.training import optim
from ecomjax.training.state import new_state


def adam():
    options = {"weight_decay": 0.0, "clip_norm": 1.0, "beta1": 0.9, "beta2": 0.999}
    return optim.adamw(optim.schedule("cosine", 1e-3, 0.1, 10), **options)


def test_a_state_is_as_large_as_its_adapter(make_llama, loose_promotion):
    """Factors, two moments of each, and a handful of counters; neither base nor scales."""
    tiny = make_llama(layers=2)
    _, adapter = lora.init(tiny.params, tiny.axes, [LoraRule(rank=2)], jax.random.key(0))
    trained, _ = lora.split(adapter)
    state = new_state(trained, adam(), jax.random.key(7))
    counters = [x for x in jax.tree.leaves(state.optimizer) if x.ndim == 0]
    # The step, the updates skipped, and the two words of the key.
    assert trees.count(state) == 3 * trees.count(trained) + 1 + 1 + 2 + len(counters)
    assert state.step.dtype == jnp.int32 and int(state.step) == 0
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.trained))


def test_the_key_is_kept_as_plain_numbers(loose_promotion):
    key = jax.random.key(7)
    state = new_state({"w": jnp.zeros(2)}, adam(), key)
    assert state.key_data.dtype == jnp.uint32
    again = jax.random.wrap_key_data(state.key_data)
    np.testing.assert_array_equal(jax.random.normal(again, 3), jax.random.normal(key, 3))
