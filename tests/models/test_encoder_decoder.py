"""Laws of every encoder-decoder: which slots see which, however they are laid out."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.models import registry
from ecomjax.models.bart import BartConfig
from ecomjax.models.t5 import T5Config

CONFIGS = {
    "t5": T5Config(61, 16, 2, 3, 3, 8, 20, buckets=8, max_distance=9, norm_eps=1e-3),
    "flan": T5Config(
        61, 16, 2, 3, 3, 8, 20, gated=True, activation="gelu_tanh", tied_embeddings=False
    ),
    "bart": BartConfig(61, 16, 2, 3, 2, 4, 20, 28, max_positions=24, scaled_embeddings=True),
}
RNG = np.random.default_rng(0)
B, S, T = 3, 12, 10
SOURCES = RNG.integers(0, 61, (B, S)).astype(np.int32)
TARGETS = RNG.integers(0, 61, (B, T)).astype(np.int32)


def draw(path, shape):
    values = 0.2 * np.random.default_rng(zlib.crc32(path.encode())).standard_normal(shape)
    return jnp.asarray(values + path.endswith("norm/scale"), jnp.float32)


@functools.cache
def made(name, **changes):
    """(model, its parameters)."""
    config = dataclasses.replace(CONFIGS[name], **changes)
    model = registry.build(dataclasses.replace(config, scan=True))
    shapes = trees.flatten(registry.describe(model)[0])
    params = trees.unflatten({path: draw(path, leaf.shape) for path, leaf in shapes.items()})
    params = params if config.scan else trees.unstack_layers(params)
    return registry.build(config), params


def whole(tokens):
    """Rows of one sequence each: tokens, positions, segment ids."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones(tokens.shape, np.int32)


@functools.partial(jax.jit, static_argnums=0)
def remember(model, variables, tokens, positions, segments):
    return model.apply(variables, tokens, positions, segments, method="remember")


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, variables, source, target, index=None):
    memory = model.apply(variables, *source, index, method="remember")
    hidden, _ = model.apply(variables, *target, None, memory, index)
    return model.apply(variables, hidden, index, method="logits")


def logits(name, source=None, target=None, **changes):
    model, params = made(name, **changes)
    source = whole(SOURCES) if source is None else source
    target = whole(TARGETS) if target is None else target
    return np.asarray(logits_of(model, {"params": params}, source, target))


