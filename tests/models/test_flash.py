import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax import sharding
from ecomjax.models import flash
from ecomjax.models.attention import KeyValues, attend, make_mask
from ecomjax.models.flash_kernels import MASKED
from tests.models.test_attention import normal

RNG = np.random.default_rng(0)
QUERIES, KEYS = 768, 384
"""Which are cut into three blocks each, of 256 and of 128."""

CASES = {
    "a key head for each query head": {"heads": 8, "kv_heads": 8},
    "groups": {"heads": 6, "kv_heads": 2},
    "large groups, capped scores": {"heads": 6, "kv_heads": 1, "cap": 2.0},
    "keys that rows share": {"heads": 4, "kv_heads": 2, "shared": True},
    "bfloat16": {"heads": 4, "kv_heads": 2, "dtype": jnp.bfloat16},
}


def make(heads, kv_heads, shared=False, dtype=jnp.float32, rows=2):
    """Random queries and keys, and a mask with blocks that are not needed, first ones among them,
    and a query that sees nothing."""
    q = normal(rows, heads, QUERIES, 16)
    keys, values = (normal(1 if shared else rows, kv_heads, KEYS, 16) for _ in range(2))
    mask = RNG.random((rows, QUERIES, KEYS)) < 0.3
    mask[0, :, :128] = False
    mask[0, 256:512, 256:] = False
    mask[-1, :256, 128:256] = False
    mask[-1, 7] = False
    return flash.Inputs(*(x.astype(dtype) for x in (q / 4, keys, values)), jnp.asarray(mask))


def formula(given, cap=0.0):
    """(output, log of the sum) of one softmax over all keys, in float32."""
    q, keys, values = (x.astype(jnp.float32) for x in given[:3])
    keys, values = (
        jnp.repeat(jnp.broadcast_to(x, (q.shape[0], *x.shape[1:])), q.shape[1] // x.shape[1], 1)
        for x in (keys, values)
    )
    scores = jnp.einsum("BNTH,BNSH->BNTS", q, keys)
    scores = cap * jnp.tanh(scores / cap) if cap else scores
    scores = jnp.where(given.mask[:, None], scores, MASKED)
    out = jnp.einsum("BNTS,BNSH->BNTH", jax.nn.softmax(scores, axis=-1), values)
    return out, jax.nn.logsumexp(scores, axis=-1)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_formula(case):
    options = dict(CASES[case])
    cap = options.pop("cap", 0.0)
    given = make(**options)
    close = {"atol": 0.03 if "dtype" in options else 1e-5, "rtol": 1e-5}
    sees = np.asarray(given.mask.any(axis=-1))[:, None, :, None].astype(np.float32)

    out, log_total = flash.attend(given, cap, interpret=True)
    assert out.dtype == log_total.dtype == jnp.float32
    expected, expected_log = formula(given, cap)
    np.testing.assert_allclose(out * sees, expected * sees, **close)
    np.testing.assert_allclose(log_total * sees[..., 0], expected_log * sees[..., 0], **close)
    assert (np.asarray(log_total)[-1, :, 7] < -1e38).all()

    direction = (normal(*out.shape) * sees).astype(given.q.dtype)
    correction = (direction.astype(jnp.float32) * out).sum(axis=-1)
    found = flash.gradients(given, direction, log_total, correction, cap, interpret=True)

    def total(arrays):
        out, _ = formula(flash.Inputs(*arrays, given.mask), cap)
        return (out * direction.astype(jnp.float32)).sum()

    exact = jax.grad(total)(tuple(x.astype(jnp.float32) for x in given[:3]))
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.shape == theirs.shape
        largest = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, atol=close["atol"] * largest)


def test_blocks_that_no_query_sees_are_not_computed():
    """The values of keys that no query sees may be no numbers."""
    given = make(heads=2, kv_heads=2, rows=1)
    mask = np.asarray(given.mask).copy()
    mask[0] &= np.arange(KEYS) >= 128
    mask[0, 7] = mask[0, 8]
    values = np.array(given.values)
    values[:, :, :128] = np.nan
    given = given._replace(mask=jnp.asarray(mask), values=jnp.asarray(values))
    out, log_total = flash.attend(given, interpret=True)
    assert np.isfinite(out).all()
    ones = jnp.ones_like(log_total)
    d_q, *d_keys = flash.gradients(given, out, log_total, ones, interpret=True)
    assert np.isfinite(d_q).all()
    assert all(np.isfinite(x[:, :, 128:]).all() for x in d_keys)


def test_lengths_and_heads_that_have_no_kernel():
    assert flash.fits((2, 8, 256, 16), (1, 2, 384, 16))
    assert not flash.fits((2, 8, 1, 16), (2, 2, 384, 16))
    assert not flash.fits((2, 8, 256, 16), (2, 2, 96, 16))
    assert flash.fits((2, 16, 256, 128), (2, 1, 256, 128))
    assert not flash.fits((2, 32, 256, 128), (2, 1, 256, 128)), "a block of one group is too large"
    assert not flash.fits((2, 8, 2**17 - 128, 16), (2, 8, 2**17 - 128, 16)), "too many blocks"
    with sharding.use(sharding.make_mesh(data=2, tensor=4)):
        assert flash.fits((2, 8, 256, 16), (2, 4, 256, 16))
        assert not flash.fits((2, 8, 256, 16), (2, 2, 256, 16))


