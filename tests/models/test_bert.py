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
from ecomjax.models.attention import make_bidirectional_mask
from ecomjax.models.bert import BertConfig

RNG = np.random.default_rng(0)
B, T, V = 3, 14, 61

CONFIG = BertConfig(
    vocab_size=V,
    width=24,
    layers=3,
    heads=3,
    ffn=40,
    max_positions=19,
    position_offset=2,
    token_types=2,
    norm_eps=1e-3,
)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """An encoder with weights off their initial values."""

    model: object
    params: dict
    axes: dict

    def hidden(self, tokens, positions=None, segments=None, types=None, lora=None, index=None):
        """Hidden states [B, T, D]; by default every row is one sequence."""
        if positions is None:
            positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        if segments is None:
            segments = np.ones(tokens.shape, np.int32)
        variables = {"params": self.params} | ({} if lora is None else {"lora": lora})
        rows = (tokens, positions, segments, types, index)
        return np.asarray(_hidden(self.model, variables, *rows))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model, variables, *rows):
    return model.apply(variables, *rows)


@functools.cache
def make(**changes) -> Tiny:
    config = dataclasses.replace(CONFIG, **changes)
    shapes, axes = registry.describe(registry.build(dataclasses.replace(config, scan=True)))

    def draw(path, shape):
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        values = 0.3 * rng.standard_normal(shape.shape, np.float32)
        return jnp.asarray(values + np.float32(path.endswith("scale")))

    params = trees.unflatten({path: draw(path, x) for path, x in trees.flatten(shapes).items()})
    if not config.scan:
        params = trees.unstack_layers(params)
    return Tiny(registry.build(config), params, axes)


def assert_close(ours, expected, tolerance=1e-5):
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(scope="module")
def tokens():
    return RNG.integers(0, V, (B, T)).astype(np.int32)


def test_names_and_axes_of_the_tree():
    """The tree that checkpoints, adapters and imports agree on."""
    tiny = make()
    axes = {path: (a.names, a.inputs) for path, a in trees.flatten(tiny.axes).items()}
    found = {path: (*axes[path], x.shape) for path, x in trees.flatten(tiny.params).items()}
    heads, layer = ("heads", "head_dim"), ("layers", "embed")
    expected = {
        "embed/embedding": (("vocab", "embed"), 1, (V, 24)),
        "position_embed/embedding": (("positions", "embed"), 0, (21, 24)),
        "type_embed/embedding": (("types", "embed"), 0, (2, 24)),
        "layers/attn/q/kernel": ((*layer, *heads), 1, (3, 24, 3, 8)),
        "layers/attn/q/bias": (("layers", *heads), 0, (3, 3, 8)),
        "layers/attn/o/kernel": (("layers", *heads, "embed"), 2, (3, 3, 8, 24)),
        "layers/attn/o/bias": (layer, 0, (3, 24)),
        "layers/mlp/up/kernel": ((*layer, "ffn"), 1, (3, 24, 40)),
        "layers/mlp/up/bias": (("layers", "ffn"), 0, (3, 40)),
        "layers/mlp/down/kernel": (("layers", "ffn", "embed"), 1, (3, 40, 24)),
        "layers/mlp/down/bias": (layer, 0, (3, 24)),
    }
    for name in ("k", "v"):
        names = ("kv_heads", "head_dim")
        expected[f"layers/attn/{name}/kernel"] = ((*layer, *names), 1, (3, 24, 3, 8))
        expected[f"layers/attn/{name}/bias"] = (("layers", *names), 0, (3, 3, 8))
    for name in ("scale", "bias"):
        expected[f"embed_norm/{name}"] = (("embed",), 0, (24,))
        for norm in ("attn_norm", "mlp_norm"):
            expected[f"layers/{norm}/{name}"] = (layer, 0, (3, 24))
    assert found == expected


@pytest.mark.parametrize(
    ("name", "config", "published"),
    [
        ("bert-base-uncased", BertConfig(30522, 768, 12, 12, 3072), 109_482_240),
        (
            "roberta-base",
            BertConfig(50265, 768, 12, 12, 3072, position_offset=2, token_types=1),
            124_645_632,
        ),
        ("distilbert-base-uncased", BertConfig(30522, 768, 6, 12, 3072, token_types=0), 66_362_880),
        ("all-MiniLM-L6-v2", BertConfig(30522, 384, 6, 12, 1536), 22_713_216),
    ],
)
def test_published_sizes(name, config, published):
    """The published numbers count the pooler, [D, D] and a bias, where there is one."""
    pooler = 0 if name.startswith("distilbert") else config.width * (config.width + 1)
    assert trees.count(registry.describe(registry.build(config))[0]) == published - pooler


