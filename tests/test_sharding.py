"""Split over eight devices, every model is the one on a single device."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ecomjax import placement, sharding, trees
from ecomjax.adapters import lora
from ecomjax.adapters.quantize import quantize
from ecomjax.adapters.rules import LoraRule
from ecomjax.errors import UserError
from ecomjax.models import registry
from ecomjax.models.bart import BartConfig
from ecomjax.models.bert import BertConfig
from ecomjax.models.gpt2 import GPT2Config
from ecomjax.models.heads import SequenceClassifierConfig, TokenClassifierConfig
from ecomjax.models.llama import LlamaConfig
from ecomjax.models.t5 import T5Config
from ecomjax.training.losses import causal_lm
from ecomjax.typing import Batch, ParamAxes

LLAMA = {"vocab_size": 64, "width": 24, "layers": 2, "heads": 8, "kv_heads": 2, "head_dim": 6}
EXPERTS = {"experts": 4, "experts_per_token": 2, "balance_coefficient": 0.5}
ENCODER = {"vocab_size": 61, "width": 24, "layers": 2, "heads": 6, "ffn": 40, "max_positions": 33}
CASES = {
    "llama": LlamaConfig(**LLAMA, ffn=40),
    "llama_unrolled": LlamaConfig(**LLAMA, ffn=40, scan=False),
    "mixtral_ragged": LlamaConfig(**LLAMA, ffn=40, **EXPERTS),
    "mixtral_dense": LlamaConfig(**LLAMA, ffn=40, **EXPERTS, dispatch="dense"),
    "gpt2": GPT2Config(vocab_size=61, width=24, layers=2, heads=6, ffn=40, max_positions=33),
    "bert": BertConfig(**ENCODER),
    "sequences": SequenceClassifierConfig(**ENCODER, labels=("a", "b", "c")),
    "tokens": TokenClassifierConfig(**ENCODER, labels=("a", "b", "c")),
    "t5": T5Config(61, 24, 2, 2, 6, 8, 40),
    "bart": BartConfig(61, 24, 2, 2, 4, 6, 24, 40, max_positions=33),
}
"""A tiny config for each family of the registry."""

MESHES = {"fsdp2_tensor4": (1, 2, 4, 1), "fsdp2_tensor2_expert2": (1, 2, 2, 2)}
ROWS, SLOTS = 4, 10


@pytest.fixture(scope="module", params=MESHES)
def mesh(request):
    return sharding.make_mesh(*MESHES[request.param])


@pytest.fixture(scope="module", params=CASES)
def config(request):
    return CASES[request.param]


def test_every_family_has_a_case():
    assert {type(config) for config in CASES.values()} == set(registry.FAMILIES)


def random_params(shapes):
    """Anything but what initialisers draw, so that every parameter matters."""

    def draw(path, shape):
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        values = 0.2 * rng.standard_normal(shape.shape, np.float32)
        return jnp.asarray(values + np.float32(path.endswith("norm/scale")))

    flat = trees.flatten(shapes)
    return trees.unflatten({path: draw(path, shape) for path, shape in flat.items()})


@pytest.fixture(scope="module")
def batch():
    """Rows of up to three sequences, padded."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 61, (2, ROWS, SLOTS)).astype(np.int32)
    positions = np.tile(np.array([0, 1, 2, 3, 0, 1, 2, 0, 1, 2], np.int32), (ROWS, 1))
    segments = np.tile(np.repeat([1, 2, 3], (4, 3, 3)), (ROWS, 1)).astype(np.int32)
    segments[1, 7:] = segments[2, 4:] = 0
    weights = ((positions > 0) & (segments > 0)).astype(np.float32)
    return Batch(*map(jnp.asarray, (tokens, positions, segments, targets, weights)))


def test_sharded_is_unsharded(config, mesh, batch):
    """A positive sum over all that the model gives out."""
    model = registry.build(config)
    shapes, axes = registry.describe(model)
    params = random_params(shapes)

    @jax.jit
    def loss(params, batch):
        slots = (batch.tokens, batch.positions, batch.segment_ids)
        out = model.apply({"params": params}, *slots, method="everything")
        likelihood = jax.nn.log_softmax(out.reshape(-1, out.shape[-1]).astype(jnp.float32))
        weights = 1 + jnp.cos(jnp.arange(likelihood.size, dtype=jnp.float32))
        return -(likelihood * weights.reshape(likelihood.shape)).sum()

    specs, _ = sharding.specs(axes, shapes, mesh)
    placed = placement.shard_params(params, sharding.shardings(specs, mesh))
    rows = placement.shard_rows(batch, mesh)
    expected = float(loss(params, batch))
    with sharding.use(mesh):
        assert float(loss(placed, rows)) == pytest.approx(expected, rel=1e-5)
    assert trees.flatten(placed).keys() == trees.flatten(params).keys()
    for path, leaf in trees.flatten(placed).items():
        assert leaf.sharding.mesh == mesh, path
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    assert held < 0.7 * trees.bytes_of(params)


