"""Quantized kernels against plain numpy, and models of them against their dequantized selves."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ecomjax import trees
from ecomjax.adapters import lora
from ecomjax.adapters.quantize import (
    NF4_CODE,
    block_size,
    quantize,
    quantize_kernel,
    ratios,
)
from ecomjax.adapters.rules import LoraRule
from ecomjax.errors import UserError
from ecomjax.hf import families
from ecomjax.hf.presets import PRESETS
from ecomjax.models import registry
from ecomjax.models.llama import LlamaConfig
from ecomjax.training.losses import causal_lm
from ecomjax.typing import Batch, DoRA, FrozenKernel, ParamAxes

KINDS = ("int8", "nf4")
KERNELS = {
    "queries": ((3, 24, 6, 8), ParamAxes(("layers", "embed", "heads", "head_dim"), 1)),
    "output": ((3, 6, 8, 24), ParamAxes(("layers", "heads", "head_dim", "embed"), 2)),
    "experts": ((2, 3, 130, 7), ParamAxes(("layers", "experts", "ffn", "embed"), 1)),
    "unstacked": ((192, 5), ParamAxes(("embed", "ffn"), 1)),
}
TWO = {"layers": 2}
MIXTRAL = TWO | {"experts": 5, "experts_per_token": 2}
MODELS = {
    "scanned": TWO,
    "unrolled": TWO | {"scan": False},
    "remat": TWO | {"remat": "full"},
    "dots": TWO | {"remat": "dots"},
    "ragged": MIXTRAL,
    "dense": MIXTRAL | {"dispatch": "dense"},
}
CASES = [*((name, "nf4") for name in MODELS), ("scanned", "int8"), ("ragged", "int8")]
"""Models and kinds: how a product is made differs by kind, not where it stands."""


def assert_close(ours, expected, tolerance=1e-5):
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance * np.abs(expected).max()


def draw(shape, seed=0):
    """Columns of very different size, some blocks and one column of zeros, one outlier."""
    rng = np.random.default_rng([seed, *shape])
    w = rng.standard_normal(shape, np.float32) * np.exp(rng.normal(size=shape[-1:]))
    w = w.astype(np.float32)
    w[..., 0] = 0.0
    w[..., :10, 1] = 0.0
    w[..., 0, 2] = 50.0
    return w


def matrices(kernel, axes):
    """[n, *in, *out] -> one column of inputs at a time: [n, columns, *leading inputs, last]."""
    shape = kernel.shape[axes.stacked :]
    ins = shape[: axes.inputs]
    flat = np.asarray(kernel, np.float64).reshape(-1, *ins, int(np.prod(shape[axes.inputs :])))
    return np.moveaxis(flat, -1, 1)


def by_hand(w, kind):
    """(the column dequantized, its error bound at each weight), by loops; w is [..., last]."""
    if kind == "int8":
        scale = np.abs(w).max() / 127
        return np.rint(w / (scale or 1.0)) * scale, np.full(w.shape, np.abs(w).max() / 254)
    last = w.shape[-1]
    (block,) = [b for b in range(64, 1, -1) if last % b == 0 and b % 2 == 0][:1]
    blocks = w.reshape(-1, block)
    m = np.abs(blocks).max(axis=1)
    step = (m.max() - m.min()) / 255
    decoded = m.min() + step * np.rint((m - m.min()) / (step or 1.0))
    code, found = np.array(NF4_CODE), np.zeros_like(blocks)
    for i, j in np.ndindex(blocks.shape):
        found[i, j] = decoded[i] * code[np.abs(code * decoded[i] - blocks[i, j]).argmin()]
    bound = np.maximum(0.304 / 2 * decoded, step / 2)
    return found.reshape(w.shape), np.repeat(bound, block).reshape(w.shape)


def test_the_code_is_the_published_one():
    """Appendix E of arXiv 2305.14314, and what its table is made of (the same in bitsandbytes):
    quantiles of the normal distribution, eight steps down and seven up, over the largest."""
    published = """
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0"""
    assert NF4_CODE == tuple(float(x) for x in published.split(","))
    from scipy.stats import norm

    furthest = 0.9677083
    up = norm.ppf(np.linspace(furthest, 0.5, 9)[:-1])
    down = -norm.ppf(np.linspace(furthest, 0.5, 8)[:-1])
    made = np.sort(np.r_[up, 0.0, down])
    np.testing.assert_allclose(NF4_CODE, made / made.max(), atol=1e-6)
    assert np.diff(NF4_CODE).max() < 0.304


@pytest.mark.parametrize(
    ("size", "block"), [(2, 2), (24, 24), (64, 64), (130, 26), (576, 64), (11008, 64), (254, 2)]
)
def test_blocks_are_as_large_as_divides(size, block):
    assert block_size(size) == block


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_against_numpy_and_their_error_bound(name, kind):
    shape, axes = KERNELS[name]
    kernel = draw(shape)
    leaf = quantize_kernel(kernel, axes, kind)
    assert isinstance(leaf, FrozenKernel)
    assert (leaf.shape, leaf.dtype, leaf.ndim) == (shape, np.float32, len(shape))
    assert trees.count({"kernel": leaf}) == kernel.size
    found = matrices(leaf.astype(jnp.float32), axes)
    for index in np.ndindex(found.shape[:2]):
        w = matrices(kernel, axes)[index]
        expected, bound = by_hand(w, kind)
        np.testing.assert_allclose(found[index], expected, atol=1e-6 * np.abs(w).max())
        assert (np.abs(found[index] - w) <= bound + 1e-6 * np.abs(w).max()).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", KERNELS)
def test_every_array_has_the_axes_of_its_kernel(name, kind):
    """As many of them, equal where they are stacked or outputs; so layers and experts slice off."""
    shape, axes = KERNELS[name]
    leaf = quantize_kernel(draw(shape), axes, kind)
    for array in jax.tree.leaves(leaf):
        ins = slice(axes.stacked, axes.stacked + axes.inputs)
        assert array.ndim == len(shape)
        assert (array.shape[: ins.start], array.shape[ins.stop :]) == (
            shape[: ins.start],
            shape[ins.stop :],
        )
    whole = np.asarray(leaf.astype(jnp.float32))
    for index in np.ndindex(shape[: axes.stacked]):
        one = jax.tree.map(lambda x, i=index: x[i], leaf)
        np.testing.assert_array_equal(one.astype(jnp.float32), whole[index])
        d_in = int(np.prod(one.shape[: axes.inputs]))
        matrix = one.reshape(d_in, whole[index].size // d_in)
        assert matrix.shape == (d_in, whole[index].size // d_in)
        flat = whole[index].reshape(matrix.shape)
        np.testing.assert_array_equal(matrix.astype(jnp.float32), flat)


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_and_jax_arrays_are_quantized_alike_and_keep_their_dtype(kind):
    shape, axes = KERNELS["output"]
    for dtype in (np.float32, ml_dtypes.bfloat16):
        kernel = draw(shape).astype(dtype)
        leaves = [quantize_kernel(x, axes, kind) for x in (kernel, jnp.asarray(kernel), kernel)]
        for leaf in leaves:
            assert leaf.dtype == dtype
            jax.tree.map(np.testing.assert_array_equal, leaf, leaves[0])


@pytest.mark.parametrize("kind", KINDS)
def test_only_linear_layers_of_the_stacks_are_quantized(make_llama, kind):
    tiny = make_llama(**MIXTRAL)
    flat, before = trees.flatten(quantize(tiny.params, tiny.axes, kind)), trees.flatten(tiny.params)
    assert flat.keys() == before.keys()
    quantized = {path for path, leaf in flat.items() if isinstance(leaf, FrozenKernel)}
    attention = {f"layers/attn/{name}/kernel" for name in "qkvo"}
    experts = {f"layers/mlp/experts/{name}/kernel" for name in ("gate", "up", "down")}
    assert quantized == attention | experts
    assert all(flat[path] is before[path] for path in flat.keys() - quantized)


def test_what_cannot_be_quantized_is_told(tiny):
    axes = {"layers": {"up": {"kernel": ParamAxes(("layers", "embed", "ffn"), 1)}}}

    def params(values):
        return {"layers": {"up": {"kernel": values}}}

    odd = params(np.ones((2, 15, 4), np.float32))
    quantize(odd, axes, "int8")
    with pytest.raises(UserError, match=r"axis of 15 is odd.*: layers/up/kernel; use int8"):
        quantize(odd, axes, "nf4")
    with pytest.raises(UserError, match=r"no kernel to quantize: pattern 'q'"):
        quantize(tiny.params, tiny.axes, "int8", "q")
    for kind in KINDS:
        for bad in (np.nan, np.inf):
            values = np.ones((2, 16, 4), np.float32)
            values[1, 3, 2] = bad
            with pytest.raises(UserError, match="not finite: layers/up/kernel"):
                quantize(params(values), axes, kind)


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.55), ("nf4", 0.30)])
@pytest.mark.parametrize("name", ["smollm2_135m", "llama2_7b", "mixtral_8x7b", "gpt2"])
def test_bytes_at_real_shapes(name, kind, most):
    """From shapes alone; of the whole model, the rest counts at its two bytes a weight."""
    preset = PRESETS[name]
    config = families.config_from_hf(preset.fields, preset.hub_id, param_dtype="bfloat16")
    shapes, axes = registry.describe(registry.build(config))
    flat, described = trees.flatten(shapes), trees.flatten(axes)
    for path in trees.select(shapes, r"layers/.*(?<!/router)/kernel"):

        def one(kernel, path=path):
            return quantize_kernel(kernel, described[path], kind)

        flat[path] = jax.eval_shape(one, flat[path])
    found = ratios(trees.unflatten(flat))
    quantized = {path: x for path, x in flat.items() if isinstance(x, FrozenKernel)}
    share = trees.count(quantized) / preset.parameters
    assert found.kernels <= most
    assert found.model == pytest.approx(share * found.kernels + 1 - share, abs=1e-3)


def converted(tiny, kind):
    """(quantized, the same dequantized) parameters of a tiny model."""
    params = tiny.params
    stacked = params if tiny.config.scan else trees.stack_layers(params)
    quantized = quantize(stacked, tiny.axes, kind)
    dense = trees.map_leaves(
        lambda x: x.astype(jnp.float32) if isinstance(x, FrozenKernel) else x, quantized
    )
    if not tiny.config.scan:
        quantized, dense = map(trees.unstack_layers, (quantized, dense))
    return jax.tree.map(jnp.asarray, (quantized, dense))


def make_adapter(tiny, variant):
    """LoRA or DoRA on every linear layer, drawn."""
    stacked = tiny.params if tiny.config.scan else trees.stack_layers(tiny.params)
    _, adapter = lora.init(stacked, tiny.axes, [LoraRule(rank=3)], jax.random.key(0))
    rng = np.random.default_rng(1)

    def leaf_of(leaf):
        leaf = leaf.replace(b=0.1 * rng.standard_normal(leaf.b.shape, np.float32))
        if variant == "lora":
            return leaf
        shape = (*leaf.b.shape[:-2], leaf.b.shape[-1])
        magnitude = 1 + rng.random(shape, np.float32)
        return DoRA(leaf.a, leaf.b, leaf.scale, magnitude)

    adapter = trees.map_leaves(leaf_of, adapter)
    return adapter if tiny.config.scan else trees.unstack_layers(adapter)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_model_of_them_is_its_dequantized_self(make_llama, tokens, name, kind):
    """With adapters that look at the kernel beside it."""
    tiny = make_llama(**MODELS[name])
    adapter = make_adapter(tiny, "dora")
    ours, exact = (tiny.logits(tokens, params=x, lora=adapter) for x in converted(tiny, kind))
    assert_close(ours, exact)


def test_adapters_start_and_fuse_on_them_as_on_arrays(tiny, tokens):
    quantized, dense = converted(tiny, "nf4")
    base = tiny.logits(tokens, params=quantized)
    assert_close(base, tiny.logits(tokens, params=dense))
    assert np.abs(base - tiny.logits(tokens)).max() > 1e-2 * np.abs(base).max()
    fresh, expected = (
        lora.init(params, tiny.axes, [LoraRule(rank=3)], jax.random.key(0))[1]
        for params in (quantized, dense)
    )
    jax.tree.map(np.testing.assert_array_equal, fresh, expected)
    for variant in ("lora", "dora"):
        adapter = make_adapter(tiny, variant)
        fused = lora.fuse(quantized, adapter)
        assert not any(isinstance(x, FrozenKernel) for x in trees.flatten(fused).values())
        side = tiny.logits(tokens, params=quantized, lora=adapter)
        assert_close(side, tiny.logits(tokens, params=fused))
        assert np.abs(side - base).max() > 0.05 * np.abs(base).max()


def test_what_is_fused_has_the_dtype_of_the_weights(make_llama):
    tiny = make_llama(**TWO, param_dtype="bfloat16")
    quantized, dense = converted(tiny, "nf4")
    adapter = make_adapter(tiny, "lora")
    ours, exact = (
        trees.flatten(lora.fuse(params, adapter))["layers/attn/q/kernel"]
        for params in (quantized, dense)
    )
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))


def a_batch(tokens):
    ones = jnp.ones(tokens.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    weights = (positions > 2).astype(jnp.float32)
    return Batch(jnp.asarray(tokens), positions, ones, jnp.asarray(tokens), weights)


def loss_of(model, params, fixed, batch):
    """Function (trained part of the adapter) -> loss."""
    frozen = {"params": params, "fixed": fixed}
    return lambda trained: causal_lm(model)(trained, frozen, batch, None)[0]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradients_are_those_over_the_dequantized_base(make_llama, tokens, name, kind):
    tiny = make_llama(**MODELS[name])
    trained, fixed = lora.split(make_adapter(tiny, "lora"))

    @jax.jit
    def gradient(trained, params):
        return jax.grad(loss_of(tiny.model, params, fixed, a_batch(tokens)))(trained)

    ours, expected = (gradient(trained, params) for params in converted(tiny, kind))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(expected))
    jax.tree.map(assert_close, ours, expected)


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_training_keeps_no_dequantized_kernel(make_llama, tokens, name, kind, variant):
    """Between forward and backward pass lie activations and codes, but no weights of kernels."""
    tiny = make_llama(**MODELS[name])
    quantized, dense = converted(tiny, kind)
    trained, fixed = lora.split(make_adapter(tiny, variant))
    flat = trees.flatten(quantized)
    kernels = {path for path, leaf in flat.items() if isinstance(leaf, FrozenKernel)}
    rest = {leaf.shape for path, leaf in flat.items() if path not in kernels}
    rest |= {x.shape for x in jax.tree.leaves(trained)}
    smallest = min(trees.count(flat[path]) for path in kernels)

    def largest(params):
        """Size of the largest array of floats kept, but for parameters that are no kernels."""

        def kept(trained, params):
            loss = loss_of(tiny.model, params, fixed, a_batch(tokens[:1, :1]))
            return jax.tree.leaves(jax.vjp(loss, trained)[1])

        shapes = jax.eval_shape(kept, trained, params)
        floats = [x.size for x in shapes if x.dtype == jnp.float32 and x.shape not in rest]
        return max(floats)

    assert largest(quantized) < smallest <= largest(dense)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)])
def test_products_and_gradients_in_bfloat16(kind, shape):
    """In the dtype of the input, however the leading axes are."""
    leaf = quantize_kernel(draw((24, 8)), ParamAxes(("embed", "ffn"), 1), kind)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)
    y, backward = jax.vjp(leaf.matmul, x)
    (dx,) = backward(jnp.ones_like(y))
    dense = np.asarray(leaf.astype(jnp.float32))
    assert (y.dtype, dx.dtype, y.shape) == (jnp.bfloat16, jnp.bfloat16, (*shape[:-1], 8))
    assert_close(np.asarray(y, np.float32), np.asarray(x, np.float32) @ dense, 2e-2)
    summed = np.broadcast_to(dense.sum(axis=1), shape)
    assert_close(np.asarray(dx, np.float32), summed, 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_memory_of_training_by_layer(kind, remat):
    """Of a compiled step, each layer more takes less than its codes: neither weights nor copies
    of codes are kept for the backward pass."""

    def temporary(layers):
        config = LlamaConfig(64, 256, layers, 4, 4, 64, 512, remat=remat)
        model = registry.build(config)
        shapes, axes = registry.describe(model)
        params = quantize(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes), axes, kind)
        _, adapter = lora.init(params, axes, [LoraRule(rank=1)], jax.random.key(0))
        trained, fixed = lora.split(adapter)
        batch = a_batch(np.zeros((1, 4), np.int32))

        def gradient(trained, params):
            return jax.grad(loss_of(model, params, fixed, batch))(trained)

        compiled = jax.jit(gradient).lower(trained, params).compile()
        kernels = {p: x for p, x in trees.flatten(params).items() if isinstance(x, FrozenKernel)}
        return compiled.memory_analysis().temp_size_in_bytes, trees.bytes_of(kernels)

    (few, codes_of_few), (many, codes_of_many) = temporary(4), temporary(12)
    assert many - few < 0.5 * (codes_of_many - codes_of_few)