@pytest.mark.parametrize("shared", [False, True])
def test_on_a_mesh_each_device_computes_its_rows_and_heads(shared):
    given = make(heads=4, kv_heads=2, shared=shared)
    expected = flash.attend(given, interpret=True)
    grads = flash.gradients(given, *expected[:1], *expected[1:] * 2, interpret=True)
    mesh = sharding.make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
    with sharding.use(mesh):
        found = jax.jit(functools.partial(flash.attend, interpret=True))(given)
        own = jax.jit(functools.partial(flash.gradients, interpret=True))(
            given, *expected[:1], *expected[1:] * 2
        )
    assert found[0].sharding.shard_shape(found[0].shape) == (1, 2, QUERIES, 16)
    for ours, theirs in zip((*found, *own), (*expected, *grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture
def as_on_tpu(monkeypatch):
    """Everything takes the path of TPUs, where the kernels are run as ordinary operations.

    What was traced on the other path, and on this one, is forgotten.
    """
    jax.clear_caches()
    for name in ("attend", "gradients"):
        kernel = functools.partial(getattr(flash, name), interpret=True)
        monkeypatch.setattr(flash, name, kernel)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, tpu, default: tpu(*x))
    yield
    jax.clear_caches()


SEGMENTS = np.repeat([[-1, 1, 2, 2 << 16, (2 << 16) + 1, 0], [1, 2, 3, 4, 5, 0]], 64, axis=1)
SEGMENTS = jnp.asarray(SEGMENTS, jnp.int32)
"""Of slots that are cut into three blocks."""


@pytest.mark.parametrize("parts", [1, 2])
def test_attention_is_the_same_by_kernel_and_by_formula(parts, as_on_tpu, request):
    """Packed rows with a shared prefix and branches, alone and behind slots that rows share."""
    q, own = normal(2, 384, 6, 8), KeyValues(normal(2, 2, 384, 8), normal(2, 2, 384, 8))
    before = KeyValues(normal(1, 2, 128, 8), normal(1, 2, 128, 8))
    mask = make_mask(SEGMENTS, SEGMENTS, jnp.int32(0))
    seen = jnp.broadcast_to((SEGMENTS != 0)[:, :, None], (2, 384, 128))
    direction = normal(*q.shape)

    @jax.jit
    def run(q, own, before):
        def total(q, own, before):
            both = [(before, seen), (own, mask)]
            out = attend(q, both[-parts:], softcap=3.0)
            return (out * direction).sum(), out

        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, own, before)

    text = str(jax.make_jaxpr(run)(q, own, before))
    assert text.count("pallas_call") == 3 * parts
    found = run(q, own, before)
    request.getfixturevalue("monkeypatch").undo()
    jax.clear_caches()
    expected = run(q, own, before)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("remat", "calls"), [("none", 3), ("dots", 3), ("full", 4)])
def test_programs_for_tpus_hold_the_kernels_and_others_do_not(make_llama, remat, calls):
    """Of a forward and its gradient, scanned; attention is computed again by "full" alone."""
    tiny = make_llama(remat=remat)
    given = (jnp.ones((1, 128), jnp.int32), jnp.arange(128, dtype=jnp.int32)[None])

    def loss(params):
        hidden, _ = tiny.model.apply({"params": params}, *given, given[0])
        return hidden.sum()

    traced = jax.jit(jax.grad(loss)).trace(tiny.params)
    for platform, expected in (("cpu", 0), ("tpu", calls)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("@tpu_custom_call") == expected, platform


def segments_of(rows, slots=256):
    """Random lengths, two sequences a row and padding."""
    first = RNG.integers(20, 100, (rows, 1))
    last = first + RNG.integers(60, 120, (rows, 1))
    slot = np.arange(slots)
    return jnp.asarray(np.where(slot < first, 1, np.where(slot < last, 2, 0)), jnp.int32)


@pytest.fixture
def hidden_and_gradient(make_llama):
    """Of the sum of what a tiny model makes of rows of 256 tokens, by its parameters."""
    tiny = make_llama(remat="dots")
    segments = segments_of(4)
    tokens = jnp.asarray(RNG.integers(3, 60, segments.shape), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(256, dtype=jnp.int32), segments.shape)
    live = (segments != 0)[..., None]

    def total(params):
        hidden, _ = tiny.model.apply({"params": params}, tokens, positions, segments)
        return jnp.square(jnp.where(live, hidden, 0.0)).sum()

    return lambda: jax.jit(jax.value_and_grad(total))(tiny.params)


def test_a_model_on_a_mesh_by_kernel(hidden_and_gradient, as_on_tpu, request):
    with sharding.use(sharding.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])):
        assert "pallas_call" in str(jax.make_jaxpr(hidden_and_gradient)())
        found = hidden_and_gradient()
    request.getfixturevalue("monkeypatch").undo()
    jax.clear_caches()
    expected = hidden_and_gradient()
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_many_runs_trained_together_are_computed_each_by_itself(as_on_tpu):
    """Under `vmap`, as joint training has it, gradients included."""
    segments = segments_of(3)[:, None]
    masks = jax.vmap(make_mask, in_axes=(0, 0, None))(segments, segments, jnp.int32(0))
    runs = normal(3, 1, 256, 2, 8), normal(3, 1, 2, 256, 8), normal(3, 1, 2, 256, 8), masks

    def total(q, keys, values, mask):
        return jnp.square(attend(q, [(KeyValues(keys, values), mask)])).sum()

    run = jax.value_and_grad(total, argnums=(0, 1, 2))
    assert "pallas_call" in str(jax.make_jaxpr(jax.vmap(run))(*runs))
    found = jax.vmap(run)(*runs)
    for index in range(3):
        expected = run(*(x[index] for x in runs))
        for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(ours[index], theirs, rtol=1e-4, atol=1e-5)
