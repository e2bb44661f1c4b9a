import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax.models import rope
from ecomjax.models.rope import RopeScaling, inverse_frequencies

RNG = np.random.default_rng(0)
THETA = 500.0


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape, np.float32))


def rotate(x, positions, theta):
    return turned_by(x, positions, inverse_frequencies(x.shape[-1], theta))


def turned_by(x, positions, inverse):
    """The first of two kinds."""
    made = rope.rotations(positions, np.stack([inverse, 2 * inverse]))
    return rope.rotate(x, jax.tree.map(lambda kinds: kinds[0], made))


def test_rotates_pairs_as_complex_numbers():
    """Feature i is the real and i + H/2 the imaginary part; angle position * theta^(-2i/H)."""
    x, positions = normal(2, 5, 3, 8), jnp.asarray(RNG.integers(0, 900, (2, 5)), jnp.int32)
    real, imaginary = np.split(np.asarray(x), 2, axis=-1)
    angles = np.asarray(positions)[:, :, None, None] * THETA ** (-2 * np.arange(4) / 8)
    turned = (real + 1j * imaginary) * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(x, positions, THETA), expected, atol=1e-4)


def test_products_depend_on_the_distance_alone():
    q, k = normal(1, 1, 1, 16), normal(1, 1, 1, 16)

    def product(query, key):
        at = [jnp.full((1, 1), p, jnp.int32) for p in (query, key)]
        return float(np.vdot(rotate(q, at[0], THETA), rotate(k, at[1], THETA)))

    assert product(7, 4) == pytest.approx(product(103, 100), abs=1e-4)
    assert product(7, 4) == pytest.approx(product(3, 0), abs=1e-4)
    assert product(7, 4) != pytest.approx(product(4, 7), abs=1e-2)


def test_position_zero_stays_and_lengths_are_kept():
    x = normal(1, 3, 2, 8)
    np.testing.assert_array_equal(rotate(x, jnp.zeros((1, 3), jnp.int32), THETA), x)
    turned = rotate(x, jnp.full((1, 3), 12, jnp.int32), THETA)
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_angles_are_of_float32_whatever_the_input():
    """At position 2001 an angle in bfloat16 would be off by up to 4 radians."""
    x, positions = normal(1, 1, 1, 8), jnp.full((1, 1), 2001, jnp.int32)
    half = rotate(jnp.asarray(x, jnp.bfloat16), positions, THETA)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), rotate(x, positions, THETA), atol=0.05)


def test_linear_scaling_is_a_position_divided():
    x, positions = normal(1, 1, 2, 8), jnp.full((1, 1), 12, jnp.int32)
    inverse = inverse_frequencies(8, THETA, RopeScaling("linear", 4.0))
    scaled = turned_by(x, positions, inverse)
    np.testing.assert_allclose(scaled, rotate(x, positions // 4, THETA), atol=1e-5)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    """Waves of 2 pi theta^(2i/H) positions; between the two bounds they are interpolated."""
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, original_positions=1000)
    plain = inverse_frequencies(32, 10000.0)
    ratio = plain / inverse_frequencies(32, 10000.0, scaling)
    waves = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[waves < 1000 / 4], 1.0)
    np.testing.assert_allclose(ratio[waves > 1000], 8.0, rtol=1e-6)
    between = ratio[(waves > 1000 / 4) & (waves < 1000)]
    assert len(between) and (np.diff(between) > 0).all() and (between > 1).all()


def test_frequencies_of_zero_rotate_nothing():
    x = normal(1, 3, 2, 8)
    still = turned_by(x, jnp.full((1, 3), 12, jnp.int32), np.zeros(4, np.float32))
    np.testing.assert_array_equal(still, x)