def assert_close(ours, expected, tolerance=1e-5):
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(scope="module", params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def expected(name):
    return logits(name)


@pytest.mark.parametrize("changes", [{"scan": False}, {"remat": "full"}, {"remat": "dots"}])
def test_running_layers_otherwise_changes_nothing(name, expected, changes):
    assert_close(logits(name, **changes), expected)


@pytest.mark.parametrize("scan", [True, False])
def test_decoding_in_parts_is_the_full_forward(name, expected, scan):
    """Targets of 4, 2 and 3 tokens, padded on the right, go on one by one to the end."""
    model, params = made(name, scan=scan)
    variables, lengths = {"params": params}, np.array([4, 2, 3])
    memory = remember(model, variables, *whole(SOURCES))

    @jax.jit
    def extend(cache, tokens, positions, segments):
        hidden, cache = model.apply(variables, tokens, positions, segments, cache, memory)
        return model.apply(variables, hidden, method="logits"), cache

    tokens, positions, _ = (x[:, :4] for x in whole(TARGETS))
    segments = (positions < lengths[:, None]).astype(np.int32)
    found, cache = extend(model.new_cache(B, 10), tokens, positions, segments)
    for row, length in enumerate(lengths):
        assert_close(found[row, :length], expected[row, :length])
    for step in range(6):
        at = (lengths + step)[:, None].astype(np.int32)
        fed = np.take_along_axis(TARGETS, at, axis=1)
        found, cache = extend(cache, fed, at, np.ones_like(at))
        assert_close(found[:, 0], np.take_along_axis(expected, at[..., None], axis=1)[:, 0])


def packed(tokens, lengths, order, slots):
    """One row with the sequences in this order, sequence i as segment i + 1."""
    gap = slots - sum(lengths)
    row = np.concatenate([*(tokens[i, : lengths[i]] for i in order), np.full(gap, 7)])
    positions = np.concatenate([*(np.arange(lengths[i]) for i in order), np.full(gap, 3)])
    segments = np.repeat([*(i + 1 for i in order), 0], [*(lengths[i] for i in order), gap])
    return tuple(x[None].astype(np.int32) for x in (row, positions, segments))


def test_packed_pairs_are_separate_ones(name):
    """Sources and targets of three pairs, each in a row of its own order, with padding behind."""
    of_source, of_target = (7, 4, 9), (5, 6, 2)
    order = (2, 0, 1)
    found = logits(
        name, packed(SOURCES, of_source, order, 24), packed(TARGETS, of_target, (0, 1, 2), 17)
    )
    start = 0
    for i in range(3):
        source, target = SOURCES[i : i + 1, : of_source[i]], TARGETS[i : i + 1, : of_target[i]]
        alone = logits(name, whole(source), whole(target))[0]
        assert_close(found[0, start : start + of_target[i]], alone)
        start += of_target[i]
    assert np.isfinite(found).all()


def test_padding_changes_nothing(name):
    """Whatever stands in padding slots of sources and targets, on either side."""
    expected = logits(name, whole(SOURCES[:, :8]), whole(TARGETS[:, :6]))

    def padded(tokens, length, left):
        slots = length + 3
        inside = np.arange(slots) - left
        live = (inside >= 0) & (inside < length)
        filled = RNG.integers(0, 61, (B, slots))
        filled[:, live] = tokens[:, :length]
        rows = (
            filled,
            *(np.broadcast_to(x, (B, slots)) for x in (np.where(live, inside, 5), live)),
        )
        return tuple(x.astype(np.int32) for x in rows)

    for left in (0, 1, 3):
        found = logits(name, padded(SOURCES, 8, left), padded(TARGETS, 6, left))
        assert_close(found[:, left : left + 6], expected)
        assert np.isfinite(found).all()


def test_positions_of_one_row_serve_all(name, expected):
    tokens, positions, segments = whole(SOURCES)
    assert_close(logits(name, (tokens, positions[:1], segments)), expected)


def test_a_target_without_its_source_is_finite(name):
    """As in a row of padding."""
    tokens, positions, segments = whole(SOURCES)
    assert np.isfinite(logits(name, (tokens, positions, 0 * segments))).all()


def test_bfloat16_computes_and_float32_comes_out(name, expected):
    found = logits(name, compute_dtype="bfloat16")
    assert found.dtype == np.float32
    assert_close(found, expected, 0.1)
    model, _ = made(name, compute_dtype="bfloat16")
    assert model.new_cache(1, 2).keys.dtype == jnp.bfloat16


def shaken(adapter, seed):
    """The adapter with an output of its own."""
    rng = np.random.default_rng(seed)
    return trees.map_leaves(
        lambda leaf: leaf.replace(b=0.1 * rng.standard_normal(leaf.b.shape, np.float32)), adapter
    )


def test_every_adapted_kernel_has_a_gradient(name):
    """Those of the encoder and of cross-attention too, through the memory."""
    model, params = made(name)
    _, axes = registry.describe(model)
    _, adapter = lora.init(params, axes, [LoraRule(rank=2)], jax.random.key(0))
    trained, fixed = lora.split(shaken(adapter, 0))

    @jax.jit
    @jax.grad
    def gradient(trained):
        variables = {"params": params, "lora": lora.join(trained, fixed)}
        found = logits_of(model, variables, whole(SOURCES), whole(TARGETS))
        return jnp.square(found).mean()

    found = trees.flatten(gradient(trained))
    assert {path.split("/layers/")[0] for path in found} == {"encoder", "decoder"}
    for path, leaf in found.items():
        for factor in (leaf.a, leaf.b):
            assert np.abs(factor).max(axis=(1, 2)).min() > 1e-6, path


def test_several_adapters_at_once(name):
    """Each row with its own, in the encoder and the decoder, is each adapter alone."""
    model, params = made(name)
    _, axes = registry.describe(model)
    adapters = []
    for seed in range(2):
        _, adapter = lora.init(params, axes, [LoraRule(rank=2)], jax.random.key(seed))
        adapters.append(shaken(adapter, seed))
    together = jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *adapters)
    variables, index = {"params": params, "lora": together}, np.array([1, 0, 1], np.int32)
    found = logits_of(model, variables, whole(SOURCES), whole(TARGETS), index)
    for row, i in enumerate(index):
        alone = {"params": params, "lora": adapters[i]}
        expected = logits_of(model, alone, whole(SOURCES), whole(TARGETS))
        assert_close(found[row], expected[row], 1e-4)