def test_scan_is_the_unrolled_model(tokens):
    assert_close(make(scan=False).hidden(tokens), make().hidden(tokens), 1e-6)


def whole_rows(tokens):
    """Tokens, positions and segment ids where every row is one sequence, as jax arrays."""
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    return [jnp.asarray(x) for x in (tokens, positions, np.ones_like(positions))]


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_number(tokens, remat):
    weights = np.random.default_rng(1).standard_normal((B, T, 24), np.float32)

    def gradient(tiny):
        def loss(params):
            hidden = tiny.model.apply({"params": params}, *whole_rows(tokens))
            return (hidden * weights).mean()

        return jax.jit(jax.grad(loss))(tiny.params)

    expected, found = gradient(make()), gradient(make(remat=remat))
    # Scores do not change with what is added to all keys: the gradient of that is noise.
    for grads in (expected, found):
        assert np.abs(grads["layers"]["attn"]["k"].pop("bias")).max() < 1e-6
    jax.tree.map(assert_close, found, expected)


def test_every_slot_sees_its_whole_segment():
    segments = np.array([[1, 1, 2, 0, 2, 0], [0, 3, 3, 3, 0, 0]], np.int32)
    mask = np.asarray(make_bidirectional_mask(jnp.asarray(segments)))
    for row, t, s in np.ndindex(*mask.shape):
        alone = segments[row, t] == 0
        expected = t == s if alone else segments[row, t] == segments[row, s]
        assert mask[row, t, s] == expected


def test_all_of_a_segment_and_nothing_else_has_a_gradient():
    """The gradient of each slot's state by the embedding of every token, one token a slot."""
    tiny = make()
    row = jnp.arange(T, dtype=jnp.int32)[None]
    segments = np.repeat([0, 1, 2, 0], (2, 5, 4, 3))[None].astype(np.int32)

    @jax.jit
    def sensitivity(table):
        def outputs(table):
            params = {"params": tiny.params | {"embed": {"embedding": table}}}
            hidden = tiny.model.apply(params, row, row, jnp.asarray(segments))
            return jnp.square(hidden[0]).sum(axis=-1)

        return jnp.abs(jax.jacrev(outputs)(table)).max(axis=-1)[:, :T]

    reached = np.asarray(sensitivity(tiny.params["embed"]["embedding"]))
    real = segments[0] != 0
    np.testing.assert_array_equal((reached > 0)[real], (segments.T == segments)[real])


def test_padding_changes_nothing(tokens):
    """Whatever stands in padding slots, on the right, on the left or on both sides."""
    tiny, length = make(), 8
    expected = tiny.hidden(tokens[:, :length])
    for left in (0, 2, T - length):
        inside = np.arange(T) - left
        segments = np.broadcast_to((inside >= 0) & (inside < length), (B, T)).astype(np.int32)
        positions = np.where(segments, inside, 5).astype(np.int32)
        padded = RNG.integers(0, V, (B, T)).astype(np.int32)
        padded[:, left : left + length] = tokens[:, :length]
        hidden = tiny.hidden(padded, positions, segments)
        assert_close(hidden[:, left : left + length], expected)
        assert np.isfinite(hidden).all()


def test_packed_sequences_are_separate_ones(tokens):
    tiny, lengths = make(), (5, 3, 4)
    row = np.concatenate([tokens[i, :n] for i, n in enumerate(lengths)] + [[7, 7]])
    positions = np.concatenate([np.arange(n) for n in (*lengths, 2)])
    segments = np.repeat([1, 2, 3, 0], (*lengths, 2))
    hidden = tiny.hidden(*(x[None].astype(np.int32) for x in (row, positions, segments)))[0]
    start = 0
    for i, n in enumerate(lengths):
        assert_close(hidden[start : start + n], tiny.hidden(tokens[i : i + 1, :n])[0])
        start += n


