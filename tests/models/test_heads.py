import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.rules import LoraRule
from ecomjax.models import heads, registry
from ecomjax.models.bert import Bert

RNG = np.random.default_rng(0)
V, D, C = 61, 24, 5
LABELS = ("exact", "substitute", "complement", "irrelevant", "none")
SHAPE = {
    "vocab_size": V,
    "width": D,
    "layers": 2,
    "heads": 3,
    "ffn": 40,
    "max_positions": 20,
    "labels": LABELS,
}


@functools.cache
def make(config_class, model_type="bert"):
    """(model, parameters off their initial values)."""
    model = registry.build(config_class(**SHAPE, model_type=model_type))
    shapes, _ = registry.describe(model)

    def draw(path, shape):
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        return jnp.asarray(0.3 * rng.standard_normal(shape.shape, np.float32))

    flat = trees.flatten(shapes)
    return model, trees.unflatten({path: draw(path, flat[path]) for path in flat})


def assert_close(ours, expected, tolerance=1e-5):
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


def pack(sequences, slots):
    """(tokens, positions, segment ids, slots where sequences start) of one row."""
    lengths = [len(x) for x in sequences]
    padding = slots - sum(lengths)
    tokens = np.concatenate([*sequences, np.full(padding, 3)])
    positions = np.concatenate([np.arange(n) for n in (*lengths, padding)])
    segments = np.repeat([*range(1, len(lengths) + 1), 0], (*lengths, padding))
    at = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return [jnp.asarray(x[None].astype(np.int32)) for x in (tokens, positions, segments, at)]


@pytest.fixture(scope="module")
def sequences():
    return [RNG.integers(0, V, n) for n in (5, 3, 6)]


@pytest.mark.parametrize(
    ("model_type", "activation"),
    [("bert", np.tanh), ("roberta", np.tanh), ("distilbert", lambda x: np.maximum(x, 0))],
)
def test_a_sequence_is_read_off_its_first_token(sequences, model_type, activation):
    model, params = make(heads.SequenceClassifierConfig, model_type)
    *row, at = pack(sequences[:1], 8)
    logits = np.asarray(model.apply({"params": params}, *row, at))
    hidden = np.asarray(Bert(model.config).apply({"params": params["encoder"]}, *row))
    head = jax.tree.map(np.asarray, params["head"])
    dense, out = head["dense"], head["out"]
    inner = activation(hidden[0, 0] @ dense["kernel"] + dense["bias"])
    assert_close(logits[0, 0], inner @ out["kernel"] + out["bias"])
    assert logits.shape == (1, 1, C) and logits.dtype == np.float32


def test_packed_sequences_have_their_own_classes(sequences):
    model, params = make(heads.SequenceClassifierConfig)
    run = jax.jit(lambda *row: model.apply({"params": params}, *row))
    packed = np.asarray(run(*pack(sequences, 16)))
    assert packed.shape == (1, 3, C)
    for i, sequence in enumerate(sequences):
        assert_close(packed[0, i], run(*pack([sequence], 16))[0, 0])


def test_tokens_have_a_class_at_every_slot(sequences):
    model, params = make(heads.TokenClassifierConfig)
    run = jax.jit(lambda *row: model.apply({"params": params}, *row))
    *row, at = pack(sequences, 16)
    logits = np.asarray(run(*row))
    assert logits.shape == (1, 16, C) and logits.dtype == np.float32
    for start, sequence in zip(np.asarray(at)[0], sequences, strict=True):
        alone = run(*pack([sequence], 16)[:3])
        assert_close(logits[0, start : start + len(sequence)], alone[0, : len(sequence)])


@pytest.mark.parametrize(
    "config_class", [heads.SequenceClassifierConfig, heads.TokenClassifierConfig]
)
def test_a_new_head_leaves_the_encoder_alone(config_class):
    model, params = make(config_class)
    made = heads.with_new_head(model, params["encoder"], jax.random.key(0, impl="rbg"))
    assert made["encoder"] is params["encoder"]
    drawn, given = trees.flatten(made["head"]), trees.flatten(params["head"])
    assert {k: v.shape for k, v in drawn.items()} == {k: v.shape for k, v in given.items()}
    assert all(np.any(x) == path.endswith("kernel") for path, x in drawn.items())
    _, axes = registry.describe(model)
    assert axes["head"]["out"]["kernel"].names[-1] == "classes"


def test_mean_pool_is_the_mean_of_each_sequence():
    hidden = RNG.standard_normal((2, 9, D)).astype(np.float32)
    segments = np.array([[0, 1, 1, 1, 2, 2, 0, 0, 0], [2, 2, 2, 2, 2, 2, 2, 0, 0]], np.int32)
    pooled = np.asarray(heads.mean_pool(jnp.asarray(hidden), jnp.asarray(segments), 3))
    unit = np.asarray(heads.mean_pool(jnp.asarray(hidden), jnp.asarray(segments), 3, True))
    for row, segment in np.ndindex(2, 3):
        mine = hidden[row][segments[row] == segment + 1]
        if not len(mine):
            assert not pooled[row, segment].any() and not unit[row, segment].any()
            continue
        assert_close(pooled[row, segment], mine.mean(axis=0))
        assert_close(unit[row, segment], mine.mean(axis=0) / np.linalg.norm(mine.mean(axis=0)))


def test_mean_pool_of_nothing_has_a_gradient():
    segments = jnp.array([[1, 1, 0]], jnp.int32)
    hidden = jnp.asarray(RNG.standard_normal((1, 3, D)).astype(np.float32))
    gradient = jax.grad(lambda x: heads.mean_pool(x, segments, 2, True)[..., 0].sum())(hidden)
    assert np.isfinite(gradient).all()
    assert np.asarray(gradient)[0, :2].any() and not np.asarray(gradient)[0, 2].any()


def test_adapters_reach_the_encoder_and_not_the_head(sequences):
    model, params = make(heads.SequenceClassifierConfig)
    _, axes = registry.describe(model)
    _, adapter = lora.init(params, axes, [LoraRule(rank=3)], jax.random.key(0, impl="rbg"))
    rng = np.random.default_rng(0)
    adapter = trees.map_leaves(
        lambda leaf: leaf.replace(b=jnp.asarray(0.1 * rng.standard_normal(leaf.b.shape, "f4"))),
        adapter,
    )
    assert adapter.keys() == {"encoder"} and len(trees.flatten(adapter)) == 6
    run = jax.jit(model.apply)
    base, side, fused = (
        np.asarray(run(variables, *pack(sequences, 16)))
        for variables in (
            {"params": params},
            {"params": params, "lora": adapter},
            {"params": lora.fuse(params, adapter)},
        )
    )
    assert_close(side, fused)
    assert np.abs(side - base).max() > 0.1
