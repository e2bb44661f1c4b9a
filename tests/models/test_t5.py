import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecomjax.models.t5 import RelativeBias, T5Config, distance_buckets


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("sizes", [(32, 128), (10, 13), (8, 100), (7, 9), (64, 256)])
def test_buckets_are_those_of_transformers(sizes, bidirectional):
    """At every distance, those beyond the largest included."""
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = np.arange(-2 * sizes[1], 2 * sizes[1] + 1)
    theirs = T5Attention._relative_position_bucket(
        torch.from_numpy(distances), bidirectional, *sizes
    ).numpy()
    found = distance_buckets(*sizes, bidirectional)
    np.testing.assert_array_equal(found[np.clip(distances, -sizes[1], sizes[1]) + sizes[1]], theirs)
    # Its relation is key minus query, so all keys ahead share bucket 0 in a decoder.
    assert (theirs[distances > 0] == 0).all() != bidirectional


def test_bias_depends_on_distances_alone():
    """Rows with other positions of the same distances, and a shorter row of queries."""
    config = T5Config(9, 8, 1, 1, 3, 4, 8, buckets=8, max_distance=6)
    module = RelativeBias(config, bidirectional=True)
    positions = jnp.array([[0, 1, 2, 3, 0, 1], [5, 6, 7, 8, 5, 6]], jnp.int32)
    table = {"params": {"embedding": np.random.default_rng(0).standard_normal((8, 3), np.float32)}}
    bias = jax.jit(module.apply)(table, positions, positions)
    assert bias.shape == (2, 3, 6, 6)
    np.testing.assert_array_equal(bias[0], bias[1])
    np.testing.assert_array_equal(bias[0, :, 0, 1], bias[0, :, 4, 5])
    last = jax.jit(module.apply)(table, positions[:, -1:], positions)
    np.testing.assert_array_equal(last[:, :, 0], bias[:, :, -1])
