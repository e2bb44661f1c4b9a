import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.adapters.similarity import cka
from ecomjax.decoding.batches import Limits
from ecomjax.errors import UserError
from ecomjax.evaluation.activations import final_states
from ecomjax.models import registry
from ecomjax.models.llama import Llama
from ecomjax.models.t5 import T5Config

LIMITS = Limits(max_new_tokens=1, end=0, batch_size=3, window=64)


@pytest.fixture(scope="module")
def tiny(make_llama):
    return make_llama(layers=2)


@pytest.fixture(scope="module")
def prompts():
    """Of 4 to 21 tokens, short and long mixed, that open with the same three."""
    rng = np.random.default_rng(0)
    return [[7, 8, 9, *rng.integers(0, 61, n).tolist()] for n in (5, 1, 18, 2, 9, 13, 4)]


@pytest.fixture(scope="module")
def adapter(tiny):
    _, drawn = lora.init(tiny.params, tiny.axes, [LoraRule(rank=3)], jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), drawn)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_states_are_those_of_whole_forwards(tiny, prompts, adapter, adapted, batch_size):
    """One prompt at a time, without a shared prefix."""
    variables = {"params": tiny.params} | ({"lora": adapter} if adapted else {})
    done = []
    limits = dataclasses.replace(LIMITS, batch_size=batch_size)
    ours = final_states(tiny.model, variables, prompts, limits, done.append)
    assert ours.dtype == np.float32 and sum(done) == len(prompts)

    @jax.jit
    def whole(variables, row):
        tokens, positions = row[None], jnp.arange(32, dtype=jnp.int32)[None]
        return tiny.model.apply(variables, tokens, positions, jnp.ones_like(tokens))[0][0]

    for state, prompt in zip(ours, prompts, strict=True):
        expected = whole(variables, padded(prompt))[len(prompt) - 1]
        np.testing.assert_allclose(state, expected, rtol=1e-4, atol=1e-5)


def padded(prompt):
    return np.pad(np.array(prompt, np.int32), (0, 32 - len(prompt)))


def test_states_of_an_encoder_decoder_are_of_its_last_start_token(prompts):
    config = T5Config(61, 16, 2, 2, 3, 8, 20, tied_embeddings=False, start=(5, 4))
    model = registry.build(config)
    flat, rng = trees.flatten(registry.describe(model)[0]), np.random.default_rng(0)
    drawn = {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in flat.items()}
    variables = {"params": jax.tree.map(jnp.asarray, trees.unflatten(drawn))}
    ours = final_states(model, variables, prompts, dataclasses.replace(LIMITS, start=config.start))

    @jax.jit
    def whole(source, length):
        at = jnp.arange(32, dtype=jnp.int32)[None]
        live = (at < length).astype(jnp.int32)
        memory = model.apply(variables, source[None], at, live, method="remember")
        start = jnp.array([config.start], jnp.int32)
        hidden, _ = model.apply(variables, start, at[:, :2], jnp.ones_like(start), None, memory)
        return hidden[0, -1]

    for state, prompt in zip(ours, prompts, strict=True):
        expected = whole(padded(prompt), len(prompt))
        np.testing.assert_allclose(state, expected, rtol=1e-4, atol=1e-5)


def test_prompts_of_like_length_are_compiled_once_and_adapters_too(tiny, prompts, adapter):
    class Watched(Llama):
        traced = 0

        def embed_slots(self, *args):
            type(self).traced += 1
            return super().embed_slots(*args)

    model = Watched(tiny.config)
    others = jax.tree.map(lambda x: -x, adapter)
    states = [
        final_states(model, {"params": tiny.params, "lora": lora_tree}, prompts, LIMITS)
        for lora_tree in (adapter, others)
    ]
    traced = Watched.traced
    final_states(model, {"params": tiny.params, "lora": others}, prompts[::-1], LIMITS)
    # The shared prefix, and the prompts behind it.
    assert traced == Watched.traced == 2
    table = cka(states)
    assert table[0, 1] < 1.0


def test_bad_prompts_are_refused_and_none_are_no_states(tiny):
    variables = {"params": tiny.params}
    with pytest.raises(UserError, match="empty prompt"):
        final_states(tiny.model, variables, [[1], []], LIMITS)
    assert final_states(tiny.model, variables, [], LIMITS).shape == (0, tiny.config.width)