@pytest.mark.parametrize(
    ("name", "quantization", "sizes"),
    [
        ("llama", "int8", (1, 2, 4, 1)),
        ("llama", None, (1, 2, 2, 2)),
        ("mixtral_dense", None, (1, 2, 2, 2)),
        ("mixtral_ragged", "nf4", (1, 2, 2, 2)),
    ],
)
def test_training_loss_and_gradients(name, quantization, sizes, batch):
    """Adapters lie as their kernels do. Ten steps on more meshes: `training/test_meshes.py`."""
    mesh = sharding.make_mesh(*sizes)
    model = registry.build(CASES[name])
    shapes, axes = registry.describe(model)
    params = random_params(shapes)
    _, adapter = lora.init(params, axes, [LoraRule(rank=3)], jax.random.key(0))
    adapter = trees.map_leaves(lambda leaf: leaf.replace(b=leaf.b + 0.1), adapter)
    if quantization is not None:
        params = quantize(params, axes, quantization)
    specs, _ = sharding.specs(axes, params, mesh)
    placed = placement.shard_params(params, sharding.shardings(specs, mesh))
    specs = sharding.adapter_specs(adapter, axes, shapes, mesh)
    by_adapter = sharding.shardings(specs, mesh)

    @jax.jit
    def value_and_grad(params, adapter, batch):
        trained, fixed = lora.split(adapter)
        frozen = {"params": params, "fixed": fixed}

        def loss(trained):
            total, weight, _ = causal_lm(model)(trained, frozen, batch, jax.random.key(0))
            return total / weight

        return jax.value_and_grad(loss)(trained)

    expected, gradients = value_and_grad(params, adapter, batch)
    rows = placement.shard_rows(batch, mesh)
    with sharding.use(mesh):
        value, grads = value_and_grad(placed, placement.shard_params(adapter, by_adapter), rows)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for ours, exact in zip(jax.tree.leaves(grads), jax.tree.leaves(gradients), strict=True):
        assert np.abs(ours - exact).max() <= 1e-4 * np.abs(exact).max()


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_kernels_are_split_as_those_they_stand_for(kind, mesh):
    """Array by array; what has an axis of 1 for many, or does not divide, is whole along it."""
    shapes, axes = registry.describe(registry.build(CASES["mixtral_ragged"]))
    params = quantize(random_params(shapes), axes, kind)
    specs, fallbacks = sharding.specs(axes, params, mesh)
    of_arrays, _ = sharding.specs(axes, shapes, mesh)
    dense, placed = (
        trees.flatten(tree)
        for tree in (of_arrays, placement.shard_params(params, sharding.shardings(specs, mesh)))
    )
    for path, leaf in trees.flatten(params).items():
        for array, whole in zip(*map(jax.tree.leaves, (placed[path], leaf)), strict=True):
            held = array.addressable_shards[0].data.shape
            for size, full, part, rule in zip(
                whole.shape, leaf.shape, held, dense[path], strict=True
            ):
                parts = mesh.shape[rule] if rule else 1
                alone = size % parts != 0
                assert part == (size if alone else size // parts)
                told = any(f[0] == path and f.size == size for f in fallbacks)
                assert not alone or size == 1 < full or told, path
    codes = placed["layers/mlp/experts/up/kernel"].codes
    assert codes.addressable_shards[0].data.nbytes == codes.nbytes // mesh.size
    assert len(set(fallbacks)) == len(fallbacks)
    assert all(fallback.size > 1 for fallback in fallbacks)


def specs_of(name, *sizes):
    shapes, axes = registry.describe(registry.build(CASES[name]))
    return sharding.specs(axes, shapes, sharding.make_mesh(*sizes))


def test_specs_follow_the_rules():
    specs, fallbacks = specs_of("mixtral_ragged", 1, 2, 2, 2)
    assert not fallbacks
    found = {path: tuple(spec) for path, spec in trees.flatten(specs).items()}
    block = {path: found[f"layers/{path}"] for path in ("attn/q/kernel", "attn/o/kernel")}
    assert block == {
        "attn/q/kernel": (None, "fsdp", "tensor", None),
        "attn/o/kernel": (None, "tensor", None, "fsdp"),
    }
    assert found["layers/mlp/experts/down/kernel"] == (None, "expert", "tensor", "fsdp")
    assert found["layers/mlp/router/kernel"] == (None, "fsdp", None)
    assert found["embed/embedding"] == ("tensor", "fsdp")
    assert found["final_norm/scale"] == ("fsdp",)


def test_adapters_are_split_as_their_kernels():
    """Along the first input and the first output axis, whole where that does not divide."""
    shapes, axes = registry.describe(registry.build(CASES["mixtral_ragged"]))
    _, adapter = lora.init(shapes, axes, [LoraRule(rank=3)], jax.random.key(0))

    def found(*sizes):
        specs = sharding.adapter_specs(adapter, axes, shapes, sharding.make_mesh(*sizes))["layers"]
        leaves = specs["mlp"]["experts"]["up"], specs["attn"]["o"], specs["attn"]["k"]
        return [[tuple(x) for x in jax.tree.leaves(leaf)] for leaf in leaves]

    assert found(1, 2, 2, 2) == [
        [(None, "expert", "fsdp", None), (None, "expert", None, "tensor"), (None, "expert")],
        [(None, "tensor", None), (None, None, "fsdp"), (None,)],
        [(None, "fsdp", None), (None, None, "tensor"), (None,)],
    ]
    # Two key heads over four devices, though their numbers, lying flat, would divide.
    assert found(1, 2, 4, 1)[2][1] == (None, None, None)


def test_what_does_not_divide_is_whole_and_listed():
    """Two key heads over four devices; all else divides."""
    specs, fallbacks = specs_of("llama", 1, 2, 4, 1)
    assert [f.path for f in fallbacks] == ["layers/attn/k/kernel", "layers/attn/v/kernel"]
    for fallback in fallbacks:
        assert fallback[1:] == ("kv_heads", 2, ("tensor",), 4)
        assert "kv_heads of 2 does not divide over 4 devices" in str(fallback)
        spec = trees.flatten(specs)[fallback.path]
        assert tuple(spec) == (None, "fsdp", None, None)


def test_too_much_that_does_not_divide_is_refused():
    """k and v of [2, 24, 2, 6] float32: half of each over fsdp, of which a quarter would do."""
    shapes, axes = registry.describe(registry.build(CASES["llama"]))
    mesh = sharding.make_mesh(1, 2, 4, 1)
    excess = 2 * (2 * 24 * 2 * 6 * 4) // 2 * 3 // 4
    sharding.specs(axes, shapes, mesh, most_replicated=excess)
    with pytest.raises(UserError, match=r"GiB are replicated.*layers/attn/k/kernel.* and 1 more"):
        sharding.specs(axes, shapes, mesh, most_replicated=excess - 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("embed", "hats"), "no rule for the logical axis 'hats'"),
        (("heads", "ffn"), "'heads' and 'ffn' are both split over 'tensor'"),
        (("embed", "embed"), "'embed' and 'embed' are both split over 'fsdp'"),
    ],
)
def test_bad_axes_are_refused_on_any_mesh(names, message):
    shapes = {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    with pytest.raises(ValueError, match=message):
        sharding.specs({"kernel": ParamAxes(names)}, shapes, sharding.make_mesh())


def test_mesh_sizes():
    mesh = sharding.make_mesh(fsdp=2, tensor=-1, data=1)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 4, "expert": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(sharding.make_mesh(devices=jax.devices()[:2]).shape)["data"] == 2
    assert sharding.make_mesh(1, 3).devices.ravel().tolist() == jax.devices()[:3]


@pytest.mark.parametrize("sizes", [(16, 1, 1, 1), (-1, 3, 1, 1), (-1, -1, 1, 1), (-1, 3), (0, 8)])
def test_mesh_sizes_that_do_not_fit(sizes):
    with pytest.raises(UserError, match=rf"a mesh of data {sizes[0]}.* does not fit 8 devices"):
        sharding.make_mesh(*sizes)