def test_positions_start_at_the_offset(tokens):
    """Rows before the offset are never read, the row at the offset is that of position 0."""
    tiny, plain = make(), make(position_offset=0)
    table = tiny.params["position_embed"]["embedding"]
    spoilt = jnp.concatenate([jnp.full((2, 24), jnp.nan), table[2:]])
    moved = dataclasses.replace(
        tiny, params=tiny.params | {"position_embed": {"embedding": spoilt}}
    )
    same = dataclasses.replace(
        plain, params=tiny.params | {"position_embed": {"embedding": table[2:]}}
    )
    np.testing.assert_array_equal(moved.hidden(tokens), tiny.hidden(tokens))
    assert_close(same.hidden(tokens), tiny.hidden(tokens), 1e-6)


@pytest.mark.parametrize("kinds", [0, 1, 2])
def test_types_of_pairs(tokens, kinds):
    """Zero is what no type means; models of fewer types than two take all alike."""
    tiny = make(token_types=kinds)
    second = np.broadcast_to(np.arange(T) >= 6, (B, T)).astype(np.int32)
    plain = tiny.hidden(tokens)
    np.testing.assert_array_equal(tiny.hidden(tokens, types=np.zeros_like(second)), plain)
    changed = np.abs(tiny.hidden(tokens, types=second) - plain).max()
    assert (changed > 0.1) == (kinds == 2)


def test_bfloat16_computes(tokens):
    half, exact = make(compute_dtype="bfloat16").hidden(tokens), make().hidden(tokens)
    assert half.dtype == jnp.bfloat16
    assert_close(half.astype(np.float32), exact, 0.1)
    assert np.abs(half.astype(np.float32) - exact).max() > 1e-4


def adapter_of(tiny, seed):
    _, adapter = lora.init(tiny.params, tiny.axes, [LoraRule(rank=3)], jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def drawn(leaf):
        return leaf.replace(b=0.05 * rng.standard_normal(leaf.b.shape, np.float32))

    return trees.map_leaves(drawn, adapter)


def test_lora_on_every_linear_layer(tokens):
    """The side path is the merged kernel, and the adapter's factors alone are trained."""
    tiny = make()
    adapter = adapter_of(tiny, 1)
    kernels = trees.select(tiny.params, ".*/kernel")
    assert len(kernels) == 6 and trees.flatten(adapter).keys() == kernels.keys()
    side = tiny.hidden(tokens, lora=adapter)
    fused = dataclasses.replace(tiny, params=lora.fuse(tiny.params, adapter))
    assert_close(side, fused.hidden(tokens))
    assert np.abs(side - tiny.hidden(tokens)).max() > 0.1
    trained, fixed = lora.split(adapter)

    @jax.jit
    @jax.grad
    def gradient(trained):
        variables = {"params": tiny.params, "lora": lora.join(trained, fixed)}
        return jnp.square(tiny.model.apply(variables, *whole_rows(tokens))[..., 0]).sum()

    found = gradient(trained)
    assert jax.tree.structure(found) == jax.tree.structure(trained)
    assert all(np.abs(x).max(axis=(1, 2)).all() for x in jax.tree.leaves(found))


def test_rows_choose_among_adapters(tokens):
    tiny = make()
    adapters = [adapter_of(tiny, seed) for seed in (1, 2)]
    many = trees.map_leaves(lambda *x: jax.tree.map(lambda *y: np.stack(y, 1), *x), *adapters)
    index = np.array([1, 0, 1], np.int32)
    mixed = tiny.hidden(tokens, lora=many, index=index)
    for row, i in enumerate(index):
        assert_close(mixed[row], tiny.hidden(tokens, lora=adapters[i])[row])


def test_dropout_is_of_training_alone():
    """Without a key nothing is dropped; with one, other things in every layer and every draw."""
    tokens = RNG.integers(0, V, (B, T)).astype(np.int32)
    dropping, plain = make(dropout=0.4), make()
    count = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    rows = jnp.asarray(tokens), count, jnp.ones((B, T), jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def drawn(model, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": plain.params}, *rows, rngs=rngs)

    expected = plain.hidden(tokens)
    np.testing.assert_allclose(dropping.hidden(tokens), expected, atol=1e-5)
    np.testing.assert_allclose(drawn(plain.model, 0), expected, atol=1e-5)
    first, again, other = (np.asarray(drawn(dropping.model, seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - expected).max() > 0.1 < np.abs(first - other).max()
