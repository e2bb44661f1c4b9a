import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.models import registry
from ecomjax.models.llama import LlamaConfig

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    ffn=1536,
    rope_theta=100000.0,
    tied_embeddings=True,
    max_positions=8192,
)


def test_count_of_smollm2():
    shapes, _ = registry.describe(registry.build(SMOLLM2_135M))
    assert trees.count(shapes) == 134_515_008
    c = SMOLLM2_135M
    attention = 2 * c.width * c.heads * c.head_dim + 2 * c.width * c.kv_heads * c.head_dim
    layer = attention + 3 * c.width * c.ffn + 2 * c.width
    assert trees.count(shapes) == c.vocab_size * c.width + c.layers * layer + c.width
    free = registry.build(dataclasses.replace(c, tied_embeddings=False))
    head = c.vocab_size * c.width
    assert trees.count(registry.describe(free)[0]) == trees.count(shapes) + head


def test_describing_makes_no_array():
    """A model of 10 terabytes is described like any other."""
    huge = dataclasses.replace(SMOLLM2_135M, width=2**15, ffn=2**17, layers=180, heads=513)
    shapes, axes = registry.describe(registry.build(huge))
    assert trees.bytes_of(shapes) > 10**13
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes))
    assert not jax.tree.leaves(axes)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_and_axes_cover_every_parameter(make_llama, scan, tied):
    tiny = make_llama(scan=scan, tied_embeddings=tied, param_dtype="bfloat16")
    params = jax.eval_shape(lambda key: registry.init(tiny.model, key), jax.random.key(0))
    shapes, axes = registry.describe(tiny.model)
    params, shapes, axes = trees.flatten(params), trees.flatten(shapes), trees.flatten(axes)
    assert set(params) == set(shapes) == set(axes)
    for path, leaf in params.items():
        assert leaf.dtype == shapes[path].dtype == jnp.bfloat16
        assert leaf.shape == shapes[path].shape
        assert len(axes[path].names) == leaf.ndim, path


def test_names_and_axes_of_the_tree(make_llama):
    """The tree that checkpoints, adapters and imports agree on."""
    tiny = make_llama()
    shapes, _ = registry.describe(tiny.model)
    axes = {path: (a.names, a.inputs) for path, a in trees.flatten(tiny.axes).items()}
    found = {path: (*axes[path], leaf.shape) for path, leaf in trees.flatten(shapes).items()}
    assert found == {
        "embed/embedding": (("vocab", "embed"), 1, (61, 24)),
        "layers/attn_norm/scale": (("layers", "embed"), 0, (3, 24)),
        "layers/attn/q/kernel": (("layers", "embed", "heads", "head_dim"), 1, (3, 24, 6, 8)),
        "layers/attn/k/kernel": (("layers", "embed", "kv_heads", "head_dim"), 1, (3, 24, 2, 8)),
        "layers/attn/v/kernel": (("layers", "embed", "kv_heads", "head_dim"), 1, (3, 24, 2, 8)),
        "layers/attn/o/kernel": (("layers", "heads", "head_dim", "embed"), 2, (3, 6, 8, 24)),
        "layers/mlp_norm/scale": (("layers", "embed"), 0, (3, 24)),
        "layers/mlp/gate/kernel": (("layers", "embed", "ffn"), 1, (3, 24, 40)),
        "layers/mlp/up/kernel": (("layers", "embed", "ffn"), 1, (3, 24, 40)),
        "layers/mlp/down/kernel": (("layers", "ffn", "embed"), 1, (3, 40, 24)),
        "final_norm/scale": (("embed",), 0, (24,)),
        "lm_head/kernel": (("embed", "vocab"), 1, (24, 61)),
    }


def test_layers_are_drawn_apart(make_llama):
    """Every parameter has a key of its own; the same seed gives the same model."""
    init = jax.jit(functools.partial(registry.init, make_llama().model))
    key = jax.random.key(0, impl="rbg")  # Compiles faster than the default.
    params = init(key)
    kernel = np.asarray(params["layers"]["mlp"]["up"]["kernel"])
    assert not np.allclose(kernel[0], kernel[1])
    assert not np.allclose(kernel, params["layers"]["mlp"]["gate"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, params, init(key))
